"""Scores of a case, organ by organ, and their summary over cases."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from scipy import ndimage

from medattn.data.cases import State
from medattn.geometry import Array
from medattn.labels import Organ
from medattn.metrics.overlap import dice
from medattn.metrics.surface import surface_distances

METRICS = ("dice", "surface_dice", "hd95_mm", "assd_mm")
LARGER_IS_BETTER = frozenset({"dice", "surface_dice"})


@dataclass(frozen=True)
class Score:
    """One organ in one case.

    Metrics are None where nobody contoured the organ; surface_dice also where no tolerance is known.
    Distances are infinite where exactly one of the two masks is empty. reference_volume_ml is None where
    nobody contoured the organ: the label map then holds nothing that would be a measurement.
    """

    case: str
    organ: str
    state: State
    dice: float | None
    surface_dice: float | None
    tolerance_mm: float | None
    hd95_mm: float | None
    assd_mm: float | None
    volume_ml: float
    reference_volume_ml: float | None

    @property
    def missed(self) -> bool:
        """The organ is there and nothing was predicted."""
        return self.state is State.PRESENT and self.volume_ml == 0

    @property
    def false(self) -> bool:
        """The annotator looked and found none, yet something was predicted."""
        return self.state is State.EMPTY and self.volume_ml > 0


@dataclass(frozen=True)
class Statistic:
    """A metric over cases: `n` finite values, their mean, median, sample standard deviation and worst.

    All are None without a finite value; sd is None below two. worst_case is the case of the worst value.
    """

    n: int
    mean: float | None = None
    median: float | None = None
    sd: float | None = None
    worst: float | None = None
    worst_case: str | None = None


@dataclass(frozen=True)
class OrganSummary:
    """One organ over all cases.

    n: cases in which someone contoured it (n_present with voxels, n_empty without). n_missed: present, but
    nothing predicted. n_false: contoured and empty, but predicted. n_not_contoured: left out of every metric.
    metrics: a Statistic for each name in METRICS. worst_case: the case with the lowest Dice.
    """

    organ: str
    n: int
    n_present: int
    n_empty: int
    n_missed: int
    n_false: int
    n_not_contoured: int
    tolerance_mm: float | None
    metrics: Mapping[str, Statistic]

    @property
    def worst_case(self) -> str | None:
        """The case with the lowest Dice."""
        return self.metrics["dice"].worst_case


def score_case(
    case: str,
    prediction: Array,
    reference: Array,
    spacing_mm: Sequence[float],
    *,
    prediction_organs: Mapping[int, Organ],
    reference_organs: Mapping[int, Organ],
    contoured: Collection[str] | None = None,
) -> list[Score]:
    """Scores of every organ that both label maps can hold, in the reference's order.

    prediction, reference: integer label maps [I, J, K] on one grid. The organs map voxel values to organs and
    are matched by `Organ.name`, whatever the values. contoured: names of organs that someone drew in this
    case, None for all; an organ that nobody drew is returned without metrics.
    """
    value_of = {organ.name: value for value, organ in prediction_organs.items()}
    boxes = _boxes(prediction), _boxes(reference)
    scores = []
    for value, organ in reference_organs.items():
        if organ.name not in value_of:
            continue
        drawn = contoured is None or organ.name in contoured
        box = _union(boxes[0].get(value_of[organ.name]), boxes[1].get(value) if drawn else None)
        predicted = prediction[box] == value_of[organ.name]
        scores.append(_score(case, organ, predicted, reference[box] == value if drawn else None, spacing_mm))
    return scores


def summarise(scores: Iterable[Score]) -> dict[str, OrganSummary]:
    """Organ name -> its summary, in the order in which organs first appear."""
    scores = list(scores)
    order = {organ: n for n, organ in enumerate(dict.fromkeys(score.organ for score in scores))}
    scores.sort(key=lambda score: order[score.organ])
    return {
        organ: _summarise_organ(organ, list(group))
        for organ, group in groupby(scores, lambda score: score.organ)
    }


def mean_over_organs(summary: Mapping[str, OrganSummary], metric: str) -> Statistic:
    """Every organ counts once: statistics of the organs' means; `worst_case` then names the worst organ."""
    means = {organ: summary[organ].metrics[metric].mean for organ in summary}
    return _statistic(metric, means)


def _score(
    case: str, organ: Organ, predicted: Array, drawn: Array | None, spacing_mm: Sequence[float]
) -> Score:
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    volume_ml = int(np.count_nonzero(predicted)) * voxel_ml
    if drawn is None:
        return Score(
            case, organ.name, State.NOT_CONTOURED, None, None, organ.tolerance_mm, None, None, volume_ml, None
        )
    surfaces = surface_distances(predicted, drawn, spacing_mm)
    return Score(
        case=case,
        organ=organ.name,
        state=State.PRESENT if drawn.any() else State.EMPTY,
        dice=dice(predicted, drawn),
        surface_dice=None if organ.tolerance_mm is None else surfaces.surface_dice(organ.tolerance_mm),
        tolerance_mm=organ.tolerance_mm,
        hd95_mm=surfaces.hausdorff_mm(95),
        assd_mm=surfaces.average_mm(),
        volume_ml=volume_ml,
        reference_volume_ml=int(np.count_nonzero(drawn)) * voxel_ml,
    )


def _summarise_organ(organ: str, scores: list[Score]) -> OrganSummary:
    scored = [score for score in scores if score.state is not State.NOT_CONTOURED]
    return OrganSummary(
        organ=organ,
        n=len(scored),
        n_present=sum(score.state is State.PRESENT for score in scored),
        n_empty=sum(score.state is State.EMPTY for score in scored),
        n_missed=sum(score.missed for score in scored),
        n_false=sum(score.false for score in scored),
        n_not_contoured=len(scores) - len(scored),
        tolerance_mm=scores[0].tolerance_mm,
        metrics={
            metric: _statistic(metric, {score.case: getattr(score, metric) for score in scored})
            for metric in METRICS
        },
    )


def _statistic(metric: str, values: Mapping[str, float | None]) -> Statistic:
    finite = {name: value for name, value in values.items() if value is not None and np.isfinite(value)}
    if not finite:
        return Statistic(0)
    array = np.array(list(finite.values()))
    worst = (min if metric in LARGER_IS_BETTER else max)(finite, key=finite.__getitem__)
    return Statistic(
        n=len(array),
        mean=float(array.mean()),
        median=float(np.median(array)),
        sd=float(array.std(ddof=1)) if len(array) > 1 else None,
        worst=finite[worst],
        worst_case=worst,
    )


def _boxes(label: Array) -> dict[int, tuple[slice, ...]]:
    return {value: box for value, box in enumerate(ndimage.find_objects(label), start=1) if box}


def _union(*boxes: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """The smallest box around those that exist; without any, an empty one."""
    there = [box for box in boxes if box is not None]
    if not there:
        return (slice(0, 0),) * 3
    return tuple(
        slice(min(axis.start for axis in axes), max(axis.stop for axis in axes))
        for axes in zip(*there, strict=True)
    )
