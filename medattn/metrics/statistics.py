"""Paired comparison of two sets of scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import wilcoxon

from medattn.metrics.scores import Score


@dataclass(frozen=True)
class Paired:
    """A metric's difference over the n cases that have a finite value in both sets.

    mean_difference: this minus the baseline. p: two-sided Wilcoxon signed-rank test, uncorrected; None where
    n is 0. All differences zero give p = 1.
    """

    n: int
    mean_difference: float | None = None
    p: float | None = None


def compare(scores: Iterable[Score], baseline: Iterable[Score], metric: str) -> dict[str, Paired]:
    """Organ name -> comparison of a metric, paired by case, for the organs of `scores`."""
    before = {(score.case, score.organ): getattr(score, metric) for score in baseline}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for score in scores:
        both = pairs.setdefault(score.organ, [])
        now, then = getattr(score, metric), before.get((score.case, score.organ))
        if now is not None and then is not None and np.isfinite([now, then]).all():
            both.append((now, then))
    return {organ: _paired(both) for organ, both in pairs.items()}


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's step-down correction (1979) over the values that exist."""
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    corrected: dict[str, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[name] = largest
    return corrected


def _paired(pairs: list[tuple[float, float]]) -> Paired:
    if not pairs:
        return Paired(0)
    differences = np.array([now - then for now, then in pairs])
    ranked = np.round(differences, 12)  # values that differ by their rounding alone are ties
    p = float(wilcoxon(ranked).pvalue) if ranked.any() else 1.0
    return Paired(len(pairs), float(differences.mean()), p)
