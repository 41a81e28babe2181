"""One trial: a training with its values, what came of it, and what the study is told."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import optuna
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from medattn.errors import InputError
from medattn.training.loop import State
from medattn.training.runrecord import now_ms
from medattn.training.tracking import Pruned
from medattn_pipelines.record import listening
from medattn_pipelines.training import train_config
from medattn_pipelines.tuning.measure import measure_model, peak_memory, require_memory
from medattn_pipelines.tuning.sampling import CASES
from medattn_pipelines.tuning.space import Measure
from medattn_pipelines.tuning.spacefile import Search
from medattn_pipelines.tuning.store import Store, patiently
from medattn_pipelines.tuning.study import ENDED, HISTORY, KEY, requeue, taken_over, trial_folder

FAILURE, SECONDS = "failure", "seconds"  # attributes of trials
GIVEN_UP = ", as it was given up and is run again"


@dataclass(frozen=True)
class Outcome:
    """What a worker says of a trial. signal: the one that stopped it."""

    text: str
    failed: bool = False
    signal: str = ""


def run_trial(search: Search, study: Study, store: Store, trial: Trial, values: Mapping[str, Any]) -> Outcome:
    """Train with the values of a trial, and write into the study what came of it."""
    listener = _Listener(trial, store, reports=list(search.space.objectives) == ["score"])
    end = _End(search, study, store, trial, listener)
    try:
        measures, reason = _train(search, study, store, trial, values, listener)
        if reason.startswith("SIG"):
            _stop(study, store, trial)
            return Outcome(
                f"stopped by {reason}; the same command goes on from its checkpoint", signal=reason
            )
    except Pruned:
        return end.tell(TrialState.PRUNED, f"pruned at {listener.best:.3f}")
    except optuna.exceptions.UpdateFinishedTrialError:
        return Outcome(f"stopped{GIVEN_UP}")
    except (InputError, MemoryError, torch.OutOfMemoryError) as error:
        sentence = str(error) if isinstance(error, InputError) else f"out of memory ({error})"
        return end.tell(TrialState.FAIL, sentence)
    except KeyboardInterrupt:
        _stop(study, store, trial)
        raise
    except Exception as error:
        if not store.away(error):
            end.tell(TrialState.FAIL, f"{type(error).__name__}: {error}")
        raise
    finally:
        gc.collect()  # a network is a circle of references: the next one needs its memory
    text = ", ".join(f"{name} {measures[name]:.4g}" for name in measures)
    return end.tell(TrialState.COMPLETE, text, measures)


def _train(
    search: Search,
    study: Study,
    store: Store,
    trial: Trial,
    values: Mapping[str, Any],
    listener: _Listener,
) -> tuple[dict[str, float], str]:
    """What was measured, and why the training ended."""
    folder = trial_folder(search.folder, trial.number)
    frozen = patiently(store, lambda: trial.storage.get_trial(trial._trial_id))
    parent = patiently(store, lambda: study.user_attrs[KEY])
    config = search.config(values, folder)
    belongs = {"experiment": search.experiment, "parent": parent}
    config = config.model_copy(update={"run": config.run.model_copy(update=belongs)})
    resume = taken_over(search.folder, folder, frozen.system_attrs.get(HISTORY, []))
    listener.steps = config.training.steps
    with peak_memory(config.training.device) as memory, listening(listener):
        reason = train_config(config, resume=resume, overwrite=not resume).reason
    measures = {"score": listener.best, **memory}
    if not reason.startswith("SIG") and {"latency", "parameters"} & wanted_measures(search):
        measures |= measure_model(config, folder / "model")
    return measures, reason


def wanted_measures(search: Search) -> set[Measure]:
    """What objectives and constraints need to know."""
    return {*search.space.objectives, *search.space.constraints}


def check_measures(search: Search) -> None:
    """Raise InputError where a measure of the search cannot be had on this machine."""
    if "memory" in wanted_measures(search):
        device = (search.base.content.get("training") or {}).get("device", "auto")
        require_memory(str(device))


def excesses(search: Search, measures: Mapping[str, float]) -> dict[str, float]:
    """How far a trial is beyond each constraint; at most 0 where it keeps it."""
    found = {}
    for name, bound in search.space.constraints.items():
        if bound.at_most is not None:
            found[f"{name} at most {bound.at_most:g}"] = measures[name] - bound.at_most
        if bound.at_least is not None:
            found[f"{name} at least {bound.at_least:g}"] = bound.at_least - measures[name]
    return found


@dataclass
class _Listener:
    """Hears the validations of a trial's training, writes them into the study and asks who is to stop.

    While the storage is away the training goes on, and is not stopped; what was heard is told later.
    """

    trial: Trial
    store: Store
    reports: bool  # Optuna takes values on the way of one objective alone
    best: float = float("-inf")
    steps: int | None = None
    heard: dict[str, float] = field(default_factory=dict)
    untold: dict[int, tuple[float, dict[str, float]]] = field(default_factory=dict)

    def begun(self, state: State) -> None:
        self.best = state.best

    def cases(self, scores: Mapping[str, float]) -> None:
        self.heard = dict(scores)

    def validated(self, state: State, score: float) -> None:
        self.best = max(self.best, score)
        if not self.reports:
            return
        self.untold[state.step] = (score, self.heard)
        try:
            self.tell()
            over = self.steps is not None and state.step >= self.steps
            stops = not over and self.trial.should_prune()
        except Exception as error:
            if not self.store.away(error):
                raise
            return
        if stops:
            raise Pruned

    def tell(self) -> None:
        """Write into the study what it has not been told yet."""
        for step, (score, cases) in list(self.untold.items()):
            if cases:
                self.trial.set_user_attr(f"{CASES}/{step}", cases)
            known = self.trial.storage.get_trial(self.trial._trial_id).intermediate_values
            if step not in known:  # a training that went on from a checkpoint comes by again
                self.trial.report(score, step)
            del self.untold[step]


def _stop(study: Study, store: Store, trial: Trial) -> None:
    """Have a trial run again, unless it was given up and another worker has seen to that."""
    with store.turn():
        if not trial.storage.get_trial(trial._trial_id).state.is_finished():
            requeue(study, study.tell(trial, state=TrialState.FAIL), killed=False)


@dataclass
class _End:
    """Tells the study how a trial ended, as soon as the storage is there."""

    search: Search
    study: Study
    store: Store
    trial: Trial
    listener: _Listener
    started: float = field(default_factory=time.monotonic)

    def tell(self, state: TrialState, text: str, measures: Mapping[str, float] | None = None) -> Outcome:
        """measures: of a complete trial."""
        failed, seconds = state == TrialState.FAIL, round(time.monotonic() - self.started, 1)
        attributes = {SECONDS: seconds, ENDED: now_ms() / 1000, **(measures or {})}
        limits = excesses(self.search, measures) if measures else {}
        values = [measures[name] for name in self.search.space.objectives] if measures else None

        def write() -> FrozenTrial:
            with _finished_by_others():
                self.listener.tell()
                for name, value in (attributes | ({FAILURE: text} if failed else {})).items():
                    self.trial.set_user_attr(name, value)
                for name, excess in limits.items():
                    self.trial.set_constraint(name, excess)
            # a tell whose answer was lost is not told twice
            return self.study.tell(self.trial, values, state=state, skip_if_finished=True)

        told = patiently(self.store, write)
        if told.state != state or told.user_attrs.get(ENDED) != attributes[ENDED]:
            return Outcome(f"{text}; not counted{GIVEN_UP}")
        if not failed:
            folder = trial_folder(self.search.folder, self.trial.number)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # model/ holds the best weights
        return Outcome(f"failed: {text}" if failed else text, failed)


@contextmanager
def _finished_by_others() -> Iterator[None]:
    """A worker that did not show itself in time finds its trial failed, which `tell` then says."""
    try:
        yield
    except optuna.exceptions.UpdateFinishedTrialError:
        return
