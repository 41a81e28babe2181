"""The record of a run: `metrics.jsonl` is the truth, MLflow a mirror that may be down."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from medattn.atomic import write_text
from medattn.errors import InputError
from medattn.training.mirror import Mirror
from medattn.training.mlflow_store import uri_for
from medattn.training.redaction import redacted
from medattn.training.runrecord import (
    FILE,
    METRICS,
    DataSet,
    TrainedModel,
    hold,
    new_record,
    provenance,
    read_record,
)

Status = Literal["finished", "failed", "killed", "pruned"]


class Pruned(BaseException):
    """Ends a training that fell behind in a search; no error, as KeyboardInterrupt is none."""


class Tracker:
    """Writes one JSON object per line, {"step": .., "time": .., name: value, ..}, and lets MLflow follow.

    run_dir: an existing folder. name: of the run, for people. parameters: dotted path -> value.
    mirror: follow in MLflow. resume_step: None starts anew; a step drops what was logged after it, so that no
    step stands twice, and mends a last line that a kill tore. Raises InputError for a metrics.jsonl that is
    damaged elsewhere.

    experiment: MLflow's, where MLFLOW_EXPERIMENT_NAME names no other. parent: the key of the run that this
    one belongs to, as a trial to its sweep; the two may start in any order, and on two machines. key: this
    run's own, by which MLflow's copy is found for all time; drawn if None. Trackers of one key, such as those
    of the machines that share a sweep, write one run of MLflow. data: what is learned from.

    What ran is kept in run.json, from which `medattn track sync` makes MLflow's copy where that failed.
    Used as a context manager it closes itself: finished, failed on an exception, pruned on Pruned, killed on
    Ctrl-C or exit.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        name: str,
        parameters: Mapping[str, Any],
        mirror: bool,
        resume_step: int | None = None,
        experiment: str = "medattn",
        parent: str | None = None,
        key: str | None = None,
        data: Sequence[DataSet] = (),
    ) -> None:
        self._run_dir = run_dir.resolve()
        path = run_dir / METRICS
        kept = "" if resume_step is None else _lines_until(path, resume_step)
        write_text(path, kept)
        self._file = path.open("a", encoding="utf-8")
        hold(self._file)
        if resume_step is not None and (run_dir / FILE).exists():
            self.record = read_record(run_dir)
            self.record.name = name  # a trial that another worker goes on with has another number
        else:
            self.record = new_record(name, experiment, parent, key)
        uri = uri_for(run_dir)
        self.record.tracking_uri = redacted(uri) if mirror else None
        self.record.begin(parameters, provenance(), data)
        self.record.write(run_dir)
        self._mirror = Mirror(self._run_dir, self.record, uri) if mirror else None
        self._closed = False

    @property
    def key(self) -> str:
        """What `parent` of the runs that belong to this one is."""
        return self.record.key

    def log(self, step: int, **values: float) -> None:
        """Append one line. A value that is not finite is written as null, which JSON can hold."""
        if reserved := values.keys() & {"step", "time"}:
            raise ValueError(f"{sorted(reserved)} cannot name a metric")
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = {"step": step, "time": round(time.time(), 3), **finite}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            error.filename = str(self._run_dir / METRICS)  # a write that fails does not say where
            raise
        if self._mirror is not None:
            self._mirror.wake()

    def artifact(self, path: Path) -> None:
        """Have MLflow keep a copy of a file or folder, as it is when MLflow takes it."""
        if not path.exists():
            raise FileNotFoundError(path)
        if (name := self._relative(path)) not in self.record.artifacts:
            self.record.artifacts.append(name)
        self._recorded()

    def model(
        self, folder: Path, *, loader: str, register: str | None, numbers: Mapping[str, float] | None = None
    ) -> None:
        """Have MLflow keep a model folder so that `mlflow.pyfunc.load_model` loads it.

        loader: the module with `_load_pyfunc(folder)`. register: the name under which it becomes a version of
        a registered model, None for none. numbers: of its evaluation.
        """
        if not folder.exists():
            raise FileNotFoundError(folder)
        finite = {name: value for name, value in (numbers or {}).items() if math.isfinite(value)}
        self.record.model = TrainedModel(self._relative(folder), loader, register, finite)
        self._recorded()

    def close(self, status: Status) -> None:
        """End the record. Waits a few seconds at most for MLflow; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.record.end(status)
        try:
            self.record.write(self._run_dir)
        finally:  # also where the disk is full
            if self._mirror is not None:
                self._mirror.close()
            self._file.close()

    def _relative(self, path: Path) -> str:
        path = path.resolve()
        return str(path.relative_to(self._run_dir) if path.is_relative_to(self._run_dir) else path)

    def _recorded(self) -> None:
        self.record.write(self._run_dir)
        if self._mirror is not None:
            self._mirror.wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close("finished")
        else:
            with suppress(OSError):  # of a full disk, say: what went wrong first is what people need to know
                stopped: Status = "pruned" if isinstance(error, Pruned) else "killed"
                self.close("failed" if isinstance(error, Exception) else stopped)


def _lines_until(path: Path, step: int) -> str:
    """The lines of a metrics.jsonl up to and including `step`; an incomplete last line is dropped."""
    if not path.exists():
        return ""
    kept = []
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            if content["step"] <= step:
                kept.append(json.dumps(content) + "\n")
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{path}:{number}: not a line of metrics: {line[:60]!r}; delete this line, then --resume"
            ) from None
    return "".join(kept)
