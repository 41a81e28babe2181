"""The run that the trials of a search belong to: in the folder of the search, and in MLflow."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from medattn.errors import InputError
from medattn.training.mirror import Mirror
from medattn.training.mlflow_store import uri_for
from medattn.training.redaction import redacted
from medattn.training.runrecord import FILE, METRICS, hold, is_held, new_record, provenance, read_record
from medattn_pipelines.configfile import leaves
from medattn_pipelines.tracksync import sync
from medattn_pipelines.tuning.results import best_trials, is_feasible
from medattn_pipelines.tuning.space import UNITS, label
from medattn_pipelines.tuning.spacefile import Search
from medattn_pipelines.tuning.store import Store
from medattn_pipelines.tuning.study import ENDED, KEY, trial_folder

if TYPE_CHECKING:
    from medattn_pipelines.tuning.worker import Done

SENDING = "mlflow"  # of the storage's turns
ARTIFACTS = ("best.yaml", "trials.csv", "report")

logger = logging.getLogger(__name__)


class SweepRecord:
    """Every worker keeps it, from what the study holds; so all write the same, and one run of MLflow.

    metrics.jsonl has a line per complete trial, by its number: its measures, and the best so far in the order
    in which the trials ended. Used as a context manager it closes itself.
    """

    def __init__(self, search: Search, study: Study, store: Store) -> None:
        self._search, self._study, self._store = search, study, store
        self._best: Path | None = None  # run folder
        folder, key = search.folder, str(study.user_attrs[KEY])
        # several processes append to the file, in turns; that it is held says that the search goes on
        self._file = (folder / METRICS).open("a+", encoding="utf-8")
        hold(self._file, shared=True)
        with store.turn():
            # join_study has seen that what lies there is of this search
            self.record = (
                read_record(folder)
                if (folder / FILE).exists()
                else new_record(search.name, search.experiment, search.parent, key)
            )
            uri = uri_for(folder)
            self.record.tracking_uri = redacted(uri) if search.tracking else None
            self.record.begin(_parameters(search), provenance(), ())
            self.record.write(folder)
        turn = partial(store.turn, SENDING)
        self._mirror = Mirror(folder.resolve(), self.record, uri, turn) if search.tracking else None

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Record the trials that are complete, in a turn."""
        self._file.seek(0)
        there = self._file.read()
        whole = there[: there.rfind("\n") + 1]
        if whole != there:  # a worker was killed as it wrote
            self._file.truncate(len(whole))
        known = {json.loads(line)["step"] for line in whole.splitlines()}
        new = [line for line in _lines(self._search, trials) if line["step"] not in known]
        if new:
            self._file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in new))
            self._file.flush()
            if self._mirror is not None:
                self._mirror.wake()

    def finish(self, done: Done) -> None:
        """In a turn, after the results were written: hand them over, and register the best model at the end.

        While other workers have trials the search is not over.
        """
        folder, trials = self._search.folder, self._study.get_trials(deepcopy=False)
        self.update(trials)
        self.record.artifacts = [name for name in ARTIFACTS if (folder / name).exists()]
        self.record.artifacts.append(str(self._search.file.path.resolve()))
        if not any(trial.state == TrialState.RUNNING for trial in trials):
            self.record.end("killed" if done.reason.startswith("SIG") else "finished")
            if done.reason in ("trials", "grid") and len(self._search.space.objectives) == 1:
                self._register(best_trials(self._search, trials))
        self.record.write(folder)

    def _register(self, best: list[FrozenTrial]) -> None:
        """Have the best trial's model registered, by the worker that has it."""
        for trial in best:
            folder = trial_folder(self._search.folder, trial.number)
            if not (folder / FILE).exists():
                continue  # it is on another machine, whose workers see to it
            record = read_record(folder)
            if record.model is not None and record.model.register is None:
                record.model = replace(record.model, register=self.record.experiment)
                record.write(folder)
            self._best = folder

    def close(self) -> None:
        """Send the rest, with a few seconds' patience for MLflow."""
        self._file.close()
        if self._mirror is None:
            return
        self._mirror.close()
        if self._best is not None and self._mirror.idle():
            try:
                with self._store.outages(), self._store.turn(SENDING):
                    sync(self._best)  # which registers its model
            except InputError as error:
                logger.warning("%s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is not None and not is_held(self._search.folder / METRICS):  # else others go on with it
            self.record.end("failed" if isinstance(error, Exception) else "killed")
            self.record.write(self._search.folder)
        self.close()


def _parameters(search: Search) -> dict[str, str]:
    """The space, and the fields of the config that all trials share."""
    space = search.space
    given = {
        f"space.{path}": label(kind.model_dump(exclude_defaults=True)) for path, kind in space.space.items()
    }
    given |= {
        f"search.{name}": label(space.model_dump()[name])
        for name in ("objectives", "constraints", "sampler", "pruner", "trials", "seed")
    }
    shared = {path: label(value) for path, value in leaves(search.base.content) if path not in space.space}
    return shared | given


def _lines(search: Search, trials: Sequence[FrozenTrial]) -> Iterator[dict[str, Any]]:
    """A line of metrics per complete trial, in the order in which they ended."""
    best: dict[str, float] = {}
    complete = [t for t in trials if t.state == TrialState.COMPLETE and ENDED in t.user_attrs]
    for trial in sorted(complete, key=lambda t: (t.user_attrs[ENDED], t.number)):
        measures = {name: float(trial.user_attrs[name]) for name in UNITS if name in trial.user_attrs}
        for name, direction in search.space.objectives.items() if is_feasible(trial) else ():
            better = max if direction == "maximize" else min
            best[f"best_{name}"] = better(best.get(f"best_{name}", measures[name]), measures[name])
        numbers = {name: value if math.isfinite(value) else None for name, value in (measures | best).items()}
        yield {"step": trial.number, "time": trial.user_attrs[ENDED], **numbers}
