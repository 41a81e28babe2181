"""The outcome of a search as values: what was tried, what came of it and what mattered."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

UNITS = {"score": "", "latency": "ms", "memory": "MiB", "parameters": ""}


@dataclass(frozen=True)
class Trial:
    """One trial. state: complete, pruned, failed, running or waiting.

    values: dotted config path -> number or text. measures: what was measured; empty unless complete.
    feasible: it keeps all constraints. best: the best one or, of several objectives, one that none beats.
    curve: (step, score) of each validation. note: why it failed.
    """

    number: int
    state: str
    values: Mapping[str, float | str]
    measures: Mapping[str, float]
    feasible: bool = True
    best: bool = False
    seconds: float | None = None
    curve: Sequence[tuple[int, float]] = ()
    note: str = ""


@dataclass(frozen=True)
class SearchResult:
    """All of a search.

    objectives: measure -> maximize or minimize. constraints: as sentences. storage: without secrets.
    importances: measure -> path -> share of its variation, largest first; empty where too little is known.
    """

    name: str
    objectives: Mapping[str, str]
    constraints: Sequence[str]
    trials: Sequence[Trial]
    target: int
    storage: str
    best_config: str
    importances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def counted(self, state: str) -> int:
        """How many trials are in a state."""
        return sum(trial.state == state for trial in self.trials)

    @property
    def best(self) -> list[Trial]:
        """The best trial, or those that none beats; best by the first objective first."""
        first, direction = next(iter(self.objectives.items()))
        sign = -1 if direction == "maximize" else 1
        return sorted((t for t in self.trials if t.best), key=lambda t: sign * t.measures[first])

    @property
    def paths(self) -> list[str]:
        """Every field that some trial has a value of, in the order of first use."""
        return list(dict.fromkeys(path for trial in self.trials for path in trial.values))

    @property
    def measures(self) -> list[str]:
        """What was measured, objectives first."""
        found = dict.fromkeys(name for trial in self.trials for name in trial.measures)
        return list(dict.fromkeys([*self.objectives, *found]))


def to_csv(result: SearchResult) -> str:
    """A row per trial, in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["trial", "state", "best", "feasible", *result.measures, *result.paths, "seconds", "note"]
    )
    for trial in result.trials:
        measures = [trial.measures.get(name, "") for name in result.measures]
        values = [trial.values.get(path, "") for path in result.paths]
        seconds = "" if trial.seconds is None else trial.seconds
        writer.writerow(
            [trial.number, trial.state, trial.best, trial.feasible, *measures, *values, seconds, trial.note]
        )
    return text.getvalue()
