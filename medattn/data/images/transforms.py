"""From a decoded image to the network's input: the fixed way of evaluation and the random way of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from medattn.data.images.crops import RESAMPLING, Interpolation, central_crop, drawn_interpolation, random_box
from medattn.data.images.erasing import RandomErasing
from medattn.data.images.randaugment import RandAugment
from medattn.errors import InputError

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EvaluationTransform:
    """Resize the shorter side, cut out the centre, normalise: to the pixel what timm and torchvision compute.

    size: of the square input in pixels. crop_ratio: the shorter side becomes floor(size / crop_ratio).
    resize: the shorter side itself, where a recipe states it (256 for 224 is the same as a ratio of 0.875).
    """

    size: int = 224
    crop_ratio: float = 0.875
    resize: int | None = None
    interpolation: Interpolation = "bicubic"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def __post_init__(self) -> None:
        require_known(self.interpolation, tuple(RESAMPLING))
        if not 0 < self.crop_ratio <= 1 or (self.resize is not None and self.resize < self.size):
            raise InputError(
                f"evaluation crop: ratio {self.crop_ratio}, resize {self.resize}, size {self.size}; "
                "expected a ratio in (0, 1] and a resize of at least the size"
            )

    def crop(self, image: Image.Image) -> Image.Image:
        """The size x size pixels that the network sees, 8 bits. image: RGB."""
        shorter = self.resize or math.floor(self.size / self.crop_ratio)
        return central_crop(image, shorter, self.size, self.interpolation)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        """[3, size, size] float32. image: RGB. Nothing is random."""
        return torch.from_numpy(normalised(self.crop(image), self.mean, self.std))


@dataclass(frozen=True)
class ColourJitter:
    """Half-widths of the ranges that factors are drawn from, as torchvision's: 0.4 means 0.6 to 1.4.

    hue: a share of the colour circle, at most 0.5. The operations come in random order.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The changed image. image: RGB."""
        widths = (self.brightness, self.contrast, self.saturation)
        factors = [float(rng.uniform(max(0.0, 1 - width), 1 + width)) for width in widths]
        factors.append(float(rng.uniform(-self.hue, self.hue)))
        used = [width > 0 for width in (*widths, self.hue)]
        return jittered(image, factors, [int(n) for n in rng.permutation(4) if used[n]])


@dataclass(frozen=True)
class TrainingTransform:
    """Random resized crop, flip, RandAugment or colour jitter, normalisation, random erasing, in this order.

    size: of the square input in pixels. scale: range of the crop's share of the area. ratio: range of its
    width to height. interpolation "random" chooses for each image. flip: probability of left-right. The parts
    that are None are left out.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation | Literal["random"] = "bicubic"
    flip: float = 0.5
    randaugment: RandAugment | None = None
    jitter: ColourJitter | None = None
    erasing: RandomErasing | None = None
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def __post_init__(self) -> None:
        require_known(self.interpolation, (*RESAMPLING, "random"))

    def crop(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A random part of the image at size x size, perhaps mirrored. image: RGB."""
        part = image.crop(random_box(*image.size, self.scale, self.ratio, rng))
        part = part.resize((self.size, self.size), drawn_interpolation(self.interpolation, rng))
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < self.flip else part

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """[3, size, size] float32. image: RGB."""
        part = self.crop(image, rng)
        if self.randaugment is not None:
            part = self.randaugment(part, rng)
        if self.jitter is not None:
            part = self.jitter(part, rng)
        array = normalised(part, self.mean, self.std)
        if self.erasing is not None:
            self.erasing(array, rng)
        return torch.from_numpy(array)


def normalised(image: Image.Image, mean: Triple, std: Triple) -> npt.NDArray[np.float32]:
    """(pixel / 255 - mean) / std as [3, h, w] float32, rounded as torchvision's two steps round.

    numpy, not torch: a torch operation of this size would start its own threads in each reading thread.
    """
    array = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
    array /= np.float32(255)
    array -= np.array(mean, np.float32)[:, None, None]
    array /= np.array(std, np.float32)[:, None, None]
    return array


def jittered(image: Image.Image, factors: Sequence[float], order: Sequence[int]) -> Image.Image:
    """Brightness (0), contrast (1), saturation (2) and hue (3) changed by `factors` in this order."""
    change = (
        lambda picture: ImageEnhance.Brightness(picture).enhance(factors[0]),
        lambda picture: ImageEnhance.Contrast(picture).enhance(factors[1]),
        lambda picture: ImageEnhance.Color(picture).enhance(factors[2]),
        partial(_turned_hue, share=factors[3]),
    )
    for number in order:
        image = change[number](image)
    return image


def require_known(interpolation: str, known: Sequence[str]) -> None:
    """Raise InputError for an interpolation that is none of `known`."""
    if interpolation not in known:
        raise InputError(f"interpolation {interpolation!r}: not known, expected {' or '.join(known)}")


def _turned_hue(image: Image.Image, share: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(share * 255) % 256)  # the circle has 256 steps and wraps around
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
