"""The command `medattn tune`: reads the space, finds or makes the study, works, and writes the results."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from medattn.errors import InputError
from medattn_pipelines.tuning.spacefile import Search, read_search

if TYPE_CHECKING:
    from medattn_pipelines.tuning.store import Store

EXAMPLE = """\
A search space is YAML:

  base: ../hn_ct.yaml               # a config, beside this file; or the whole config below `config:`
  config:                           # what it replaces
    training: {max_minutes: 10}
  space:                            # dotted config path -> values; checked before the first trial
    training.learning_rate: {type: float, low: 1e-4, high: 1e-2, log: true}
    network.name:           {type: categorical, choices: [unet, unet_block]}
    network.options.halo:   {type: int, low: 0, high: 6, step: 2, when: {network.name: unet_block}}
  objectives: {score: maximize}     # score (Dice, top-1 or PQ), latency, memory, parameters
  constraints: {latency: {at_most: 400}}
  sampler: {name: tpe}              # tpe, cmaes, random, grid
  pruner: {name: wilcoxon}          # none, median, hyperband, wilcoxon (Dice of each case against the best's)
  trials: 30

Each trial is a run folder trial_0000, ... in runs/<name of SPACE>. There also are best.yaml, a config
that `medattn train` takes, trials.csv and report/report.html, written anew whenever a worker ends.

Workers: run the same command several times, on this machine or, with --storage postgresql://..., on many.
--trials counts the complete trials of all of them. The trial of a worker that was killed is run again from
its checkpoint. A search that was stopped goes on with the same command.

MLflow shows the search as one run with a run below it per trial, and the best model is registered at the end;
run.tracking=false leaves that out.

A password is best left out of the URL: PostgreSQL reads it from ~/.pgpass or PGPASSWORD.

fields of a search space, with their defaults:
"""


def tune(args: Namespace) -> int:
    """Run one worker; 0 also when SIGTERM ended it, which is how a scheduler asks, and 2 when Ctrl-C did."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "medattn tune: found under torchrun, expected a process of its own; start the command several "
            "times instead, each is a worker"
        )
    search = read_search(args.space, args.overrides)
    from medattn_pipelines.tuning.probe import check_search

    check_search(search)
    if args.check:
        print(f"{args.space}: every value gives a valid config")
        return 0
    from medattn_pipelines.tuning.trials import check_measures

    check_measures(search)
    write_practice(search)
    return _tune(search, args)


def _tune(search: Search, args: Namespace) -> int:
    import optuna

    from medattn.training.redaction import redacted
    from medattn_pipelines.tuning.results import report
    from medattn_pipelines.tuning.store import open_store, patiently
    from medattn_pipelines.tuning.study import join_study, requeue
    from medattn_pipelines.tuning.sweeprecord import SweepRecord
    from medattn_pipelines.tuning.worker import Work, wanted_trials, work

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = args.storage or f"journal:{search.folder / 'study.journal'}"
    search.folder.mkdir(parents=True, exist_ok=True)
    store = open_store(url, search.name, heartbeat=args.heartbeat, requeue=requeue)
    with _closed(store), store.outages(), warnings.catch_warnings(), stoppable():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage")  # the worker sends it, not Study.optimize
        study = join_study(search, store)
        print(f"study {search.name!r} in {redacted(url)}, runs in {search.folder}", flush=True)
        minutes = args.timeout or search.space.timeout_minutes
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        with SweepRecord(search, study, store) as record:
            target = wanted_trials(search, study, args.trials)
            done = work(Work(search, study, store, record, target, deadline))

            def write_results() -> None:
                with store.turn():  # workers that end together write the same files
                    report(search, study, redacted(url), done)
                    record.finish(done)

            patiently(store, write_results)
    return 2 if done.reason == "SIGINT" else 0


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt that says its name; trainings inside catch the signal themselves."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _closed(store: Store) -> Iterator[None]:
    try:
        yield
    finally:
        store.close()


def write_practice(search: Search) -> None:
    """Write practice cases where the search asks for them and data.root is not there; one worker does."""
    practice, data = search.space.practice, search.base.content.get("data")
    if practice is None or not isinstance(data, dict) or "root" not in data:
        return
    root = Path(str(data["root"])).expanduser()
    if root.exists():
        return
    from medattn.atomic import atomic_folder
    from medattn.data.phantom import write_phantoms
    from medattn_pipelines.progress import case_progress
    from medattn_pipelines.tuning.store import held

    root.parent.mkdir(parents=True, exist_ok=True)
    with held(root.with_name(f".{root.name}.lock")):
        if root.exists():  # while this worker waited
            return
        with atomic_folder(root) as folder, case_progress("Practice cases", practice.cases) as tick:
            write_phantoms(
                folder / "cases",
                cases=practice.cases,
                size=practice.size,
                seed=practice.seed,
                on_case=lambda done, total: tick(),
            )
            for path in (folder / "cases").iterdir():
                path.rename(folder / path.name)
            (folder / "cases").rmdir()


def notes() -> str:
    """What `medattn tune --help` explains."""
    from medattn_pipelines.tuning.space import explain_space

    return EXAMPLE + explain_space()
