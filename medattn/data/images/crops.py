"""Which part of an image is seen: the central one in evaluation, a random one in training."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from PIL import Image

from medattn.data.images.draws import Draws

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom excluded
Interpolation = Literal["bilinear", "bicubic"]

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
ATTEMPTS = 10
LONGEST = 64  # times the shorter side: beyond, only the part that is seen is resized


def drawn_interpolation(
    wanted: Interpolation | Literal["random"], rng: np.random.Generator
) -> Image.Resampling:
    """The filter that is wanted; either of the two where it is "random"."""
    if wanted == "random":
        return tuple(RESAMPLING.values())[int(rng.integers(len(RESAMPLING)))]
    return RESAMPLING[wanted]


def central_crop(image: Image.Image, resize: int, size: int, interpolation: Interpolation) -> Image.Image:
    """The shorter side brought to `resize` pixels, then the central size x size of it, as torchvision rounds.

    An image that is more than 64 times as long as wide is cropped before it is resized: a line of pixels
    would fill the memory. There the result may differ from torchvision's in the last bit.
    """
    width, height = image.size
    short, long = min(width, height), int(resize * max(width, height) / min(width, height))
    new_width, new_height = (resize, long) if width == short else (long, resize)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    if max(width, height) > LONGEST * short:
        x, y = width / new_width, height / new_height
        right, bottom = min(width, (left + size) * x), min(height, (top + size) * y)
        seen = (left * x, top * y, right, bottom)
        return image.resize((size, size), RESAMPLING[interpolation], box=seen)
    resized = image.resize((new_width, new_height), RESAMPLING[interpolation])
    return resized.crop((left, top, left + size, top + size))


def random_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Draws
) -> Box:
    """A box of random area and aspect (Szegedy et al. 2015), distributed as torchvision's.

    scale: range of its area as a share of the image's. ratio: range of width / height, uniform in the
    logarithm. Where ten attempts do not fit, the largest central box whose aspect is in the range.
    """
    for _ in range(ATTEMPTS):
        area = draws.uniform(*scale) * (width * height)
        aspect = math.exp(draws.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws.integers(height - h + 1))
            left = int(draws.integers(width - w + 1))
            return left, top, left + w, top + h
    # a strip one pixel wide has less than one pixel of the demanded height or width
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
