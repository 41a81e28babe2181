"""How far the results of two runs differ: metrics line by line, final weights, report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from medattn.errors import InputError
from medattn.training.runrecord import METRICS
from medattn_pipelines.trackrecord import report_numbers

# what a clock gives, which is another one each time
WALL_CLOCK = frozenset({"time", "step_seconds", "data_wait_share", "seconds_left"})


@dataclass(frozen=True)
class Row:
    """One thing that was compared: how many numbers, how many of them equal, and the largest difference.

    difference: infinite where a number stands on one side alone. where: the place of the largest.
    """

    what: str
    compared: int
    equal: int
    difference: float
    where: str


def compare_runs(first: Path, second: Path) -> list[Row]:
    """A row per metric, one for the weights of model/ and one for the report's means.

    Raises InputError for a file that is missing or damaged.
    """
    report = _row("report means", report_numbers(first / "report"), report_numbers(second / "report"))
    return [*_metrics(first, second), _weights(first, second), report]


def _metrics(first: Path, second: Path) -> list[Row]:
    mine, theirs = (_journal(run / METRICS) for run in (first, second))
    names = sorted({name for name, _ in (*mine, *theirs)})
    return [
        _row(
            name,
            {f"step {place}": value for (other, place), value in mine.items() if other == name},
            {f"step {place}": value for (other, place), value in theirs.items() if other == name},
        )
        for name in names
    ]


def _journal(path: Path) -> dict[tuple[str, str], float | None]:
    """(metric, step) -> value; one of the same step again is told apart."""
    found: dict[tuple[str, str], float | None] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            content = json.loads(line)
            step = content.pop("step")
            for name, value in content.items():
                if name in WALL_CLOCK:
                    continue
                place = str(step)
                while (name, place) in found:
                    place += " again"
                found[name, place] = value
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(
            f"{path}: no journal of a run ({type(error).__name__}: {error}); give the folder of a complete "
            "run"
        ) from None
    return found


def _weights(first: Path, second: Path) -> Row:
    mine, theirs = (_load(run / "model" / "model.safetensors") for run in (first, second))
    compared = equal = 0
    largest, where = 0.0, ""
    for name in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            compared, difference = compared + 1, math.inf
        else:
            same = a.eq(b) | (a.ne(a) & b.ne(b))
            compared, equal = compared + a.numel(), equal + int(same.sum())
            apart = (a.double() - b.double()).abs().nan_to_num(math.inf)[~same]
            difference = float(apart.max()) if apart.numel() else 0.0
        if difference > largest:
            largest, where = difference, name
    return Row("weights", compared, equal, largest, where)


def _load(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: no weights here ({error}); give the folder of a complete run") from None
    return found


def _row(what: str, mine: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> Row:
    places = list(dict.fromkeys((*mine, *theirs)))
    found = [_difference(place, mine, theirs) for place in places]
    largest = max(found, default=0.0)
    where = places[found.index(largest)] if largest else ""
    return Row(what, len(places), found.count(0.0), largest, where)


def _difference(place: str, mine: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> float:
    if place not in mine or place not in theirs:
        return math.inf
    a, b = mine[place], theirs[place]
    if a == b:  # None is what a journal holds for numbers that are not finite
        return 0.0
    return math.inf if a is None or b is None else abs(a - b)


def largest(rows: Sequence[Row]) -> Row:
    """The row with the largest difference."""
    return max(rows, key=lambda row: row.difference)
