"""What a training tells while it runs: the progress line and the journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from medattn.training.loop import State
from medattn.training.tracking import Tracker
from medattn_pipelines.progress import Update


@dataclass
class Record:
    """Tells the progress line how a training goes, and the journal in means over log_every steps.

    score: what validations measure, for the line.
    """

    tracker: Tracker
    show: Update
    state: State
    log_every: int
    score: str
    recent: list[Mapping[str, float]] = field(default_factory=list)

    def step(self, values: Mapping[str, float]) -> None:
        """After each step."""
        best = self.state.best_step
        note = f"{self.score} {self.state.best:.3f} at step {best}" if best else ""
        self.show(self.state.step, loss=values["loss"], seconds_left=values["seconds_left"], note=note)
        self.recent.append(values)
        if self.state.step % self.log_every == 0:
            means = {name: fmean(one[name] for one in self.recent) for name in values}
            self.tracker.log(self.state.step, **means)
            self.recent.clear()

    def validation(self, score: float, values: Mapping[str, float]) -> float:
        """After a validation: logs the values; returns the score, which ranks checkpoints."""
        self.tracker.log(self.state.step, **values)
        return score
