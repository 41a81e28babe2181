"""Panoptic quality (Kirillov et al., CVPR 2019), as COCO's evaluator counts it, and the mean IoU of classes.

A predicted and a reference segment of one category match where their IoU is above 0.5, which no segment can
do twice. Pixels that are VOID in the reference leave the union; a crowd of the reference is never missed and
never matched; a prediction without match is no error where more than half of it lies on VOID and on the crowd
of its category. Of several crowds of a category in an image the last that the file lists counts, as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medattn.errors import InputError
from medattn.panoptic import IGNORED, VOID, Categories, Segment

Ids = npt.NDArray[np.integer[Any]]
Counts = npt.NDArray[np.int64]
ID_BITS = 24  # of a segment id: three bytes of colour


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """What images contribute, per class; contributions are summed by `add_up`.

    tp, fp, fn: [C] segments matched, predicted in vain, missed. iou: [C] float64 sum of the IoUs of those
    matched. overlap, union: [C] pixels of the class in both semantic maps and in either, VOID of the
    reference left out; a crowd has its class there.
    """

    tp: Counts
    fp: Counts
    fn: Counts
    iou: npt.NDArray[np.float64]
    overlap: Counts
    union: Counts


@dataclass(frozen=True)
class Quality:
    """Means over the n classes that have any segment, in fractions; None where there is no such class."""

    pq: float | None
    sq: float | None
    rq: float | None
    n: int


def count(
    prediction: Ids,
    predicted: Sequence[Segment],
    reference: Ids,
    expected: Sequence[Segment],
    categories: Categories,
) -> ClassCounts:
    """What one image contributes.

    prediction, reference: [h, w] segment ids, 0 for VOID. predicted, expected: their segments; of these only
    id, category and crowd (of the reference) are read, areas are counted.

    Raises InputError with every problem: shapes that differ, ids without segment, segments without pixels or
    listed twice, unknown categories.
    """
    if prediction.shape != reference.shape or prediction.ndim != 2:
        raise InputError(
            f"prediction of {prediction.shape} and reference of {reference.shape}, expected two maps [h, w] "
            "of one size; predict on the image's own grid"
        )
    pair, pixels = contingency(reference, prediction)
    rows, columns = pair >> ID_BITS, pair & ((1 << ID_BITS) - 1)
    problems = [
        *_problems("reference", rows, expected, categories),
        *_problems("prediction", columns, predicted, categories),
    ]
    if problems:
        raise InputError(*problems)
    # slot 0 is VOID, the others are the segments in their order; every pair of slots occurs once
    table = np.zeros((len(expected) + 1, len(predicted) + 1), np.int64)
    table[_slots(rows, expected), _slots(columns, predicted)] = pixels
    true, said = (_classes(segments, categories) for segments in (expected, predicted))
    return _count(table, true, said, np.array([segment.crowd for segment in expected], bool), len(categories))


def contingency(first: Ids, second: Ids) -> tuple[Counts, Counts]:
    """Pairs of ids that occur at one pixel, as first * 2^24 + second in rising order, and their pixels.

    Runs of equal pairs are found first: pictures have far fewer of them than pixels, and sorting costs most.
    """
    pairs = (first.astype(np.int64) << ID_BITS | second.astype(np.int64)).ravel()
    if not pairs.size:
        return pairs, pairs
    starts = np.concatenate(([0], np.flatnonzero(pairs[1:] != pairs[:-1]) + 1))
    lengths = np.diff(starts, append=pairs.size)
    found, place = np.unique(pairs[starts], return_inverse=True)
    pixels = np.zeros(len(found), np.int64)
    np.add.at(pixels, place, lengths)
    return found, pixels


def add_up(counts: Sequence[ClassCounts]) -> ClassCounts:
    """The contributions of many images; sums of IoUs are rounded once, so no order of images matters.

    Raises InputError where there is none.
    """
    if not counts:
        raise InputError("panoptic quality: no image, expected at least one; give annotations")
    tp, fp, fn, overlap, union = (
        np.sum([getattr(entry, name) for entry in counts], axis=0)
        for name in ("tp", "fp", "fn", "overlap", "union")
    )
    columns = np.stack([entry.iou for entry in counts], 1)
    iou = np.array([math.fsum(row) for row in columns], np.float64)
    return ClassCounts(tp, fp, fn, iou, overlap, union)


def class_quality(counts: ClassCounts) -> list[Quality]:
    """PQ, SQ and RQ of each class, n 1; of a class without any segment None, n 0. SQ without match is 0."""
    return [
        Quality(None, None, None, 0)
        if not tp + fp + fn
        else Quality(
            iou / (tp + 0.5 * fp + 0.5 * fn), iou / tp if tp else 0.0, tp / (tp + 0.5 * fp + 0.5 * fn), 1
        )
        for tp, fp, fn, iou in zip(
            *(values.tolist() for values in (counts.tp, counts.fp, counts.fn, counts.iou)), strict=True
        )
    ]


def mean_quality(classes: Sequence[Quality]) -> Quality:
    """The mean of those classes that have segments."""
    counted = [quality for quality in classes if quality.n]
    if not counted:
        return Quality(None, None, None, 0)
    n = len(counted)
    pq, sq, rq = (math.fsum(getattr(quality, name) for quality in counted) / n for name in ("pq", "sq", "rq"))
    return Quality(pq, sq, rq, n)


def pooled_quality(counts: ClassCounts) -> float | None:
    """PQ with all segments in one pool whatever their class: how one image is ranked. None without any."""
    segments = float(counts.tp.sum() + 0.5 * counts.fp.sum() + 0.5 * counts.fn.sum())
    return float(counts.iou.sum()) / segments if segments else None


def class_iou(counts: ClassCounts) -> list[float | None]:
    """IoU of each class over all pixels; None for a class that neither semantic map has."""
    return [
        overlap / union if union else None
        for overlap, union in zip(counts.overlap.tolist(), counts.union.tolist(), strict=True)
    ]


def mean_iou(counts: ClassCounts) -> float | None:
    """The mean of the classes that either semantic map has, as DeepLab's papers report it."""
    found = [iou for iou in class_iou(counts) if iou is not None]
    return math.fsum(found) / len(found) if found else None


