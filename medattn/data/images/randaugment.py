"""RandAugment as the published recipes run it: timm's operations, ranges and random magnitudes.

Cubuk et al. (CVPR 2020) apply every chosen operation at one magnitude. DeiT, XCiT and Focal train with timm's
variant `rand-m9-mstd0.5-inc1`: each of two draws happens with probability 0.5, at a magnitude from a normal
distribution, and every operation grows stronger with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from medattn.data.images.crops import Interpolation, drawn_interpolation
from medattn.errors import InputError

STRONGEST = 10.0  # the magnitude at which each range ends
MIDDLE = 128  # grey value: solarize_add brightens what is darker

Colour = tuple[int, int, int]
Coefficients = tuple[float, float, float, float, float, float]
Change = Callable[[Image.Image, float, "Setting"], Image.Image]


@dataclass(frozen=True)
class Setting:
    """What an operation needs beside its magnitude.

    sign: 1 or -1, the direction of what can go two ways. fill: RGB of what comes in from outside.
    increasing: whether more magnitude is a stronger change for all operations, timm's `inc1`.
    """

    sign: int
    fill: Colour
    resampling: Image.Resampling
    increasing: bool


@dataclass(frozen=True)
class RandAugment:
    """count: operations drawn per image, with replacement. probability: that a drawn one is applied.

    magnitude: mean, on a scale from 0 to 10; deviation: its standard deviation. fill: RGB, timm takes the
    mean colour of the normalisation. The defaults are `rand-m9-mstd0.5-inc1`.
    """

    magnitude: float = 9.0
    deviation: float = 0.5
    count: int = 2
    probability: float = 0.5
    increasing: bool = True
    fill: Colour = (124, 116, 104)
    interpolation: Interpolation | Literal["random"] = "bicubic"

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= STRONGEST or self.deviation < 0:
            raise InputError(
                f"RandAugment: magnitude {self.magnitude}, deviation {self.deviation}; expected a magnitude "
                "from 0 to 10 and a deviation of at least 0"
            )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The changed image. image: RGB."""
        for number in rng.integers(len(OPERATIONS), size=self.count):
            magnitude = min(STRONGEST, max(0.0, float(rng.normal(self.magnitude, self.deviation))))
            resampling = drawn_interpolation(self.interpolation, rng)
            sign = 1 if rng.random() < 0.5 else -1
            if rng.random() < self.probability:
                setting = Setting(sign, self.fill, resampling, self.increasing)
                image = tuple(OPERATIONS.values())[number](image, magnitude, setting)
        return image


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Change:
    """Blend with a degenerate image: 1 changes nothing, 0 is degenerate, above 1 exaggerates."""

    def change(image: Image.Image, magnitude: float, setting: Setting) -> Image.Image:
        if setting.increasing:
            factor = max(0.1, 1 + setting.sign * (magnitude / STRONGEST * 0.9))
        else:
            factor = magnitude / STRONGEST * 1.8 + 0.1
        return kind(image).enhance(factor)

    return change


def _sheared(horizontal: bool) -> Change:
    def change(image: Image.Image, magnitude: float, setting: Setting) -> Image.Image:
        slope = setting.sign * (magnitude / STRONGEST * 0.3)
        return _moved(image, (1, slope, 0, 0, 1, 0) if horizontal else (1, 0, 0, slope, 1, 0), setting)

    return change


def _shifted(horizontal: bool) -> Change:
    """By up to 45 % of the side."""

    def change(image: Image.Image, magnitude: float, setting: Setting) -> Image.Image:
        share = setting.sign * (magnitude / STRONGEST * 0.45)
        width, height = image.size
        moved: Coefficients = (
            (1, 0, share * width, 0, 1, 0) if horizontal else (1, 0, 0, 0, 1, share * height)
        )
        return _moved(image, moved, setting)

    return change


def _moved(image: Image.Image, coefficients: Coefficients, setting: Setting) -> Image.Image:
    affine = Image.Transform.AFFINE
    return image.transform(
        image.size, affine, coefficients, resample=setting.resampling, fillcolor=setting.fill
    )


def _rotated(image: Image.Image, magnitude: float, setting: Setting) -> Image.Image:
    degrees = setting.sign * (magnitude / STRONGEST * 30)
    return image.rotate(degrees, resample=setting.resampling, fillcolor=setting.fill)


def _posterized(image: Image.Image, magnitude: float, setting: Setting) -> Image.Image:
    """Keeps 4 to 0 of the upper bits; 0, which is black, at magnitude 10, where Pillow's own refuses."""
    step = int(magnitude / STRONGEST * 4)
    bits = 4 - step if setting.increasing else step
    lost = 2 ** (8 - bits) - 1
    return image.point([value & ~lost for value in range(256)] * 3)


def _solarized(image: Image.Image, magnitude: float, setting: Setting) -> Image.Image:
    level = min(256, int(magnitude / STRONGEST * 256))
    return ImageOps.solarize(image, 256 - level if setting.increasing else level)


def _brightened_shadows(image: Image.Image, magnitude: float, setting: Setting) -> Image.Image:
    added = int(magnitude / STRONGEST * 110)
    table = [min(255, value + added) if value < MIDDLE else value for value in range(256)]
    return image.point(table * 3)


OPERATIONS: dict[str, Change] = {
    "autocontrast": lambda image, magnitude, setting: ImageOps.autocontrast(image),
    "equalize": lambda image, magnitude, setting: ImageOps.equalize(image),
    "invert": lambda image, magnitude, setting: ImageOps.invert(image),
    "rotate": _rotated,
    "posterize": _posterized,
    "solarize": _solarized,
    "solarize_add": _brightened_shadows,
    "colour": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _sheared(horizontal=True),
    "shear_y": _sheared(horizontal=False),
    "translate_x": _shifted(horizontal=True),
    "translate_y": _shifted(horizontal=False),
}
