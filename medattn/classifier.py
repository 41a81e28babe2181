"""A trained image network with all it needs to classify an image, and the folder it lives in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from medattn.data.images.classes import Classes
from medattn.data.images.transforms import EvaluationTransform
from medattn.modelfolder import CLASSIFICATION, load_weights, read_card, write_model
from medattn.networks import create


@dataclass(frozen=True)
class ImageCard:
    """Everything but the weights.

    classes: in the order of the outputs. view: what an image goes through before the network. provenance: how
    the model came to be.
    """

    network: str
    options: Mapping[str, Any]
    classes: Classes
    view: EvaluationTransform
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network with fresh weights: [B, 3, h, w] -> [B, classes]."""
        return create(self.network, num_classes=len(self.classes), **self.options)


def save_classifier(folder: Path, card: ImageCard, weights: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` and `model.json`."""
    write_model(folder, CLASSIFICATION, asdict(card), weights)


def load_classifier(folder: Path) -> tuple[ImageCard, nn.Module]:
    """Read what `save_classifier` wrote. Raises InputError where there is no such model or it is damaged."""
    card = read_card(folder, CLASSIFICATION, _card)
    network = card.build()
    load_weights(folder, network, card.network)
    return card, network


def _card(content: Mapping[str, Any]) -> ImageCard:
    classes = Classes(*(tuple(content["classes"][key]) for key in ("wnids", "names")))
    view: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in content["view"].items()}
    return ImageCard(**{**content, "classes": classes, "view": EvaluationTransform(**view)})
