"""`medattn tune`: searches for the best config; every worker runs the same command on the same study."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.study import Study, create_study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from medattn.errors import InputError
from medattn.training.loop import State
from medattn_pipelines.configfile import AnyConfig, leaves
from medattn_pipelines.fitting import LAST
from medattn_pipelines.progress import clock
from medattn_pipelines.record import listening
from medattn_pipelines.tuning.measure import measure_model, peak_memory, require_memory
from medattn_pipelines.tuning.sampling import (
    CASES,
    GENERATION,
    CmaEs,
    grid_trials,
    make_pruner,
    make_sampler,
    suggest,
)
from medattn_pipelines.tuning.space import Measure, label
from medattn_pipelines.tuning.spacefile import Search
from medattn_pipelines.tuning.store import WORKER, Store

DEFAULT_TRIALS = 50
MOST_KILLS = 3  # a trial that took so many workers with it is left
MOST_FAILURES = 5  # in succession, without a trial that came to its end
WAIT_SECONDS = 1.0
SPACE, FAILURE, SECONDS = "space", "failure", "seconds"  # attributes of study and trials
HISTORY, KILLS = "retry_history", "kills"
# of a config, what may differ between the workers of a study or when it goes on
OWN = ("run.dir", "run.tracking", "data.root", "data.workers", "data.cache", "training.device")


class Pruned(BaseException):
    """Ends a training that fell behind; no error, as KeyboardInterrupt is none."""


@dataclass(frozen=True)
class Done:
    """How a worker's part ended. reason: "trials", "timeout", "grid", "SIGTERM" or "SIGINT"."""

    reason: str
    complete: int
    target: int


def join_study(search: Search, store: Store) -> Study:
    """The study of a search, new or as other workers left it.

    Raises InputError where a study of this name is of another space or config, and where the folder holds the
    trials of another one.
    """
    space = search.space
    training = search.base.content.get("training") or {}
    pruner = make_pruner(space.pruner, int(training.get("validate_every") or 1), training.get("steps"))
    with store.turn():
        study = create_study(
            storage=store.storage,
            study_name=search.name,
            directions=list(space.objectives.values()),
            load_if_exists=True,
            pruner=pruner,
        )
        mine = _signature(search)
        found = study.user_attrs.get(SPACE)
        if found is None:
            if others := sorted(search.folder.glob("trial_*")):
                raise InputError(
                    f"{search.folder}: holds {others[0].name} of another search; choose another run.dir, or "
                    "remove the folder"
                )
            if space.sampler.name == "grid":
                for trial in grid_trials(space):
                    study.add_trial(trial)
            study.set_user_attr(SPACE, mine)
        elif changed := sorted(key for key in mine | found if mine.get(key) != found.get(key)):
            raise InputError(
                f"{search.file.path}: the study {search.name!r} was begun with another {', '.join(changed)}; "
                "its trials cannot be compared: give the space another file name, or another --storage"
            )
    return study


def _signature(search: Search) -> dict[str, str]:
    """What all trials of a study have in common, field by field, as text."""
    space = search.space
    content = dict(leaves(search.base.content))
    own = {*OWN, *space.space}
    found = {path: json.dumps(value, default=str) for path, value in content.items() if path not in own}
    found |= {f"space: {path}": kind.model_dump_json() for path, kind in space.space.items()}
    parts: Mapping[str, Any] = {"objectives": space.objectives, "sampler": space.sampler.name}
    found |= {name: json.dumps(value) for name, value in parts.items()}
    return found


