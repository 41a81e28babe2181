"""A trained network with all it needs to segment a volume, and the folder it lives in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medattn.data.plan import Plan
from medattn.data.prepare import AIR, prepare_image, prepared_geometry
from medattn.geometry import Array
from medattn.inference.postprocess import keep_largest
from medattn.inference.sliding import Predict, label_map, slide
from medattn.inference.tta import with_flip
from medattn.io import Volume
from medattn.labels import Organ
from medattn.modelfolder import VOLUMES, load_weights, read_card, write_model
from medattn.networks import create
from medattn.networks.registry import family
from medattn.networks.slicewise import SliceWise


@dataclass(frozen=True)
class Settings:
    """How a network is run.

    overlap: share of a tile that its neighbour repeats. flips: average with the left-right mirrored input.
    keep_largest: one connected component per organ. batch_size: tiles at once.
    """

    overlap: float = 0.5
    flips: bool = True
    keep_largest: bool = True
    batch_size: int = 1


@dataclass(frozen=True)
class ModelCard:
    """Everything but the weights.

    labels: voxel value -> organ name of the training data, which predictions use too. organs: by those names,
    what the label set said of them. mirror: organ -> organ under a left-right flip, None for a model that is
    never flipped. provenance: how the model came to be.
    """

    network: str
    spatial_dims: int
    options: Mapping[str, Any]
    plan: Plan
    labels: Mapping[int, str]
    organs: Mapping[str, Organ]
    mirror: tuple[int, ...] | None
    settings: Settings = field(default_factory=Settings)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network with fresh weights: [B, 1, i, j, k] -> [B, 1 + organs, i, j, k] in 2D and 3D alike."""
        options: dict[str, Any] = dict(self.options)
        if family(self.network) == "unet":  # image networks have a published shape; U-Nets follow the plan
            options = {"strides": [s[: self.spatial_dims] for s in self.plan.strides]} | options
        network = create(
            self.network,
            spatial_dims=self.spatial_dims,
            in_channels=1,
            out_channels=1 + len(self.plan.organs),
            **options,
        )
        return SliceWise(network) if self.spatial_dims == 2 else network


class Segmenter:
    """Volumes in, label maps on the volumes' own grids out."""

    def __init__(
        self,
        card: ModelCard,
        network: nn.Module,
        device: torch.device,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.card, self.device, self.precision = card, device, precision
        self.network = network.to(device).eval()

    def segment(self, volume: Volume) -> Array:
        """The label map of a CT volume in HU: uint8 [i, j, k], axes as in the file.

        Values are those of `card.labels`.
        """
        plan, settings = self.card.plan, self.card.settings
        grid, turn = prepared_geometry(volume.geometry, plan.spacing_mm)
        image = prepare_image(volume, plan).to(self.device)
        predict: Predict = self._predict
        if settings.flips and self.card.mirror is not None:
            predict = with_flip(predict, self.card.mirror)
        slabs = slide(
            image,
            predict,
            plan.patch_size,
            classes=1 + len(plan.organs),
            air=AIR,
            overlap=settings.overlap,
            batch_size=settings.batch_size,
        )
        canonical, _ = volume.geometry.canonical()
        channels = label_map(slabs, grid.size[2], canonical.size).numpy()
        if settings.keep_largest:
            channels = keep_largest(channels, range(1, 1 + len(plan.organs)))
        return turn.undo(self._values()[channels])

    def _predict(self, tiles: Tensor) -> Tensor:
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16),
        ):
            logits: Tensor = self.network(tiles)
        return logits

    def _values(self) -> Array:
        """Channel -> voxel value in the training data's labels.json."""
        value_of = {name: value for value, name in self.card.labels.items()}
        return np.array([0, *(value_of[organ] for organ in self.card.plan.organs)], dtype=np.uint8)


def save_model(folder: Path, card: ModelCard, weights: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` and `model.json`."""
    write_model(folder, VOLUMES, asdict(card), weights)


def load_card(folder: Path) -> ModelCard:
    """The card that `save_model` wrote, without the weights. Raises InputError as `load_model` does."""
    return read_card(folder, VOLUMES, _card)


def load_model(folder: Path) -> tuple[ModelCard, nn.Module]:
    """Read what `save_model` wrote. Raises InputError where the folder is no such model or is damaged."""
    card = load_card(folder)
    network = card.build()
    load_weights(folder, network, card.network)
    return card, network


def read_plan(content: Mapping[str, Any]) -> Plan:
    """A Plan from its JSON form."""
    triples = {name: tuple(content[name]) for name in ("organs", "spacing_mm", "patch_size", "window_hu")}
    strides = tuple(tuple(stride) for stride in content["strides"])
    return Plan(**{**content, **triples, "strides": strides})


def _card(content: Mapping[str, Any]) -> ModelCard:
    mirror = content["mirror"]
    typed = {
        "plan": read_plan(content["plan"]),
        "labels": {int(value): str(name) for value, name in content["labels"].items()},
        "organs": {name: _organ(fields) for name, fields in content["organs"].items()},
        "mirror": None if mirror is None else tuple(mirror),
        "settings": Settings(**content["settings"]),
    }
    return ModelCard(**{**content, **typed})


def _organ(fields: Mapping[str, Any]) -> Organ:
    return Organ(**{**fields, "aliases": tuple(fields["aliases"]), "color": tuple(fields["color"])})
