"""Panoptic segmentation as values: categories, segments, and a picture in which every pixel has one segment.

The words are those of the COCO panoptic format (Kirillov et al., CVPR 2019). A category is a thing, whose
instances are told apart, or stuff, whose pixels in an image are one segment. Pixels of no segment are VOID.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from medattn.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

VOID = 0  # the segment id of unlabelled pixels, in every panoptic PNG
IGNORED = -1  # the class index of the same, in maps of class indices
GOLDEN = 0.618033988749895  # of the colour circle: neighbours in a list get hues far apart

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, width, height in pixels


@dataclass(frozen=True)
class Category:
    """A category as the data set numbers it; colour: red, green, blue of 0 to 255."""

    id: int
    name: str
    thing: bool
    colour: Colour


@dataclass(frozen=True)
class Categories:
    """All categories of a data set in the order of its file; a category's place is its class index."""

    members: tuple[Category, ...]

    def __post_init__(self) -> None:
        ids = [category.id for category in self.members]
        if twice := sorted({number for number in ids if ids.count(number) > 1}):
            raise InputError(f"categories: ids {twice} are given twice, expected each once; correct the file")

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Category]:
        return iter(self.members)

    def __getitem__(self, index: int) -> Category:
        return self.members[index]

    @cached_property
    def index(self) -> dict[int, int]:
        """Category id -> class index."""
        return {category.id: number for number, category in enumerate(self.members)}

    @cached_property
    def things(self) -> npt.NDArray[np.bool_]:
        """[classes]: which of them are things."""
        return np.array([category.thing for category in self.members], bool)


@dataclass(frozen=True)
class Segment:
    """A segment of an image. id: its value in the PNG. category: the category's id, not a class index.

    crowd: a region of instances that nobody told apart. area: pixels; box: left, top, width, height; None
    where the file does not say. score: a prediction's confidence, None where it has none.
    """

    id: int
    category: int
    crowd: bool = False
    area: int | None = None
    box: Box | None = None
    score: float | None = None


@dataclass(frozen=True)
class Annotation:
    """The segments of an image. image_id: as the file has it, a number (COCO) or text (Cityscapes).

    file_name: of the PNG, in the folder that belongs to the JSON file.
    """

    image_id: int | str
    file_name: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class ImageRecord:
    """An image as the JSON file lists it; sizes in pixels, None where the file does not say."""

    id: int | str
    file_name: str
    height: int | None = None
    width: int | None = None


class PanopticOutput(NamedTuple):
    """What a panoptic network says of a batch of images (Cheng et al., Panoptic-DeepLab, CVPR 2020).

    semantic: [B, classes, h, w] logits. centre: [B, 1, h, w], near 1 at the centre of mass of an instance.
    offset: [B, 2, h, w] from a pixel to the centre of its instance, down then right, in pixels of the image
    whatever the resolution of the map.
    """

    semantic: Tensor
    centre: Tensor
    offset: Tensor


class PanopticTargets(NamedTuple):
    """What it should say: per pixel of the image, with the weight of the pixel in each loss.

    semantic: [B, h, w] int64 class indices, IGNORED where there is none. centre: [B, 1, h, w] and offset:
    [B, 2, h, w] float32 as in `PanopticOutput`. Weights: semantic [B, h, w], the others [B, 1, h, w] float32.
    """

    semantic: Tensor
    semantic_weight: Tensor
    centre: Tensor
    centre_weight: Tensor
    offset: Tensor
    offset_weight: Tensor


def measure(ids: npt.NDArray[np.int32]) -> dict[int, tuple[int, Box]]:
    """Segment id -> pixels, and the box (left, top, width, height) around them. ids: [h, w]."""
    flat, width = ids.ravel(), ids.shape[1]
    if not flat.size:
        return {}
    change = flat[1:] != flat[:-1]
    change[width - 1 :: width] = True  # a run ends with its row
    starts = np.concatenate(([0], np.flatnonzero(change) + 1))
    lengths = np.diff(starts, append=flat.size)
    values, place = np.unique(flat[starts], return_inverse=True)
    order = place.argsort(kind="stable")
    first = np.searchsorted(place[order], np.arange(len(values)))
    row, column, lengths = starts[order] // width, starts[order] % width, lengths[order]
    left, top = np.minimum.reduceat(column, first), np.minimum.reduceat(row, first)
    right, bottom = np.maximum.reduceat(column + lengths, first), np.maximum.reduceat(row, first) + 1
    boxes = np.stack((left, top, right - left, bottom - top), 1).tolist()
    areas = np.add.reduceat(lengths, first).tolist()
    return {
        value: (area, (x, y, w, h))
        for value, area, (x, y, w, h) in zip(values.tolist(), areas, boxes, strict=True)
    }


def spread_colour(index: int) -> Colour:
    """A colour for a category whose file gives none: hues by the golden section, three levels of lightness.

    >>> spread_colour(0)
    (217, 54, 54)
    """
    value, saturation = (0.85, 0.65, 1.0)[index % 3], (0.75, 0.75, 0.5)[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(index * GOLDEN % 1.0, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)