def _count(
    table: Counts, true: Counts, said: Counts, crowd: npt.NDArray[np.bool_], classes: int
) -> ClassCounts:
    """From the pixels [1 + references, 1 + predictions] that segments share, VOID first, and the classes."""
    areas, void = table.sum(0)[1:], table[0, 1:]
    shared = table[1:, 1:]
    union = areas[None] + table.sum(1)[1:, None] - shared - void[None]
    alike = (true[:, None] == said[None]) & ~crowd[:, None]
    ious = np.where(alike, shared / np.maximum(union, 1), 0.0)
    matches = ious > 0.5
    missed = ~matches.any(1) & ~crowd
    crowd_of = dict(zip(true[crowd].tolist(), np.flatnonzero(crowd).tolist(), strict=True))  # the last one
    rows = np.array([crowd_of.get(cls, -1) for cls in said.tolist()], np.int64)
    ignored = void.copy()
    inside = np.flatnonzero(rows >= 0)
    ignored[inside] += shared[rows[inside], inside]
    vain = ~matches.any(0) & (2 * ignored <= areas)
    row, column = np.nonzero(matches)

    semantic = np.where(true[:, None] == said[None], shared, 0).sum(1)
    overlap = _by_class(true, semantic, classes)
    union_pixels = _by_class(true, table[1:].sum(1), classes) + _by_class(said, shared.sum(0), classes)
    return ClassCounts(
        tp=np.bincount(true[row], minlength=classes).astype(np.int64),
        fp=np.bincount(said[vain], minlength=classes).astype(np.int64),
        fn=np.bincount(true[missed], minlength=classes).astype(np.int64),
        iou=np.bincount(true[row], weights=ious[row, column], minlength=classes).astype(np.float64),
        overlap=overlap,
        union=union_pixels - overlap,
    )


def _by_class(classes: Counts, pixels: Counts, n: int) -> Counts:
    found = np.zeros(n, np.int64)
    np.add.at(found, classes, pixels)
    return found


def _classes(segments: Sequence[Segment], categories: Categories) -> Counts:
    return np.array([categories.index[segment.category] for segment in segments], np.int64)


def _slots(ids: Counts, segments: Sequence[Segment]) -> Counts:
    """0 for VOID, else 1 + place among the segments."""
    known = np.array([VOID, *(segment.id for segment in segments)], np.int64)
    order = known.argsort()
    return order[np.searchsorted(known, ids, sorter=order)].astype(np.int64)


def _problems(side: str, found: Counts, segments: Sequence[Segment], categories: Categories) -> list[str]:
    """What keeps a picture and its list of segments from belonging together."""
    ids = [segment.id for segment in segments]
    pixels, listed = set(found.tolist()) - {VOID}, set(ids)
    unknown = {s.category for s in segments if categories.index.get(s.category, IGNORED) == IGNORED}
    return [
        f"{side}: {what} {sorted(which)}, expected none; correct the file"
        for what, which in (
            ("ids in the picture that no segment has", pixels - listed),
            ("segments without any pixel", listed - pixels - {VOID}),
            ("segment ids given twice", {number for number in listed if ids.count(number) > 1}),
            ("segments with the id of VOID", listed & {VOID}),
            ("unknown categories", unknown),
        )
        if which
    ]
