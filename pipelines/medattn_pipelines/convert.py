"""`medattn convert`: weights that others published become a model folder, whole or not at all.

A source is its options and a function that writes the folder, so that volumes and images can have a model
card each. The function gets the weights under the authors' names and maps them to ours.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, ValidationError
from torch import Tensor

from medattn import __version__
from medattn.atomic import atomic_folder
from medattn.data.plan import Plan
from medattn.errors import InputError
from medattn.labels import LabelSet, Organ
from medattn.networks import create
from medattn.networks.block_unet import our_name
from medattn.networks.slicewise import SliceWise
from medattn.segmenter import ModelCard, Settings, load_model, save_model
from medattn.weights import fit_weights, read_weights
from medattn_pipelines.config import Section, Spacing, Window

BACKGROUND = "background"


@dataclass(frozen=True)
class Published:
    """A checkpoint. weights: by the authors' names. sha256: of the file."""

    path: Path
    weights: Mapping[str, Tensor]
    sha256: str

    def provenance(self, source: str) -> dict[str, str]:
        """Where a model came from, for its card."""
        return {"medattn": __version__, "source": source, "file": self.path.name, "sha256": self.sha256}


@dataclass(frozen=True)
class Source:
    """Options are what the weights do not tell. write: fills the folder and returns what to print."""

    options: type[Section]
    write: Callable[[Published, Any, Path], dict[str, str]]


def convert(
    source: str, checkpoint: Path, out: Path, options: Mapping[str, Any], overrides: Sequence[str] = ()
) -> dict[str, str]:
    """Write a model folder from a published checkpoint; returns what came out, by headings.

    source: one of SOURCES. out: a folder that does not exist or is empty. options: of that source;
    overrides: the same as `option=value`, the value in YAML. Raises InputError for what is wrong with either,
    for a checkpoint that cannot be read or is of another architecture; then nothing is written.
    """
    chosen = _validated(source, dict(options) | dict(_parse(text) for text in overrides))
    with atomic_folder(out) as folder:
        weights = read_weights(checkpoint)
        with checkpoint.open("rb") as file:
            published = Published(checkpoint, weights, hashlib.file_digest(file, "sha256").hexdigest())
        rows = SOURCES[source].write(published, chosen, folder)
    return {**rows, "model": str(out)}


def _parse(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"{text!r}: expected option=value, such as placement=last")
    try:
        return name, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise InputError(f"{text!r}: the value is not valid YAML") from None


def _validated(source: str, given: Mapping[str, Any]) -> Section:
    """The source's options. Raises InputError with a sentence per problem."""
    kind = SOURCES[source].options
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False):
            name = ".".join(map(str, detail["loc"]))
            near = difflib.get_close_matches(name, kind.model_fields, n=1) or [", ".join(kind.model_fields)]
            reason = str(detail.get("ctx", {}).get("error") or f"{detail['msg']} (got {detail['input']!r})")
            if detail["type"] == "extra_forbidden":
                reason = f"{source} has no such option; did you mean {near[0]}?"
            problems.append(f"option {name}: {reason}")
        raise InputError(*problems) from None


class BlockUNetOptions(Section):
    """What the weights of the block U-Net do not tell. Defaults are those of the authors' released code.

    placement: where attention stands. organs: of the output channels after the background, in their order,
    "background" for one that is not reported; None for the released model with twelve outputs. spacing_mm,
    window_hu: how scans are prepared, as in training configs; the released code keeps a scan's slice spacing,
    which a plan cannot, so that the third number is a choice of medattn's.
    """

    placement: Literal["penultimate", "last", "none"] = "penultimate"
    organs: Annotated[list[str], Field(min_length=1)] | None = None
    spacing_mm: tuple[Spacing, Spacing, Spacing] = (1.0, 1.0, 2.5)
    window_hu: Window = (-85.0, 265.0)
    labels: str = "hn_oar"


# channels 1 to 11 of the released weights; 5, 6 and 11 are not exported by the authors' code, nor named
RELEASED = (
    *("Parotid_L", "Parotid_R", "Glnd_Submand_L", "Glnd_Submand_R", BACKGROUND, BACKGROUND),
    *("Bone_Mandible", "SpinalCord", "Brainstem", "Cavity_Oral", BACKGROUND),
)
SLICE = 256  # edge in pixels of what the network was trained on
ATTENTIONS = 2  # of the three that the released code builds, it calls these


