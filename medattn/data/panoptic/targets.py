"""What a panoptic network should say of an image (Cheng et al., Panoptic-DeepLab, CVPR 2020).

Label maps are coded as runs of equal ids along rows: a few thousand per image instead of hundreds of
thousands of pixels. Areas, centres and classes are found for all runs and all segments at once.

Where the paper is silent, two published codes were compared. As both of them: a Gaussian stands on the pixel
nearest to the centre of mass, and crowds keep their class in the semantic targets. As Panoptic-DeepLab in
Detectron2: offsets point to the exact centre; DeepLab2 points to that pixel. As DeepLab2: crowds have no
Gaussian and no weight of small instances; Detectron2 draws them, and what reaches beyond the crowd's pixels
would be learnt as a centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from medattn.errors import InputError
from medattn.panoptic import IGNORED, VOID, Categories, Segment

Floats = npt.NDArray[np.float32]


class TargetArrays(NamedTuple):
    """`PanopticTargets` of one image, as numpy: the same fields and types without the batch axis."""

    semantic: npt.NDArray[np.int64]
    semantic_weight: Floats
    centre: Floats
    centre_weight: Floats
    offset: Floats
    offset_weight: Floats


@dataclass(frozen=True)
class TargetRules:
    """sigma: of a centre's Gaussian in pixels; it ends in a square of 6 sigma + 3.

    small_area: thing instances with fewer pixels in the crop, as it is scaled, have small_weight in the
    semantic loss. stuff_offsets: stuff has a weight in the offset loss, too, where its offsets are 0.
    crowd_semantic: crowds have their class in the semantic targets; else they are IGNORED.
    """

    sigma: float = 8.0
    small_area: int = 4096
    small_weight: float = 3.0
    stuff_offsets: bool = False
    crowd_semantic: bool = True

    def __post_init__(self) -> None:
        if self.sigma <= 0 or self.small_area < 0 or self.small_weight < 0:
            raise InputError(
                f"targets: sigma {self.sigma}, small_area {self.small_area}, small_weight "
                f"{self.small_weight}; expected a sigma above 0 and the others not below 0"
            )


class _Runs(NamedTuple):
    """Pixels of one id in one row, in reading order. [runs] each; value: the segment id."""

    value: npt.NDArray[np.int32]
    row: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]


class _Table(NamedTuple):
    """The segments in the order of their ids, behind VOID, which is the first. [1 + segments] each."""

    id: npt.NDArray[np.int32]
    semantic: npt.NDArray[np.int64]
    thing: npt.NDArray[np.bool_]
    crowd: npt.NDArray[np.bool_]


def empty_targets(height: int, width: int) -> TargetArrays:
    """Arrays to be filled."""
    shapes = ((height, width), (1, height, width), (1, height, width), (2, height, width), (1, height, width))
    return TargetArrays(
        np.empty((height, width), np.int64), *(np.empty(shape, np.float32) for shape in shapes)
    )


def targets(
    ids: npt.NDArray[np.int32],
    segments: Sequence[Segment],
    categories: Categories,
    rules: TargetRules = TargetRules(),
    out: TargetArrays | None = None,
) -> TargetArrays:
    """Targets and weights of one image.

    ids: [h, w], VOID and ids that no segment has are unlabelled: IGNORED, and without weight in the centre
    and offset losses. Instances are the visible pixels of a thing's segment, in one piece or not. out: arrays
    to fill, returned; by default new ones.
    """
    height, width = ids.shape
    out = empty_targets(height, width) if out is None else out
    table, runs = _table(segments, categories), _runs(ids)
    place = np.searchsorted(table.id, runs.value).clip(max=len(table.id) - 1)
    place[table.id[place] != runs.value] = 0

    def sums(weights: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Of whole numbers far below 2^53: exact."""
        return np.bincount(place, weights, len(table.id)).astype(np.float64, copy=False)

    def spread(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[1 + segments] -> [h, w]."""
        return np.repeat(values[place], runs.length).reshape(height, width)

    area = sums(runs.length)
    labelled = np.arange(len(area)) > 0
    instance = table.thing & ~table.crowd & (area > 0)
    semantic = table.semantic if rules.crowd_semantic else np.where(table.crowd, IGNORED, table.semantic)
    out.semantic[...] = spread(semantic)
    small = instance & (area < rules.small_area)
    out.semantic_weight[...] = spread(np.where(small, rules.small_weight, 1).astype(np.float32))
    counted = labelled & ~table.crowd
    out.centre_weight[0] = spread(counted.astype(np.float32))
    out.offset_weight[0] = spread((counted & (table.thing | rules.stuff_offsets)).astype(np.float32))

    seen = np.maximum(area, 1)
    centre_y = sums(runs.length * runs.row) / seen
    centre_x = sums(runs.length * runs.column + runs.length * (runs.length - 1) // 2) / seen
    down = np.where(instance[place], centre_y[place] - runs.row, 0).astype(np.float32)
    out.offset[0] = np.repeat(down, runs.length).reshape(height, width)
    right = (spread(centre_x) - np.arange(width)).astype(np.float32)
    out.offset[1] = 0
    np.copyto(out.offset[1], right, where=spread(instance))
    out.centre[0] = _heat(height, width, centre_y[instance], centre_x[instance], rules.sigma)
    return out


def _runs(ids: npt.NDArray[np.int32]) -> _Runs:
    width = ids.shape[1]
    flat = ids.reshape(-1)
    begins = np.empty(flat.size, bool)
    np.not_equal(flat[1:], flat[:-1], out=begins[1:])
    begins[::width] = True
    starts = np.flatnonzero(begins)
    row, column = np.divmod(starts, width)
    return _Runs(flat[starts], row, column, np.diff(starts, append=flat.size))


def _table(segments: Sequence[Segment], categories: Categories) -> _Table:
    ordered = sorted(segments, key=lambda segment: segment.id)
    index = [categories.index[segment.category] for segment in ordered]
    ids = np.array([VOID, *(segment.id for segment in ordered)], np.int32)
    things = np.append(False, categories.things[index] if index else [])
    crowd = np.array([False, *(segment.crowd for segment in ordered)], bool)
    return _Table(ids, np.array([IGNORED, *index], np.int64), things.astype(bool), crowd)


def _heat(
    height: int,
    width: int,
    centre_y: npt.NDArray[np.float64],
    centre_x: npt.NDArray[np.float64],
    sigma: float,
) -> Floats:
    """[height, width], at each pixel the largest of the Gaussians of all centres, [instances] each."""
    reach = int(3 * sigma) + 1
    span = np.arange(-reach, reach + 1)
    gaussian = np.exp(-(span[:, None] ** 2 + span**2) / (2 * sigma**2)).astype(np.float32)
    y = np.rint(centre_y).astype(np.int64)[:, None, None] + span[:, None]
    x = np.rint(centre_x).astype(np.int64)[:, None, None] + span
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    heat = np.zeros(height * width, np.float32)
    np.maximum.at(heat, (y * width + x)[inside], np.broadcast_to(gaussian, inside.shape)[inside])
    return heat.reshape(height, width)
