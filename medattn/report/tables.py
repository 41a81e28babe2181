"""An evaluation as a value, and its two machine-readable forms: metrics.csv and metrics.json."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from medattn.data.cases import State
from medattn.labels import Organ
from medattn.metrics.scores import METRICS, OrganSummary, Score, mean_over_organs
from medattn.metrics.statistics import Paired, holm

SCHEMA = "medattn.evaluation/1"
COLUMNS = (
    *("case", "organ", "state", "dice", "surface_dice", "tolerance_mm", "hd95_mm", "assd_mm"),
    *("volume_ml", "reference_volume_ml", "note"),
)


@dataclass(frozen=True)
class SideFinding:
    """A sentence of the side check. source: "prediction" or "reference"."""

    case: str
    source: str
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """Paired differences against a baseline: metric -> organ -> result."""

    baseline: str
    metrics: Mapping[str, Mapping[str, Paired]]


@dataclass(frozen=True)
class Evaluation:
    """Everything a report says.

    organs: the compared ones by standard name. without_prediction: reference cases that nobody predicted, by
    their split. only_reference, only_prediction: organs of one side alone, which are not scored.
    """

    prediction: str
    reference: str
    label_set: str
    scores: Sequence[Score]
    summary: Mapping[str, OrganSummary]
    organs: Mapping[str, Organ]
    side_findings: Sequence[SideFinding]
    without_prediction: Mapping[str, Sequence[str]]
    only_reference: Sequence[str]
    only_prediction: Sequence[str]
    versions: Mapping[str, str]
    comparison: Comparison | None = None
    notes: Sequence[str] = field(default=())

    @property
    def cases(self) -> tuple[str, ...]:
        """The scored cases, in order."""
        return tuple(dict.fromkeys(score.case for score in self.scores))

    @property
    def counts(self) -> dict[str, int]:
        """Cases, and organs in cases by what happened to them."""
        return {
            "cases": len(self.cases),
            "references_without_prediction": sum(map(len, self.without_prediction.values())),
            "organs": len(self.summary),
            "scored": sum(organ.n for organ in self.summary.values()),
            "not_contoured": sum(organ.n_not_contoured for organ in self.summary.values()),
            "missed": sum(organ.n_missed for organ in self.summary.values()),
            "false": sum(organ.n_false for organ in self.summary.values()),
            "side_findings": len(self.side_findings),
        }


def worst_scores(evaluation: Evaluation) -> list[Score]:
    """For each organ its score of the lowest Dice, the lowest of all first."""
    worst: dict[str, Score] = {}
    for score in evaluation.scores:
        known = worst.get(score.organ)
        if score.dice is not None and (known is None or known.dice is None or score.dice < known.dice):
            worst[score.organ] = score
    return sorted(worst.values(), key=lambda score: score.dice or 0.0)


def note(score: Score) -> str:
    """Why a score lacks values, in words; empty where it has them all."""
    if score.state is State.NOT_CONTOURED:
        return "not contoured"
    reasons = ["no tolerance known"] if score.tolerance_mm is None else []
    if score.missed:
        reasons.append("missed: nothing predicted, no distance")
    if score.false:
        reasons.append("false: the organ is absent, no distance")
    return "; ".join(reasons)


def to_csv(evaluation: Evaluation) -> str:
    """One row per case and organ; a value that does not exist is an empty field, explained in `note`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for score in evaluation.scores:
        writer.writerow({"case": score.case, "organ": score.organ, **_row(score)})
    return text.getvalue()


def to_json(evaluation: Evaluation) -> str:
    """The whole evaluation; a value that does not exist is null, explained in `note`."""
    per_case: dict[str, dict[str, Any]] = {}
    for score in evaluation.scores:
        per_case.setdefault(score.case, {})[score.organ] = _row(score)
    content = {
        "schema": SCHEMA,
        "prediction": evaluation.prediction,
        "reference": evaluation.reference,
        "label_set": evaluation.label_set,
        "mean": {metric: _mean(evaluation, metric) for metric in METRICS},
        "per_organ": {organ: _organ(evaluation, organ) for organ in evaluation.summary},
        "per_case": per_case,
        "counts": evaluation.counts,
        "side_findings": [asdict(finding) for finding in evaluation.side_findings],
        "without_prediction": {split: list(cases) for split, cases in evaluation.without_prediction.items()},
        "organs_not_compared": {
            "only_reference": list(evaluation.only_reference),
            "only_prediction": list(evaluation.only_prediction),
        },
        "comparison": _comparison(evaluation.comparison),
        "notes": list(evaluation.notes),
        "versions": dict(evaluation.versions),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _row(score: Score) -> dict[str, Any]:
    fields = asdict(score) | {"state": score.state.value, "note": note(score)}
    return {name: _finite(fields[name]) for name in COLUMNS if name not in ("case", "organ")}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(evaluation: Evaluation, metric: str) -> dict[str, Any]:
    """The mean of the organs' means, with how many organs, cases and single values stand behind it."""
    over_organs = mean_over_organs(evaluation.summary, metric)
    values = [
        (score.case, getattr(score, metric))
        for score in evaluation.scores
        if _finite(getattr(score, metric)) is not None
    ]
    return {
        "mean": over_organs.mean,
        "n_organs": over_organs.n,
        "n_cases": len({case for case, _ in values}),
        "n_values": len(values),
        "worst_organ": over_organs.worst_case,
    }


def _organ(evaluation: Evaluation, name: str) -> dict[str, Any]:
    summary, organ = evaluation.summary[name], evaluation.organs[name]
    fields = asdict(summary)
    metrics: dict[str, Any] = fields.pop("metrics")
    del fields["organ"]
    return fields | {"tolerance_source": organ.tolerance_source} | metrics


def _comparison(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None:
        return None
    metrics = {}
    for metric, organs in comparison.metrics.items():
        corrected = holm({organ: paired.p for organ, paired in organs.items()})
        metrics[metric] = {
            organ: asdict(paired) | {"p_holm": corrected[organ]} for organ, paired in organs.items()
        }
    return {"baseline": comparison.baseline, "metrics": metrics}
