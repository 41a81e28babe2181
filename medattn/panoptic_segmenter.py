"""A trained panoptic network with all it needs to segment an image, and the folder it lives in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from medattn.data.panoptic.transforms import PanopticView
from medattn.inference.panoptic import PanopticRules
from medattn.modelfolder import PANOPTIC, load_weights, read_card, write_model
from medattn.networks import create
from medattn.panoptic import Categories, Category


@dataclass(frozen=True)
class PanopticCard:
    """Everything but the weights.

    categories: in the order of the semantic outputs. view: what an image goes through before the network.
    rules: how its outputs become segments. scales, flip: the views whose outputs are averaged. provenance:
    how the model came to be.
    """

    network: str
    options: Mapping[str, Any]
    categories: Categories
    view: PanopticView
    rules: PanopticRules
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network with fresh weights: [B, 3, h, w] -> PanopticOutput."""
        return create(self.network, num_classes=len(self.categories), **self.options)


def save_panoptic(folder: Path, card: PanopticCard, weights: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` and `model.json`."""
    write_model(folder, PANOPTIC, asdict(card), weights)


def load_panoptic(folder: Path) -> tuple[PanopticCard, nn.Module]:
    """Read what `save_panoptic` wrote. Raises InputError where there is no such model or it is damaged."""
    card = read_card(folder, PANOPTIC, _card)
    network = card.build()
    load_weights(folder, network, card.network)
    return card, network


def _card(content: Mapping[str, Any]) -> PanopticCard:
    members = (c | {"colour": tuple(c["colour"])} for c in content["categories"]["members"])
    view: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content["view"].items()
    }
    return PanopticCard(
        **{
            **content,
            "categories": Categories(tuple(Category(**member) for member in members)),
            "view": PanopticView(**view),
            "rules": PanopticRules(**content["rules"]),
            "scales": tuple(content["scales"]),
        }
    )
