"""From an image with labels to a network's input and its targets; and the fixed way of evaluation.

Images are resized bilinearly, in Pillow's way with a wider filter where they get smaller, labels take the
nearest pixel; both put pixel centres at half steps, so that they stay aligned. Only the part that is seen is
resized.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from medattn.data.images.draws import Draws
from medattn.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD, ColourJitter, Triple, normalised
from medattn.data.panoptic.colour import ColourPolicy
from medattn.data.panoptic.source import Picture
from medattn.data.panoptic.targets import Floats, TargetArrays, TargetRules, empty_targets, targets
from medattn.errors import InputError
from medattn.panoptic import VOID, Categories

STRIDE = 16  # inputs are best one pixel larger than a multiple: grids of all strides then share their corners

Size = tuple[int, int]  # height, width


class Sample(NamedTuple):
    """What a network sees of an image, [3, h, w] float32, and what it should say."""

    image: Floats
    targets: TargetArrays


class Crop(NamedTuple):
    """A part of a picture, perhaps smaller than the network's input, in which it lies at `top`, `left`."""

    image: Image.Image
    ids: npt.NDArray[np.int32]
    top: int
    left: int


@dataclass(frozen=True)
class PanopticTransform:
    """Scale, crop, flip, change colours, normalise.

    size: height and width of the result, or both. longest: the longer side is brought to this before the
    factor applies; None: the factor applies to the image as it is. scale: range of the factor; step: distance
    of the factors that are drawn from it, 0 for any. flip: probability of left-right. Where the image is
    smaller than `size` it is placed at random, as in DeepLab2, in the mean colour and VOID.
    """

    size: int | Size = 641
    scale: tuple[float, float] = (0.5, 1.5)
    step: float = 0.1
    longest: int | None = None
    flip: float = 0.5
    policy: ColourPolicy | None = None
    jitter: ColourJitter | None = None
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    rules: TargetRules = field(default_factory=TargetRules)

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high or self.step < 0 or not 0 <= self.flip <= 1:
            raise InputError(
                f"panoptic transform: scale {self.scale}, step {self.step}, flip {self.flip}; expected a "
                "range above 0, a step of at least 0 and a probability; correct the augmentation"
            )
        if min(self.shape) < 1 or (self.longest is not None and self.longest < 1):
            raise InputError(
                f"panoptic transform: size {self.size}, longest {self.longest}; expected at least 1 pixel"
            )

    @property
    def shape(self) -> Size:
        """Height and width of the result."""
        return _pair(self.size)

    def factor(self, draws: Draws) -> float:
        """A factor by which a picture is enlarged."""
        low, high = self.scale
        if self.step == 0 or low == high:
            return float(draws.uniform(low, high))
        return low + self.step * int(draws.integers(int((high - low) / self.step + 1e-6) + 1))

    def crop(self, picture: Picture, rng: np.random.Generator) -> Crop:
        """A random part of a picture at the size at which the network sees it, colours as they were."""
        height, width = picture.ids.shape
        factor = self.factor(rng) * (1 if self.longest is None else self.longest / max(height, width))
        scaled = _scaled((height, width), factor)
        (y, top, rows), (x, left, columns) = (
            _window(*pair, rng) for pair in zip(scaled, self.shape, strict=True)
        )
        image = _resized(picture.image, scaled, (y, x, rows, columns))
        ids = _nearest(picture.ids, scaled, (y, x, rows, columns))
        if rng.random() < self.flip:
            image, ids = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), ids[:, ::-1]
        return Crop(image, ids, top, left)

    def __call__(
        self, picture: Picture, categories: Categories, rng: np.random.Generator, out: Sample | None = None
    ) -> Sample:
        """The network's input and targets. out: arrays to fill, returned; by default new ones."""
        height, width = self.shape
        if out is None:
            out = Sample(np.empty((3, height, width), np.float32), empty_targets(height, width))
        part = self.crop(picture, rng)
        image = part.image
        if self.policy is not None:
            image = self.policy(image, rng)
        if self.jitter is not None:
            image = self.jitter(image, rng)
        rows, columns = slice(part.top, part.top + image.height), slice(part.left, part.left + image.width)
        out.image[...] = 0  # normalised, the mean colour
        out.image[:, rows, columns] = normalised(image, self.mean, self.std)
        ids = np.full((height, width), VOID, np.int32)
        ids[rows, columns] = part.ids
        targets(ids, picture.segments, categories, self.rules, out.targets)
        return out


