"""Published weights of image networks: state dicts of their authors and of timm become classifiers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from medattn.classifier import ImageCard, load_classifier, save_classifier
from medattn.data.images.classes import Classes, read_classes
from medattn.data.images.transforms import EvaluationTransform
from medattn.errors import InputError
from medattn.networks import axial_resnet, create, eamlp, focal, lesa, names, resnet_weights, xcit
from medattn.networks.halonet import AS_TIMM
from medattn.weights import fit_weights
from medattn_pipelines.config import FilePath, Section
from medattn_pipelines.convert_source import Published, Source, require_same
from medattn_pipelines.imageconfig import Interpolation, Share

IMAGENET = 1000  # classes, where a checkpoint has no head to count
KNOWN_ALREADY = {
    "name": "it is the option `network`",
    "num_classes": "it is read from the checkpoint",
    "in_channels": "a classifier sees red, green and blue",
}


class Family(Protocol):
    """How published names and forms become ours: a module of `medattn.networks`."""

    def our_names(self, names: Iterable[str], /) -> dict[str, str]:
        """Their names -> ours."""
        ...

    def from_published(self, network: nn.Module, weights: Mapping[str, Tensor], /) -> dict[str, Tensor]:
        """Their weights as the network takes them."""
        ...


@dataclass(frozen=True)
class Release:
    """Networks of one source that are read and used alike.

    patterns: of their names. view: how their publisher evaluates them. assumed: why `view` is a guess, if it
    is one. options: of the networks, that their weights need.
    """

    patterns: tuple[str, ...]
    family: Family
    view: EvaluationTransform
    assumed: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


class ImageOptions(Section):
    """What the weights of an image network do not tell. None: as the source evaluates that network.

    network: one of `medattn networks` that the source publishes. options: further ones of it, by name.
    classes: a class list with as many wnids as the network has outputs; None to number them. image_size: also
    what the network's tables of positions are for, unless `options` has another image_size.
    """

    network: str = ""
    options: dict[str, Any] = Field(default={})
    classes: FilePath | None = None
    image_size: int | None = Field(default=None, ge=1, le=4096)
    crop_ratio: float | None = Field(default=None, gt=0, le=1)
    interpolation: Interpolation | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[Share, Share, Share] | None = None

    @field_validator("options")
    @classmethod
    def _not_known_already(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name in KNOWN_ALREADY.keys() & options.keys():
            raise ValueError(f"{name} cannot be chosen, {KNOWN_ALREADY[name]}; leave it out")
        return options


def _timm(pattern: str, size: int, crop_ratio: float, **options: Any) -> Release:
    view = EvaluationTransform(size, crop_ratio)
    return Release((pattern,), resnet_weights, view, options=options)


BILINEAR = EvaluationTransform(interpolation="bilinear")  # torchvision's, 256 to 224
RELEASES: dict[str, tuple[Release, ...]] = {
    "timm": (  # the numbers of its pretrained_cfg
        _timm("halonet26t", 256, 0.95),
        _timm("halonet50ts", 256, 0.94),
        _timm("eca_halonext26ts", 256, 0.94),
        _timm("halonet_h1", 256, 0.95, **AS_TIMM),
        _timm("lambda_resnet26t", 256, 0.94),
        _timm("lambda_resnet50ts", 256, 0.95),
        _timm("lambda_resnet26rpt_256", 256, 0.94),
        Release(("xcit_*",), xcit, EvaluationTransform(crop_ratio=1.0)),
        Release(
            ("resnet50", "resnet50_d", "se_resnet50"),
            resnet_weights,
            EvaluationTransform(),
            "timm has it of several recipes; their pretrained_cfg have the numbers",
        ),
    ),
    "xcit": (Release(("xcit_*",), xcit, EvaluationTransform(crop_ratio=1.0)),),
    "axial-deeplab": (Release(("axial_resnet*",), axial_resnet, BILINEAR),),
    "lambda-d-li14": (
        Release(
            ("lambda_resnet[0-9][0-9]", "lambda_resnet[0-9][0-9][0-9]"),
            resnet_weights,
            BILINEAR,
            "as ResNets usually are",
        ),
    ),
    "lesa": (Release(("lesa_*",), lesa, BILINEAR, "as Axial-DeepLab's, which it follows"),),
    "focal": (Release(("focal_*",), focal, EvaluationTransform(), "as Swin's usually are"),),
    "eamlp": (Release(("eamlp_*",), eamlp, EvaluationTransform(crop_ratio=0.9), "as T2T-ViT's"),),
}


def write_classifier(
    published: Published, options: ImageOptions, folder: Path, *, source: str
) -> dict[str, str]:
    """A classifier from the state dict of one of RELEASES."""
    release = _release(source, options.network)
    view = _view(release.view, options)
    network_options = {"image_size": view.size} | dict(release.options) | options.options
    theirs = {ours: name for name, ours in release.family.our_names(published.weights).items()}
    head = published.weights.get(theirs.get("head.weight", ""), torch.empty(()))
    # without a head, the comparison says what is wrong
    outputs = head.shape[0] if head.ndim == 2 and len(head) else IMAGENET
    network = create(options.network, num_classes=outputs, **network_options).eval()
    weights = release.family.from_published(network, published.weights)
    fit_weights(network, weights, published.path, name=options.network, theirs=theirs)
    classes = _classes(options.classes, outputs, published.path)
    card = ImageCard(options.network, network_options, classes, view, published.provenance(source))
    save_classifier(folder, card, network.state_dict())
    _run_both(folder, network, view.size)
    chosen = "".join(f", {name}={value}" for name, value in network_options.items())
    parameters = sum(weight.numel() for weight in network.parameters())
    return {
        "network": f"{options.network}, {parameters:,} parameters{chosen}",
        "classes": f"{outputs}, {classes.wnids[0]} to {classes.wnids[-1]}"
        + ("" if options.classes else "; without classes=FILE they are numbered"),
        "view": _described(view, release.assumed, options),
        "checked": "read back; a forward pass gives the output of the checkpoint",
    }


def _release(source: str, network: str) -> Release:
    found = {name: release for release in RELEASES[source] for p in release.patterns for name in names(p)}
    if network not in found:
        given = f"{network!r} is not of {source}" if network else "missing"
        raise InputError(f"option network: {given}, expected one of {', '.join(sorted(found))}")
    return found[network]


def _view(published: EvaluationTransform, options: ImageOptions) -> EvaluationTransform:
    given: dict[str, Any] = {
        "size": options.image_size,
        "crop_ratio": options.crop_ratio,
        "interpolation": options.interpolation,
        "mean": options.mean,
        "std": options.std,
    }
    return replace(published, **{name: value for name, value in given.items() if value is not None})


def _classes(path: Path | None, outputs: int, checkpoint: Path) -> Classes:
    """Those of the list, or numbers of as many digits as keep them in order."""
    if path is None:
        digits = max(4, len(str(outputs - 1)))
        return Classes.of(f"{number:0{digits}}" for number in range(outputs))
    classes = read_classes(path)
    if len(classes) != outputs:
        raise InputError(
            f"{path}: lists {len(classes)} classes, and {checkpoint} has {outputs} outputs; give the list of "
            "the classes that it was trained with"
        )
    return classes


def _described(view: EvaluationTransform, assumed: str, options: ImageOptions) -> str:
    numbers = (" ".join(f"{number:g}" for number in triple) for triple in (view.mean, view.std))
    text = "{0} x {0} pixels, crop ratio {1:g}, {2}, mean {3}, std {4}".format(
        view.size, view.crop_ratio, view.interpolation, *numbers
    )
    left = [n for n in ("image_size", "crop_ratio", "interpolation") if getattr(options, n) is None]
    return f"{text} (assumed: {', '.join(left)}; {assumed})" if assumed and left else text


def _run_both(folder: Path, network: nn.Module, size: int) -> None:
    """The written model and the checkpoint's network on an image; raises where they differ."""
    _, written = load_classifier(folder)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        require_same(written.eval()(image), network(image))


IMAGE_SOURCES = {
    source: Source(ImageOptions, partial(write_classifier, source=source)) for source in RELEASES
}
