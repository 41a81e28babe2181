"""The evaluation of panoptic predictions as a value, and as metrics.csv and metrics.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from medattn.metrics.instance_precision import InstancePrecision
from medattn.metrics.panoptic_quality import (
    ClassCounts,
    Quality,
    add_up,
    class_iou,
    class_quality,
    mean_iou,
    mean_quality,
    pooled_quality,
)
from medattn.panoptic import Categories, Category

SCHEMA = "medattn.panoptic_evaluation/1"
COLUMNS = (
    *("category_id", "name", "isthing", "pq", "sq", "rq", "tp", "fp", "fn", "iou_sum"),
    *("semantic_iou", "ap"),
)


@dataclass(frozen=True)
class ClassScore:
    """One class. tp, fp, fn: segments; iou_sum: of those matched.

    semantic_iou: of its pixels, None without any. ap: of its instances; None for stuff and for things without
    instances in the reference.
    """

    category: Category
    quality: Quality
    tp: int
    fp: int
    fn: int
    iou_sum: float
    semantic_iou: float | None
    ap: float | None


@dataclass(frozen=True)
class ImageScore:
    """One image. pq: over its segments in one pool whatever their class; None without any segment."""

    image_id: int | str
    file_name: str
    pq: float | None
    tp: int
    fp: int
    fn: int


@dataclass(frozen=True, eq=False)
class PanopticEvaluation:
    """Everything a report says.

    images: (image id, file name of the PNG) of the reference, in its order; counts: what each contributes.
    instances: how many predicted things there are, unscored: how many of these have no score of their own.
    notes: what a reader has to know, in sentences.
    """

    prediction: str
    reference: str
    categories: Categories
    images: Sequence[tuple[int | str, str]]
    counts: Sequence[ClassCounts]
    precision: InstancePrecision
    instances: int
    unscored: int
    versions: Mapping[str, str]
    notes: Sequence[str] = ()

    @cached_property
    def total(self) -> ClassCounts:
        """Over all images."""
        return add_up(self.counts)

    @cached_property
    def per_class(self) -> list[ClassScore]:
        """Every class of the data set, in its order, also those without any segment."""
        total = self.total
        rows = zip(
            self.categories,
            class_quality(total),
            *(values.tolist() for values in (total.tp, total.fp, total.fn, total.iou)),
            class_iou(total),
            self.precision.per_class,
            strict=True,
        )
        return [ClassScore(*row) for row in rows]

    @cached_property
    def all(self) -> Quality:
        """The mean over classes that have segments."""
        return mean_quality([score.quality for score in self.per_class])

    @cached_property
    def things(self) -> Quality:
        """The same over things."""
        return mean_quality([score.quality for score in self.per_class if score.category.thing])

    @cached_property
    def stuff(self) -> Quality:
        """The same over stuff."""
        return mean_quality([score.quality for score in self.per_class if not score.category.thing])

    @property
    def miou(self) -> float | None:
        """Mean IoU of the semantic maps that the segments make."""
        return mean_iou(self.total)

    @cached_property
    def per_image(self) -> list[ImageScore]:
        """In the reference's order."""
        return [
            ImageScore(
                image_id,
                name,
                pooled_quality(counts),
                *(int(values.sum()) for values in (counts.tp, counts.fp, counts.fn)),
            )
            for (image_id, name), counts in zip(self.images, self.counts, strict=True)
        ]

    @cached_property
    def worst(self) -> list[int]:
        """Places of the images that have segments, the lowest PQ first."""
        scored = [(score.pq, place) for place, score in enumerate(self.per_image) if score.pq is not None]
        return [place for _, place in sorted(scored)]


def to_csv(evaluation: PanopticEvaluation) -> str:
    """One row per class; a value that does not exist is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for score in evaluation.per_class:
        category, quality = score.category, score.quality
        writer.writerow(
            (
                *(category.id, category.name, int(category.thing), quality.pq, quality.sq, quality.rq),
                *(score.tp, score.fp, score.fn, score.iou_sum, score.semantic_iou, score.ap),
            )
        )
    return text.getvalue()


def to_json(evaluation: PanopticEvaluation) -> str:
    """The whole evaluation in full precision; a value that does not exist is null.

    In `per_class`, by category id, classes without any segment have 0 as in panopticapi's result, and n 0:
    they are in no mean.
    """
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "prediction": evaluation.prediction,
        "reference": evaluation.reference,
        "images": len(evaluation.images),
        "all": asdict(evaluation.all),
        "things": asdict(evaluation.things),
        "stuff": asdict(evaluation.stuff),
        "miou": evaluation.miou,
    }
    content |= {name: value for name, value in asdict(evaluation.precision).items() if name != "per_class"}
    content |= {
        "instances": evaluation.instances,
        "instances_without_score": evaluation.unscored,
        "per_class": {str(score.category.id): _class(score) for score in evaluation.per_class},
        "per_image": [asdict(score) for score in evaluation.per_image],
        "notes": list(evaluation.notes),
        "versions": dict(evaluation.versions),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _class(score: ClassScore) -> dict[str, Any]:
    quality = score.quality
    return {
        "name": score.category.name,
        "isthing": int(score.category.thing),
        "pq": quality.pq or 0.0,
        "sq": quality.sq or 0.0,
        "rq": quality.rq or 0.0,
        "n": quality.n,
        "tp": score.tp,
        "fp": score.fp,
        "fn": score.fn,
        "iou_sum": score.iou_sum,
        "semantic_iou": score.semantic_iou,
        "ap": score.ap,
    }
