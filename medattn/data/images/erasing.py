"""Random erasing: a rectangle of a normalised image is overwritten (Zhong et al., AAAI 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from medattn.data.images.crops import Box
from medattn.data.images.draws import Draws

ATTEMPTS = 10


@dataclass(frozen=True)
class RandomErasing:
    """probability: per image. fill: "pixel" for normal noise per value, "const" for zero, the mean colour.

    area: share of the image that a rectangle may cover. ratio: height to width. Defaults are timm's, which
    the published recipes use.
    """

    probability: float = 0.25
    fill: Literal["pixel", "const"] = "pixel"
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)

    def __call__(self, image: npt.NDArray[np.float32], rng: np.random.Generator) -> None:
        """Erase in place. image: [3, h, w], normalised."""
        if rng.random() >= self.probability:
            return
        box = erased_box(image.shape[2], image.shape[1], self.area, self.ratio, rng)
        if box is None:
            return
        left, top, right, bottom = box
        patch = image[:, top:bottom, left:right]
        patch[...] = rng.standard_normal(patch.shape, dtype=np.float32) if self.fill == "pixel" else 0


def erased_box(
    width: int, height: int, area: tuple[float, float], ratio: tuple[float, float], draws: Draws
) -> Box | None:
    """A rectangle smaller than the image on both sides, or None where ten attempts found none."""
    for _ in range(ATTEMPTS):
        pixels = draws.uniform(*area) * (width * height)
        aspect = math.exp(draws.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if w < width and h < height:
            top = int(draws.integers(height - h + 1))
            left = int(draws.integers(width - w + 1))
            return left, top, left + w, top + h
    return None