def work(search: Search, study: Study, store: Store, *, trials: int | None, minutes: float | None) -> Done:
    """Run trials until the study has enough complete ones, counting those of all workers."""
    grid = search.space.sampler.name == "grid"
    target = trials or search.space.trials or (len(study.trials) if grid else DEFAULT_TRIALS)
    started, failures, told = time.monotonic(), 0, False
    while True:
        with ExitStack() as stack:
            with store.turn():
                store.fail_dead(study)
                states = [trial.state for trial in study.get_trials(deepcopy=False)]
                complete, running, waiting = (
                    states.count(state)
                    for state in (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
                )
                if complete >= target:
                    return Done("trials", complete, target)
                if minutes is not None and time.monotonic() - started >= 60 * minutes:
                    return Done("timeout", complete, target)
                if grid and not waiting and not running:
                    return Done("grid", complete, target)
                trial = None
                if complete + running < target and (waiting or not grid):
                    trial, values = _ask(search, study, store, len(states), stack)
            if trial is not None:
                print(f"trial {trial.number} ({complete} of {target} complete): {_shown(values)}", flush=True)
                outcome = run_trial(search, study, trial, values)
                print(f"trial {trial.number}: {outcome.text}{_left(study, target, started)}", flush=True)
                if outcome.signal:
                    return Done(outcome.signal, complete, target)
                failures = failures + 1 if outcome.failed else 0
                if failures >= MOST_FAILURES:
                    raise InputError(
                        f"{search.file.path}: {failures} trials failed in succession; {outcome.text}"
                    )
        if trial is None:
            if not told:
                print("waiting for the trials of other workers", flush=True)
            told = True
            time.sleep(WAIT_SECONDS)


def _ask(
    search: Search, study: Study, store: Store, number: int, stack: ExitStack
) -> tuple[Trial, dict[str, Any]]:
    """A trial with its values, in a turn. Others know from now on whose it is; `stack` ends that."""
    study.sampler = sampler = make_sampler(search.space, number)
    trial = study.ask()
    stack.enter_context(store.alive(trial))
    values = suggest(trial, search.space)
    if isinstance(sampler, CmaEs) and sampler.generation is not None:
        trial.set_user_attr(GENERATION, sampler.generation)
    trial.set_user_attr(WORKER, store.worker)  # last: one without it was never begun
    return trial, values


@dataclass(frozen=True)
class _Outcome:
    text: str
    failed: bool = False
    signal: str = ""


def run_trial(search: Search, study: Study, trial: Trial, values: Mapping[str, Any]) -> _Outcome:
    """Train with the values of a trial, and write into the study what came of it."""
    folder = search.folder / f"trial_{trial.number:04d}"
    listener = _Listener(trial, reports=list(search.space.objectives) == ["score"])
    started = time.monotonic()
    try:
        history = trial.storage.get_trial(trial._trial_id).system_attrs.get(HISTORY, [])
        resume = _taken_over(search.folder, folder, history)
        config = search.config(values, folder)
        listener.steps = config.training.steps
        with peak_memory(config.training.device) as memory, listening(listener):
            reason = train_config(config, resume=resume, overwrite=not resume)
        if reason.startswith("SIG"):
            _stop(study, trial)
            return _Outcome(
                f"stopped by {reason}; the same command goes on from its checkpoint", signal=reason
            )
        measures = {"score": listener.best, **memory}
        if {"latency", "parameters"} & wanted_measures(search):
            measures |= measure_model(config, folder / "model")
    except Pruned:
        return _tell(study, trial, TrialState.PRUNED, folder, started, f"pruned at {listener.best:.3f}")
    except (InputError, MemoryError, torch.OutOfMemoryError) as error:
        sentence = str(error) if isinstance(error, InputError) else f"out of memory ({error})"
        return _tell(study, trial, TrialState.FAIL, folder, started, sentence)
    except KeyboardInterrupt:
        _stop(study, trial)
        raise
    except Exception as error:
        _tell(study, trial, TrialState.FAIL, folder, started, f"{type(error).__name__}: {error}")
        raise
    finally:
        gc.collect()  # a network is a circle of references: the next one needs its memory
    for measure, value in measures.items():
        trial.set_user_attr(measure, value)
    for name, excess in excesses(search, measures).items():
        trial.set_constraint(name, excess)
    text = ", ".join(f"{name} {measures[name]:.4g}" for name in measures)
    return _tell(
        study,
        trial,
        TrialState.COMPLETE,
        folder,
        started,
        text,
        [measures[m] for m in search.space.objectives],
    )


def wanted_measures(search: Search) -> set[Measure]:
    """What objectives and constraints need to know."""
    return {*search.space.objectives, *search.space.constraints}


def excesses(search: Search, measures: Mapping[str, float]) -> dict[str, float]:
    """How far a trial is beyond each constraint; at most 0 where it keeps it."""
    found = {}
    for name, bound in search.space.constraints.items():
        if bound.at_most is not None:
            found[f"{name} at most {bound.at_most:g}"] = measures[name] - bound.at_most
        if bound.at_least is not None:
            found[f"{name} at least {bound.at_least:g}"] = bound.at_least - measures[name]
    return found


def train_config(config: AnyConfig, *, resume: bool, overwrite: bool) -> str:
    """Train by a config of any task; returns why it ended."""
    from medattn_pipelines import classification, panoptic, volumes

    if config.task == "classification":
        return classification.train(config, resume=resume, overwrite=overwrite).reason
    if config.task == "panoptic":
        return panoptic.train(config, resume=resume, overwrite=overwrite).reason
    return volumes.train(config, resume=resume, overwrite=overwrite).reason


@dataclass
class _Listener:
    """Hears the validations of a trial's training, writes them into the study and asks who is to stop."""

    trial: Trial
    reports: bool  # Optuna takes values on the way of one objective alone
    best: float = float("-inf")
    steps: int | None = None
    heard: dict[str, float] = field(default_factory=dict)

    def cases(self, scores: Mapping[str, float]) -> None:
        self.heard = dict(scores)

    def validated(self, state: State, score: float) -> None:
        self.best = max(self.best, state.best, score)
        if not self.reports:
            return
        if self.heard:
            self.trial.set_user_attr(f"{CASES}/{state.step}", self.heard)
        known = self.trial.storage.get_trial(self.trial._trial_id).intermediate_values
        if state.step not in known:  # a training that went on from a checkpoint comes by again
            self.trial.report(score, state.step)
        over = self.steps is not None and state.step >= self.steps
        if not over and self.trial.should_prune():
            raise Pruned


def requeue(study: Study, trial: FrozenTrial, *, killed: bool = True) -> None:
    """Let a failed trial be run again, with the same values and what it reported.

    One that took MOST_KILLS workers with it is left: it may be what kills them.
    """
    system = {k: v for k, v in trial.system_attrs.items() if not k.startswith("constraints")}
    kills = int(system.get(KILLS, 0)) + killed
    if kills > MOST_KILLS:
        return
    history = [*system.get(HISTORY, []), trial.number]
    system |= {"failed_trial": history[0], HISTORY: history, KILLS: kills}
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={k: v for k, v in trial.user_attrs.items() if k != WORKER},
            system_attrs=system,
            intermediate_values=trial.intermediate_values,
        )
    )


