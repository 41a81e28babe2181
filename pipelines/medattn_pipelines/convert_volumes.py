"""Published weights of volume networks: the authors' state dict becomes a segmentation model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from medattn.data.plan import Plan
from medattn.errors import InputError
from medattn.labels import LabelSet, Organ
from medattn.networks import create
from medattn.networks.block_unet import our_name
from medattn.networks.slicewise import SliceWise
from medattn.segmenter import ModelCard, Settings, load_model, save_model
from medattn.weights import fit_weights
from medattn_pipelines.config import Section, Spacing, Window
from medattn_pipelines.convert_source import Published, require_same

BACKGROUND = "background"


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
    _run_both(folder, network)
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


def _run_both(folder: Path, network: torch.nn.Module) -> None:
    """The written model and the checkpoint's network on a slice; raises where they differ."""
    _, written = load_model(folder)
    slices = torch.rand(1, 1, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected, found = network(slices), written.eval()(slices.mT[..., None])[..., 0].mT
    require_same(found, expected)


def _numbers(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
