"""What MLflow is told of a training besides its metrics: what it learned from, and what it came to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medattn.training.runrecord import DataSet
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


def data_sets(config: AnyConfig, run: Path) -> list[DataSet]:
    """The data with a digest over names and sizes of all files, which is cheap, and of their descriptions.

    Of volumes the contents of cases.json and labels.json count as well, and the plan is an entry of its own.
    """
    root = config.data.root
    read = (root / "cases.json", root / "labels.json") if config.task == "volumes" else ()
    found = [DataSet(root.name or "data", listing_digest(root, read), str(root.resolve()))]
    if (plan := run / "plan.json").is_file():
        digest = hashlib.blake2b(plan.read_bytes(), digest_size=16).hexdigest()
        found.append(DataSet("plan", digest, str(plan.resolve())))
    return found


def listing_digest(root: Path, read: tuple[Path, ...] = ()) -> str:
    """Of the names and sizes of all files below a folder, and of the contents of those in `read`."""
    found = hashlib.blake2b(digest_size=16)
    for name, size in sorted(_listing(str(root), "")):
        found.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    for path in read:
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


def report_numbers(report: Path) -> dict[str, float]:
    """The means of a report's metrics.json by dotted path, but for those of single cases and classes."""
    path = report / "metrics.json"
    if not path.is_file():
        return {}
    numbers = _numbers(json.loads(path.read_text(encoding="utf-8")))
    return dict(list(numbers)[:MOST_NUMBERS])


def _listing(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Names below a folder, with slashes, and sizes. Hidden files are none of the data."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{prefix}{entry.name}"
            if entry.is_dir():
                yield from _listing(entry.path, f"{name}/")
            elif entry.is_file():
                yield name, entry.stat().st_size


def _numbers(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in content.items():
        if key in (*DETAILS, *SPREAD) or key.startswith("n_"):
            continue
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)