def write_block_unet(published: Published, options: BlockUNetOptions, folder: Path) -> dict[str, str]:
    """The U-Net with block attention of Jiang et al. 2019, from state dicts of cerr/CT_HeadAndNeck_OARs.

    Their slices are stored images, rows towards the back and columns to the patient's left; ours run L, P.
    The network has no other sense of direction than its 3x3 kernels, which are transposed for that.
    """
    theirs = {ours: name for name in published.weights if (ours := our_name(name, ATTENTIONS))}
    weights = {ours: published.weights[name] for ours, name in theirs.items()}
    last = weights.get("outc.weight", torch.empty(()))
    outputs = (
        last.shape[0] if last.ndim else 1 + len(RELEASED)
    )  # without it, the comparison says what is wrong
    network = create("block_unet_2d", placement=options.placement, out_channels=outputs).eval()
    fit_weights(network, weights, published.path, name="block_unet_2d", theirs=theirs)
    names, organs = _channels(published.path, outputs, options)
    card = ModelCard(
        network="block_unet_2d",
        spatial_dims=2,
        options={"placement": options.placement},
        plan=Plan(names, options.spacing_mm, (SLICE, SLICE, 1), options.window_hu, ((2, 2, 1),) * 4),
        labels={0: BACKGROUND} | {n: name for n, name in enumerate(names, 1) if name != BACKGROUND},
        organs=organs,
        mirror=None,
        settings=Settings(flips=False, batch_size=4),
        provenance=published.provenance("cerr-block-unet"),
    )
    turned = {k: v.mT if v.ndim == 4 else v for k, v in SliceWise(network).state_dict().items()}
    save_model(folder, card, turned)
    _require_same(folder, network)
    unnamed = [str(n) for n, name in enumerate(names, 1) if name == BACKGROUND]
    return {
        "network": f"block_unet_2d, {sum(p.numel() for p in network.parameters()):,} parameters, "
        f"{outputs} outputs, placement={options.placement}",
        "organs": ", ".join(f"{n} {name}" for n, name in card.labels.items() if n)
        + (f" (not reported: {', '.join(unnamed)})" if unnamed else ""),
        "input": f"slices of {SLICE} x {SLICE}, spacing {_numbers(options.spacing_mm)} mm, "
        f"{options.window_hu[0]:g} to {options.window_hu[1]:g} HU",
        "checked": "read back; a forward pass gives the output of the checkpoint",
    }


def _channels(
    path: Path, outputs: int, options: BlockUNetOptions
) -> tuple[tuple[str, ...], dict[str, Organ]]:
    """The standard name of every output but the first, BACKGROUND for one not reported, and the organs."""
    given = options.organs or (list(RELEASED) if outputs == 1 + len(RELEASED) else None)
    if given is None:
        raise InputError(
            f"{path}: has {outputs} outputs, and only the order of the released model's twelve is known; "
            f"give the organs of outputs 1 to {outputs - 1} in their order with --organs"
        )
    if len(given) != outputs - 1:
        raise InputError(
            f"{path}: has {outputs} outputs, the background and {outputs - 1} others, but --organs names "
            f"{len(given)}; name every one, `{BACKGROUND}` for one that is not to be reported"
        )
    label_set = LabelSet.load(options.labels)
    organs = {organ.name: organ for organ in label_set.resolve(n for n in given if n != BACKGROUND)}
    names = tuple(n if n == BACKGROUND else label_set.describe(n).name for n in given)
    if twice := sorted(name for name in organs if names.count(name) > 1):
        raise InputError(f"--organs names {', '.join(twice)} more than once; every output has its own organ")
    return names, organs


def _require_same(folder: Path, network: torch.nn.Module) -> None:
    """Raise where the written model, run on a slice, does not give what the checkpoint's network gives."""
    _, written = load_model(folder)
    slices = torch.rand(1, 1, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected, found = network(slices), written.eval()(slices.mT[..., None])[..., 0].mT
    if not bool(expected.isfinite().all()):
        raise InputError("the network's output is not finite; the checkpoint is damaged, take another one")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def _numbers(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


SOURCES: dict[str, Source] = {"cerr-block-unet": Source(BlockUNetOptions, write_block_unet)}