class Viewed(NamedTuple):
    """An image as a network sees it. image: [3, h, w] float32. seen: its upper left part that is the picture;
    the rest is the mean colour. original: height and width of the picture as it was read.
    """

    image: Tensor
    seen: Size
    original: Size

    def restored(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """[h, w] ids of the network's input, each pixel of the original the nearest: [original]."""
        seen = ids[: self.seen[0], : self.seen[1]]
        return _nearest(seen, self.original, (0, 0, *self.original))


@dataclass(frozen=True)
class PanopticView:
    """Resize, pad right and below, normalise. Nothing is random.

    longest: the longer side is at most this. shortest: the shorter side is brought to this where the longer
    one allows it. enlarge: smaller images are enlarged, as for the published scores. size: the padded height
    and width, in which the image is made to fit; None pads each side to the next multiple of 16 plus 1.
    """

    longest: int = 641
    shortest: int | None = None
    enlarge: bool = False
    size: int | Size | None = None
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def __post_init__(self) -> None:
        shortest = self.longest if self.shortest is None else self.shortest
        if not 1 <= shortest <= self.longest:
            raise InputError(
                f"panoptic view: shorter side {shortest}, longer side {self.longest}; expected at least 1 "
                "pixel, and the shorter not above the longer"
            )
        if self.size is not None and min(_pair(self.size)) < 1:
            raise InputError(f"panoptic view: size {self.size}, expected at least 1 pixel; enlarge it")

    def seen(self, height: int, width: int) -> Size:
        """Height and width at which an image of this size is seen."""
        factor = self.longest / max(height, width)
        if self.shortest is not None:
            factor = min(factor, self.shortest / min(height, width))
        if self.size is not None:
            limits = _pair(self.size)
            factor = min(factor, limits[0] / height, limits[1] / width)
        return _scaled((height, width), factor if self.enlarge else min(1.0, factor))

    def __call__(self, image: Image.Image) -> Viewed:
        """The network's input. image: RGB."""
        seen = self.seen(image.height, image.width)
        height, width = _padded(*seen) if self.size is None else _pair(self.size)
        resized = _resized(image, seen, (0, 0, *seen))
        array = np.zeros((3, height, width), np.float32)
        array[:, : seen[0], : seen[1]] = normalised(resized, self.mean, self.std)
        return Viewed(torch.from_numpy(array), seen, (image.height, image.width))


def _pair(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else size


def _padded(height: int, width: int) -> Size:
    return height + (1 - height) % STRIDE, width + (1 - width) % STRIDE


def _scaled(size: Size, factor: float) -> Size:
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _window(length: int, wanted: int, draws: Draws) -> tuple[int, int, int]:
    """Along one axis: first pixel of `length` that is seen, where of `wanted` it is put, and how many are."""
    if length >= wanted:
        return int(draws.integers(length - wanted + 1)), 0, wanted
    return 0, int(draws.integers(wanted - length + 1)), length


def _resized(image: Image.Image, scaled: Size, window: tuple[int, int, int, int]) -> Image.Image:
    """The window (top, left, height, width) of the image as it would be at height and width `scaled`."""
    top, left, height, width = window
    y, x = image.height / scaled[0], image.width / scaled[1]
    box = (left * x, top * y, min(image.width, (left + width) * x), min(image.height, (top + height) * y))
    return image.resize((width, height), Image.Resampling.BILINEAR, box)


def _nearest(
    ids: npt.NDArray[np.int32], scaled: Size, window: tuple[int, int, int, int]
) -> npt.NDArray[np.int32]:
    """The same window of labels, at each pixel that of the nearest pixel."""
    top, left, height, width = window
    y = ((np.arange(top, top + height) * 2 + 1) * ids.shape[0]) // (2 * scaled[0])
    x = ((np.arange(left, left + width) * 2 + 1) * ids.shape[1]) // (2 * scaled[1])
    part: npt.NDArray[np.int32] = ids[y[:, None], x]
    return part
