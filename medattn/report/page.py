"""The HTML report: one file that needs nothing else, on screen and in print, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from medattn.metrics.scores import METRICS, mean_over_organs
from medattn.metrics.statistics import holm
from medattn.report.figures import Overlay, box_plots
from medattn.report.tables import Evaluation

TEMPLATES = Path(__file__).parent / "templates"
TITLES = {
    "dice": "Dice",
    "surface_dice": "Surface Dice",
    "hd95_mm": "95 % Hausdorff distance, mm",
    "assd_mm": "Average surface distance, mm",
}
SHORT = {"dice": "Dice", "surface_dice": "Surface Dice", "hd95_mm": "HD95, mm", "assd_mm": "ASSD, mm"}


@dataclass(frozen=True)
class Cell:
    """A number as shown and as sorted; `key` is empty where there is none."""

    text: str
    key: str = ""


def render(evaluation: Evaluation, overlays: Sequence[Overlay]) -> str:
    """The report as HTML text without any reference to another file or address."""
    return template("report.html.j2").render(
        evaluation=evaluation,
        counts=evaluation.counts,
        metrics=METRICS,
        titles=TITLES,
        short=SHORT,
        means={metric: mean_over_organs(evaluation.summary, metric) for metric in METRICS},
        boxes=Markup(_boxes(evaluation)),
        overlays=overlays,
        comparison=_comparison(evaluation),
        tolerances=_tolerances(evaluation),
    )


def template(name: str) -> Template:
    """A page's template; what it fills in is escaped, and a misspelt variable is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(number=number, cell=cell)
    return environment.get_template(name)


def number(value: float | None, metric: str = "dice") -> str:
    """A value with the digits its metric deserves: fractions three, millimetres two; a dash for none."""
    if value is None:
        return "–"
    return f"{value:.2f}" if metric.endswith("_mm") else f"{value:.3f}"


def cell(value: float | None, metric: str = "dice") -> Cell:
    """A table cell for a value that may be missing."""
    return Cell("–") if value is None else Cell(number(value, metric), repr(float(value)))


def _boxes(evaluation: Evaluation) -> str:
    shown = [metric for metric in ("dice", "surface_dice", "hd95_mm") if _has_values(evaluation, metric)]
    values: dict[str, list[list[float]]] = {
        metric: [_finite(evaluation, organ, metric) for organ in evaluation.summary] for metric in shown
    }
    return box_plots(list(evaluation.summary), [(SHORT[metric], values[metric]) for metric in shown])


def _has_values(evaluation: Evaluation, metric: str) -> bool:
    return metric == "dice" or any(organ.metrics[metric].n for organ in evaluation.summary.values())


def _finite(evaluation: Evaluation, organ: str, metric: str) -> list[float]:
    values = (getattr(score, metric) for score in evaluation.scores if score.organ == organ)
    return [value for value in values if value is not None and value != float("inf")]


def _comparison(evaluation: Evaluation) -> list[tuple[str, list[dict[str, Any]]]]:
    """Per organ the cells of each metric's paired difference."""
    if evaluation.comparison is None:
        return []
    metrics = evaluation.comparison.metrics
    corrected = {
        metric: holm({organ: paired.p for organ, paired in organs.items()})
        for metric, organs in metrics.items()
    }
    return [
        (
            organ,
            [
                {
                    "metric": metric,
                    "n": metrics[metric][organ].n,
                    "difference": metrics[metric][organ].mean_difference,
                    "p": metrics[metric][organ].p,
                    "p_holm": corrected[metric][organ],
                }
                for metric in metrics
            ],
        )
        for organ in evaluation.summary
    ]


def _tolerances(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """Source of surface tolerances -> the organs with their values."""
    sources: dict[str, list[str]] = {}
    for name in evaluation.summary:
        organ = evaluation.organs[name]
        if organ.tolerance_mm is not None:
            sources.setdefault(organ.tolerance_source or "no source given", []).append(
                f"{name} {organ.tolerance_mm:g}"
            )
    return list(sources.items())
