"""The evaluation of a classifier as a value, and its machine-readable forms: metrics.csv and metrics.json."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medattn.data.images.classes import Classes
from medattn.data.images.reading import Skipped
from medattn.metrics.topk import BINS, reliability

SCHEMA = "medattn.image_evaluation/1"
CONFUSIONS = 50  # pairs that metrics.json lists
COLUMNS = ("class", "name", "n", "top1", "top5", "predicted", "precision")


@dataclass(frozen=True)
class ClassScore:
    """One class with images in the reference. index: among all classes.

    n: its images. top1, top5: shares of them. predicted: how many images were called so; precision: the share
    of those that are, None where there is none.
    """

    index: int
    n: int
    top1: float
    top5: float
    predicted: int
    precision: float | None


@dataclass(frozen=True)
class Bin:
    """Images whose confidence is in (low, high]; its mean and their accuracy are None without images."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Confusion:
    """Images of class `true` that were called `predicted`; share: of all images of `true`."""

    true: int
    predicted: int
    n: int
    share: float


@dataclass(frozen=True)
class Real:
    """Share of images whose best class is among their reassessed labels; the n images that have any."""

    top1: float | None
    n: int


@dataclass(frozen=True, eq=False)
class ImageEvaluation:
    """Everything a report says.

    names: [N] images, relative to the reference. target: [N] class indices. best: [N, K] the K most likely
    classes, best first; probability: [N, K] theirs. unreadable: images of the reference that cannot be
    decoded and so have no prediction; they count nowhere.
    """

    prediction: str
    reference: str
    classes: Classes
    names: Sequence[str]
    target: npt.NDArray[np.int64]
    best: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]
    versions: Mapping[str, str]
    unreadable: Sequence[Skipped] = field(default=())
    real: Real | None = None

    @property
    def n(self) -> int:
        """How many images count."""
        return len(self.names)

    @cached_property
    def right(self) -> npt.NDArray[np.bool_]:
        """[N, K]: which of the best classes is the true one."""
        return np.asarray(self.best == self.target[:, None])

    @property
    def top1(self) -> float:
        """Share of images whose best class is theirs."""
        return float(self.right[:, 0].mean())

    @property
    def top5(self) -> float:
        """Share of images whose class is among the best five; all of them where there are no more classes."""
        return float(self.right.any(1).mean())

    @cached_property
    def bins(self) -> list[Bin]:
        """How confidence and accuracy go together."""
        confidence = torch.from_numpy(np.ascontiguousarray(self.probability[:, 0]))
        found = reliability(confidence, torch.from_numpy(self.right[:, 0].astype(np.float64)))
        return [
            Bin(b / BINS, (b + 1) / BINS, int(n), *(None if n == 0 else x / n for x in sums))
            for b, (n, *sums) in enumerate(found.tolist())
        ]

    @property
    def ece(self) -> float:
        """Expected calibration error, as `metrics.topk.calibration_error` where all classes are known."""
        gaps = (
            b.n * abs(b.accuracy - b.confidence)
            for b in self.bins
            if b.accuracy is not None and b.confidence is not None
        )
        return sum(gaps) / self.n

    @cached_property
    def per_class(self) -> list[ClassScore]:
        """Every class that has images, in order."""
        n, called = (np.bincount(x, minlength=len(self.classes)) for x in (self.target, self.best[:, 0]))
        hits, among = (
            np.bincount(self.target[chosen], minlength=len(self.classes))
            for chosen in (self.right[:, 0], self.right.any(1))
        )
        return [
            ClassScore(
                c,
                int(n[c]),
                float(hits[c] / n[c]),
                float(among[c] / n[c]),
                int(called[c]),
                float(hits[c] / called[c]) if called[c] else None,
            )
            for c in np.flatnonzero(n).tolist()
        ]

    @property
    def mean_per_class(self) -> float:
        """Mean of the classes' top-1 accuracies: each class counts once."""
        return float(np.mean([score.top1 for score in self.per_class]))

    @cached_property
    def confusions(self) -> list[Confusion]:
        """Pairs of classes, the most frequent first."""
        wrong = ~self.right[:, 0]
        pairs = Counter(zip(self.target[wrong].tolist(), self.best[wrong, 0].tolist(), strict=True))
        n = np.bincount(self.target, minlength=len(self.classes))
        ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
        return [Confusion(true, said, count, float(count / n[true])) for (true, said), count in ordered]

    @cached_property
    def mistakes(self) -> list[int]:
        """Images whose best class is not theirs, the most confident first."""
        wrong = np.flatnonzero(~self.right[:, 0]).tolist()
        return sorted(wrong, key=lambda i: (-self.probability[i, 0], self.names[i]))


def to_csv(evaluation: ImageEvaluation) -> str:
    """One row per class that has images; a value that does not exist is an empty field."""
    text, classes = io.StringIO(), evaluation.classes
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for score in evaluation.per_class:
        values = (score.n, score.top1, score.top5, score.predicted, score.precision)
        writer.writerow((classes.wnids[score.index], classes.names[score.index], *values))
    return text.getvalue()


def to_json(evaluation: ImageEvaluation) -> str:
    """The whole evaluation but its single images; a value that does not exist is null."""
    wnids = evaluation.classes.wnids
    content = {
        "schema": SCHEMA,
        "prediction": evaluation.prediction,
        "reference": evaluation.reference,
        "n": evaluation.n,
        "n_classes": len(wnids),
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "mean_per_class_top1": evaluation.mean_per_class,
        "ece": evaluation.ece,
        "bins": [asdict(entry) for entry in evaluation.bins],
    }
    if evaluation.real is not None:
        content["real"] = asdict(evaluation.real)
    content |= {
        "per_class": {wnids[score.index]: _class(evaluation, score) for score in evaluation.per_class},
        "confusions": [
            asdict(pair) | {"true": wnids[pair.true], "predicted": wnids[pair.predicted]}
            for pair in evaluation.confusions[:CONFUSIONS]
        ],
        "unreadable": [asdict(image) for image in evaluation.unreadable],
        "versions": dict(evaluation.versions),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _class(evaluation: ImageEvaluation, score: ClassScore) -> dict[str, Any]:
    fields = asdict(score)
    return {"name": evaluation.classes.names[fields.pop("index")]} | fields