def _taken_over(study: Path, folder: Path, history: list[int]) -> bool:
    """Go on with the run of a trial that was not finished: True where it left a checkpoint.

    The folder is renamed first. A worker that was given up and is not dead then finds it gone and stops.
    """
    for number in reversed(history):
        old = study / f"trial_{number:04d}"
        if (old / LAST).exists() or (old / LAST).with_name(".previous-last").exists():
            old.rename(folder)
            return True
    return False


def _stop(study: Study, trial: Trial) -> None:
    frozen = study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
    requeue(study, frozen, killed=False)


def _tell(
    study: Study,
    trial: Trial,
    state: TrialState,
    folder: Path,
    started: float,
    text: str,
    values: list[float] | None = None,
) -> _Outcome:
    failed = state == TrialState.FAIL
    with _finished_by_others():
        trial.set_user_attr(SECONDS, round(time.monotonic() - started, 1))
        if failed:
            trial.set_user_attr(FAILURE, text)
    told = study.tell(trial, values, state=state, skip_if_finished=True)
    if told.state != state:
        return _Outcome(f"{text}; not counted, as it was given up and is run again", failed=False)
    if not failed:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # model/ holds the best weights
    return _Outcome(f"failed: {text}" if failed else text, failed)


@contextmanager
def _finished_by_others() -> Iterator[None]:
    """A worker that did not show itself in time finds its trial failed, which `tell` then says."""
    try:
        yield
    except optuna.exceptions.UpdateFinishedTrialError:
        return


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{path}={value:.4g}" if isinstance(value, float) else f"{path}={label(value)}"
        for path, value in values.items()
    )


def _left(study: Study, target: int, started: float) -> str:
    """How far the study is, and how long it may take at the pace so far."""
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    recent = [t for t in complete if t.datetime_complete]
    text = f" ({len(complete)} of {target} complete"
    now = time.time()
    since = now - (time.monotonic() - started)
    mine = [t for t in recent if t.datetime_complete and t.datetime_complete.timestamp() >= since]
    if mine and len(complete) < target:
        text += f", {clock((now - since) / len(mine) * (target - len(complete)))} left"
    return text + ")"


def check_measures(search: Search) -> None:
    """Raise InputError where a measure of the search cannot be had on this machine."""
    if "memory" in wanted_measures(search):
        device = (search.base.content.get("training") or {}).get("device", "auto")
        require_memory(str(device))
