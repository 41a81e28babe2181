"""A worker: asks the study for trials until it has enough, whoever runs them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from optuna.study import Study
from optuna.trial import Trial, TrialState

from medattn.errors import InputError
from medattn_pipelines.progress import clock
from medattn_pipelines.tuning.sampling import GENERATION, CmaEs, make_sampler, suggest
from medattn_pipelines.tuning.space import label
from medattn_pipelines.tuning.spacefile import Search
from medattn_pipelines.tuning.store import WORKER, Store, patiently
from medattn_pipelines.tuning.sweeprecord import SweepRecord
from medattn_pipelines.tuning.trials import run_trial

DEFAULT_TRIALS = 50
MOST_FAILURES = 5  # in succession, without a trial that came to its end
WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Done:
    """How a worker's part ended. reason: "trials", "timeout", "grid", "SIGTERM" or "SIGINT"."""

    reason: str
    target: int


@dataclass(frozen=True)
class Work:
    """What a worker has. target: complete trials of all workers. deadline: monotonic seconds, when it starts
    no more trials."""

    search: Search
    study: Study
    store: Store
    record: SweepRecord
    target: int
    deadline: float | None


def wanted_trials(search: Search, study: Study, trials: int | None) -> int:
    """How many complete trials a study is to have; trials: what the command line says."""
    default = len(study.trials) if search.space.sampler.name == "grid" else DEFAULT_TRIALS
    return trials or search.space.trials or default


def work(mine: Work) -> Done:
    """Run trials until the study has enough complete ones, counting those of all workers.

    Ctrl-C, and SIGTERM where `stoppable` makes it a KeyboardInterrupt, end it between trainings as within.
    """
    try:
        return _work(mine)
    except KeyboardInterrupt as interrupt:
        return Done(str(interrupt) or "SIGINT", mine.target)


def _work(mine: Work) -> Done:
    study, store, target, started = mine.study, mine.store, mine.target, time.monotonic()
    failures, told = 0, False
    while True:
        with ExitStack() as stack:
            found = patiently(store, partial(_next, mine, stack))
            if isinstance(found, Done):
                return found
            if found is not None:
                trial, values, complete = found
                print(f"trial {trial.number} ({complete} of {target} complete): {_shown(values)}", flush=True)
                outcome = run_trial(mine.search, study, store, trial, values)
                left = patiently(store, lambda: _left(study, target, started))
                print(f"trial {trial.number}: {outcome.text}{left}", flush=True)
                if outcome.signal:
                    return Done(outcome.signal, target)
                failures = failures + 1 if outcome.failed else 0
                if failures >= MOST_FAILURES:
                    raise InputError(
                        f"{mine.search.file.path}: {failures} trials failed in succession; {outcome.text}"
                    )
        if found is None:
            if not told:
                print("waiting for the trials of other workers", flush=True)
            told = True
            time.sleep(WAIT_SECONDS)


def _next(mine: Work, stack: ExitStack) -> Done | tuple[Trial, dict[str, Any], int] | None:
    """A trial with its values and how many are complete, or why there is none; None to wait for others."""
    stack.close()  # of an attempt that the storage did not live to see
    grid = mine.search.space.sampler.name == "grid"
    with mine.store.turn():
        mine.store.fail_dead(mine.study)
        trials = mine.study.get_trials(deepcopy=False)
        mine.record.update(trials)
        states = [trial.state for trial in trials]
        complete, running, waiting = (
            states.count(state) for state in (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
        )
        if complete >= mine.target:
            return Done("trials", mine.target)
        if mine.deadline is not None and time.monotonic() >= mine.deadline:
            return Done("timeout", mine.target)
        if grid and not waiting and not running:
            return Done("grid", mine.target)
        if complete + running >= mine.target or (grid and not waiting):
            return None
        return *_ask(mine, len(states), stack), complete


def _ask(mine: Work, number: int, stack: ExitStack) -> tuple[Trial, dict[str, Any]]:
    """A trial with its values, in a turn. Others know from now on whose it is; `stack` ends that."""
    mine.study.sampler = sampler = make_sampler(mine.search.space, number)
    trial = mine.study.ask()
    stack.enter_context(mine.store.alive(trial))
    values = suggest(trial, mine.search.space)
    if isinstance(sampler, CmaEs) and sampler.generation is not None:
        trial.set_user_attr(GENERATION, sampler.generation)
    trial.set_user_attr(WORKER, mine.store.worker)  # last: one without it was never begun
    return trial, values


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
