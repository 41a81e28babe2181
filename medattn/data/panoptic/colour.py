"""The colour changes of DeepLab2's panoptic recipes: no pixel moves, so labels stay as they are.

Its `simple_classification_policy_magnitude_scale_0.2`, a policy found by AutoAugment (Cubuk et al., CVPR
2019) with every magnitude times 0.2. The operations are those of `RandAugment`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from medattn.data.images.randaugment import OPERATIONS, STRONGEST, Setting
from medattn.errors import InputError

# five pairs of (operation, probability, magnitude of 10); one pair is drawn, its operations run in order
POLICY = (
    (("sharpness", 0.4, 7.0), ("brightness", 0.2, 10.0)),
    (("equalize", 0.0, 9.0), ("contrast", 0.2, 10.0)),
    (("sharpness", 0.2, 9.0), ("colour", 0.2, 9.0)),
    (("solarize", 0.2, 7.0), ("equalize", 0.6, 9.0)),
    (("sharpness", 0.2, 1.0), ("equalize", 0.2, 7.0)),
)
UNMOVED = Setting(1, (0, 0, 0), Image.Resampling.NEAREST, increasing=False)


@dataclass(frozen=True)
class ColourPolicy:
    """strength: factor of every magnitude.

    As published, smaller is not milder: a magnitude of 5 leaves brightness, contrast, colour and sharpness
    alone, lower ones take them away, and solarizing inverts more.
    """

    strength: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise InputError(f"colour policy: strength {self.strength}, expected 0 to 1")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The changed image. image: RGB."""
        for name, probability, magnitude in POLICY[int(rng.integers(len(POLICY)))]:
            if rng.random() < probability:
                image = OPERATIONS[name](image, min(STRONGEST, magnitude * self.strength), UNMOVED)
        return image
