"""Average precision of the instances in panoptic pictures: COCO's mask AP, computed by faster-coco-eval.

Crowds are treated as there: a prediction inside one is no error. VOID is nothing special: an instance
predicted on it is one too many. Masks of a panoptic picture never overlap, so a reference made for instances
alone, whose masks do, gives other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medattn.panoptic import Categories, Segment

NOTHING = -1.0  # what COCO's evaluator says of a category without instances


@dataclass(frozen=True)
class Instance:
    """A thing in an image. index: its class. mask: COCO's run-length code. score: 1.0 where it has none."""

    index: int
    area: int
    mask: Mapping[str, Any]
    crowd: bool
    score: float


@dataclass(frozen=True)
class ImageInstances:
    """The instances of both sides in an image of (height, width)."""

    size: tuple[int, int]
    predicted: tuple[Instance, ...]
    expected: tuple[Instance, ...]


@dataclass(frozen=True)
class InstancePrecision:
    """COCO's AP in fractions, None without instances in the reference; per_class: [C], None for stuff.

    ap: mean over IoU 0.50 to 0.95, over 101 recalls, over categories; 100 instances per image and category.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    per_class: tuple[float | None, ...]


def instances(
    ids: npt.NDArray[np.integer[Any]], segments: Sequence[Segment], categories: Categories
) -> tuple[Instance, ...]:
    """The things among an image's segments. ids: [h, w]; every category is known."""
    from faster_coco_eval import mask

    height, width = ids.shape
    columns = ids.T.ravel()  # the code runs down the columns
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    ends = np.append(starts[1:], columns.size)
    order = columns[starts].argsort(kind="stable")
    owners = columns[starts][order]
    found = []
    for segment in segments:
        index = categories.index[segment.category]
        if not categories[index].thing:
            continue
        first, last = (int(owners.searchsorted(segment.id, side)) for side in ("left", "right"))
        mine = order[first:last]
        edges = np.stack((starts[mine], ends[mine]), 1).ravel()
        runs = np.diff(edges, prepend=0, append=columns.size)  # outside, inside, outside, ...
        code = mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
        score = 1.0 if segment.score is None else segment.score
        found.append(Instance(index, int(runs[1::2].sum()), code, segment.crowd, score))
    return tuple(found)


def average_precision(images: Sequence[ImageInstances], categories: Categories) -> InstancePrecision:
    """COCO's mask AP over images; equal scores are ranked in the order of images and of their instances."""
    from faster_coco_eval import COCO, COCOeval_faster

    expected, predicted = _annotations(images, "expected"), _annotations(images, "predicted")
    classes = [n for n, category in enumerate(categories) if category.thing]
    names = [{"id": n + 1, "name": categories[n].name} for n in classes]
    if all(annotation["iscrowd"] for annotation in expected):
        return InstancePrecision(None, None, None, None, None, None, (None,) * len(categories))
    pictures = [
        {"id": n + 1, "height": image.size[0], "width": image.size[1]} for n, image in enumerate(images)
    ]
    reference = COCO({"images": pictures, "categories": names, "annotations": expected})
    evaluator = COCOeval_faster(reference, reference.loadRes(predicted), "segm")
    evaluator.evaluate()
    evaluator.accumulate()
    precision = np.asarray(evaluator.eval["precision"])  # [IoU, recall, category, area, most per image]
    per_class: list[float | None] = [None] * len(categories)
    for place, index in enumerate(classes):
        per_class[index] = _mean(precision[:, :, place, 0, -1])
    small, medium, large = (_mean(precision[:, :, :, size, -1]) for size in (1, 2, 3))
    return InstancePrecision(
        _mean(precision[:, :, :, 0, -1]),
        _mean(precision[0, :, :, 0, -1]),
        _mean(precision[5, :, :, 0, -1]),
        *(small, medium, large),
        per_class=tuple(per_class),
    )


def _mean(precision: npt.NDArray[np.float64]) -> float | None:
    valid = precision[precision > NOTHING]
    return math.fsum(valid.tolist()) / valid.size if valid.size else None


def _annotations(images: Sequence[ImageInstances], side: str) -> list[dict[str, Any]]:
    """As COCO's files have them; ids begin at 1, since its evaluator takes 0 for no match."""
    found: list[dict[str, Any]] = []
    for number, image in enumerate(images):
        for instance in getattr(image, side):
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": number + 1,
                    "category_id": instance.index + 1,
                    "iscrowd": int(instance.crowd),
                    "area": instance.area,
                    "segmentation": instance.mask,
                    "score": instance.score,
                }
            )
    return found
