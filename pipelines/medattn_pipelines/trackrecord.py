"""What MLflow is told of a training besides its metrics: what it learned from, and what it came to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medattn.training.runrecord import DataSet, digest_of
from medattn.training.tracking import Tracker
from medattn_pipelines.configfile import AnyConfig, flatten

LOADER = "medattn_pipelines.modelserving"
DETAILS = ("per_case", "per_image", "per_class", "bins", "counts", "versions", "schema")
SPREAD = ("n", "median", "worst", "tolerance_mm")
MOST_NUMBERS = 200


def open_tracker(
    config: AnyConfig,
    run: Path,
    resume_step: int | None,
    *,
    data: Sequence[DataSet],
    machine: Mapping[str, Any],
) -> Tracker:
    """The record of a training by this config. data: what it learns from. machine: what it runs on."""
    return Tracker(
        run,
        name=run.name,
        parameters={**flatten(config), **machine},
        mirror=config.run.tracking,
        resume_step=resume_step,
        experiment=config.run.experiment or run.name,
        parent=config.run.parent,
        data=data,
    )


def track_results(tracker: Tracker, config: AnyConfig, run: Path) -> None:
    """Hand over what a complete training wrote; trials of a sweep are not registered, there are too many."""
    for name in ("config.yaml", "plan.json", "report"):
        if (run / name).exists():
            tracker.artifact(run / name)
    register = None if config.run.parent else config.run.experiment or run.name
    tracker.model(run / "model", loader=LOADER, register=register, numbers=report_numbers(run / "report"))


def plan_sets(run: Path) -> list[DataSet]:
    """The plan of a training on volumes, as what else it learns by; none of trainings on images."""
    plan = run / "plan.json"
    return [DataSet("plan", digest_of(plan), str(plan.resolve()))] if plan.is_file() else []


def report_numbers(report: Path) -> dict[str, float]:
    """The means of a report's metrics.json by dotted path, but for those of single cases and classes."""
    path = report / "metrics.json"
    if not path.is_file():
        return {}
    numbers = _numbers(json.loads(path.read_text(encoding="utf-8")))
    return dict(list(numbers)[:MOST_NUMBERS])


def _numbers(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in content.items():
        if key in (*DETAILS, *SPREAD) or key.startswith("n_"):
            continue
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)
