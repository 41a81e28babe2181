"""What a training tells while it runs: the progress line and the journal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Protocol

from medattn.atomic import write_text
from medattn.training.loop import State
from medattn.training.runrecord import METRICS
from medattn.training.tracking import Tracker
from medattn_pipelines.progress import Update


class Listener(Protocol):
    """Who wants to know how trainings go, such as a search. What it raises ends the training."""

    def begun(self, state: State) -> None:
        """Before the first step, or the next one of a run that goes on."""

    def cases(self, scores: Mapping[str, float]) -> None:
        """Before `validated`, where a validation has one: the score of each case."""

    def validated(self, state: State, score: float) -> None:
        """After a validation. state: its best score is that of the validations before."""


# a context variable, so that no training has to hand it down
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Trainings in this block tell the listener of their validations."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell_cases(scores: Mapping[str, float]) -> None:
    """Tell a listener the score of each validation case."""
    if listener := _LISTENER.get():
        listener.cases(scores)


@dataclass
class Record:
    """Tells the progress line how a training goes, and the journal in means over log_every steps.

    tracker and show: None in processes that leave both to the main one. score: what validations measure, for
    the line.
    """

    tracker: Tracker | None
    show: Update | None
    state: State
    log_every: int
    score: str

    def __post_init__(self) -> None:
        if listener := _LISTENER.get():
            listener.begun(self.state)

    def step(self, values: Mapping[str, float]) -> None:
        """After each step."""
        if self.tracker is None or self.show is None:
            return
        best = self.state.best_step
        note = f"{self.score} {self.state.best:.3f} at step {best}" if best else ""
        self.show(self.state.step, loss=values["loss"], seconds_left=values["seconds_left"], note=note)
        # in the state, whose checkpoints may come between two lines
        recent = self.state.recent
        recent.append(dict(values))
        if self.state.step % self.log_every == 0:
            means = {name: fmean(one[name] for one in recent) for name in values}
            recent.clear()
            self._log(means)

    def validation(self, score: float, values: Mapping[str, float]) -> float:
        """After a validation: logs the values; returns the score, which ranks checkpoints."""
        self._log(values)
        if listener := _LISTENER.get():
            listener.validated(self.state, score)
        return score

    def _log(self, values: Mapping[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log(self.state.step, **values)
            self.state.logged += 1


def drop_later_lines(run: Path, state: State) -> None:
    """Cut the journal to the lines that it had when `state` was saved; its last step may have had more."""
    path = run / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if len(lines) > state.logged:
        write_text(path, b"".join(lines[: state.logged]).decode("utf-8"))
