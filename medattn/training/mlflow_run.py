"""MLflow's copy of a run, brought up to what the run folder holds: in a training, and by `medattn track`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from medattn.atomic import write_text
from medattn.training import mlflow_model
from medattn.training.mlflow_store import Names, connect, experiment_id, must_make
from medattn.training.redaction import redacted
from medattn.training.runrecord import METRICS, SYSTEM, RunRecord, digest_of, files_of

IDENTITY = "mlflow.json"
KEY, PARENT, SENT, STATUS = "medattn.key", "medattn.parent", "medattn.sent", "medattn.status"
METRICS_PER_CALL, PARAMETERS_PER_CALL = 1000, 25  # MLflow takes 1 MB a call, and 100 parameters
PARAMETER_LENGTH, TAG_LENGTH = 6000, 5000
REQUEST_SECONDS, DATABASE_SECONDS = 10.0, 60.0
BYTES_PER_SECOND = 2e6  # of a slow line, for the patience with a file

Expect = Callable[[float], object]


class MlflowRun:
    """A run in MLflow. What stands there already is recognised and neither sent again nor doubled.

    uri: of the server or database. record: may be continued meanwhile. expect: told when MLflow has answered,
    with the seconds for which silence is nothing unusual then. Whatever MLflow raises leaves a state from
    which another MlflowRun goes on. sent: how many of each kind; stale: points of steps that were trained
    twice, before and after a resume, of which metrics.jsonl holds the second.
    """

    def __init__(self, run_dir: Path, record: RunRecord, uri: str, expect: Expect = lambda seconds: None):
        self.run_dir, self.record, self.uri, self._expect = run_dir, record, uri, expect
        self.sent: Counter[str] = Counter()
        self.stale = 0
        self._names = Names()
        self._offsets = {METRICS: 0, SYSTEM: 0}
        self._known: dict[str, set[tuple[int, int]]] = {}
        self._done: set[str] = set()
        if must_make(uri, run_dir):
            expect(DATABASE_SECONDS)
        self.client = connect(uri, run_dir)
        self._experiment = experiment_id(self.client, record.experiment, uri, run_dir)
        expect(REQUEST_SECONDS)
        self.run_id = self._find() or self._create()
        identity = {"tracking_uri": redacted(uri), "run_id": self.run_id}
        write_text(run_dir / IDENTITY, json.dumps(identity) + "\n")
        self._describe()

    def update(self) -> None:
        """Send what is new in the run folder."""
        self._join_parent()
        for file in self._offsets:
            self._send_lines(file)
        self.stale += sum(map(len, self._known.values()))
        self._known.clear()  # what comes now is new
        for path in map(Path, self.record.artifacts):
            self._send_artifact(self.run_dir / path)
        if self.record.model is not None:
            self._send_model()

    def end(self) -> None:
        """Set the final state, and take in runs that came before the one that they belong to.

        A session that ended later, on another machine that works on the same run, has the last word. MLflow
        has no state for pruned runs: they are killed, and a tag says the rest.
        """
        self._expect(REQUEST_SECONDS)
        for child in self._search(PARENT, self.record.key):
            if "mlflow.parentRunId" not in child.data.tags:
                self._set_tag("mlflow.parentRunId", self.run_id, child.info.run_id)
        found, ended_ms = self.client.get_run(self.run_id), self.record.ended_ms
        if found.info.status != "RUNNING" and (found.info.end_time or 0) > (ended_ms or 0):
            return
        status = "KILLED" if self.record.status == "pruned" else self.record.status.upper()
        if self.record.status == "pruned" and STATUS not in found.data.tags:
            self._set_tag(STATUS, "pruned")
        if (found.info.status, found.info.end_time) != (status, ended_ms):
            self.client.set_terminated(self.run_id, status, ended_ms)
            self.sent["final states"] += 1

    def _search(self, tag: str, value: str) -> list[Any]:
        found = []
        page: str | None = None
        while page is None or page:
            runs = self.client.search_runs([self._experiment], f"tags.`{tag}` = '{value}'", page_token=page)
            found += runs
            page = runs.token or ""
        return found

    def _find(self) -> str | None:
        """The run's id. A request that timed out may have made a run all the same: one of them is kept."""
        ids: list[str] = sorted(run.info.run_id for run in self._search(KEY, self.record.key))
        if not ids:
            return None
        for run_id in ids[1:]:
            self.client.delete_run(run_id)
        for name in self.client.get_run(ids[0]).data.metrics:
            self._expect(REQUEST_SECONDS)
            points = self.client.get_metric_history(ids[0], name)
            self._known[name] = {(point.step, point.timestamp) for point in points}
        return ids[0]

    def _create(self) -> str:
        self.sent["runs"] += 1
        tags = {KEY: self.record.key} | ({PARENT: self.record.parent} if self.record.parent else {})
        run = self.client.create_run(
            self._experiment, self.record.started_ms, tags=tags, run_name=self.record.name
        )
        return str(run.info.run_id)

    def _describe(self) -> None:
        """Parameters, tags and data. Parameters cannot change in MLflow; the record has changes in tags."""
        from mlflow.entities import Dataset, DatasetInput, Param, RunTag

        run = self.client.get_run(self.run_id)
        if self.record.status == "running" and run.info.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        if run.info.run_name != self.record.name:
            self.client.update_run(self.run_id, name=self.record.name)
        names = Names()
        given = {names(name): text[:PARAMETER_LENGTH] for name, text in self.record.parameters.items()}
        new = [Param(name, text) for name, text in given.items() if name not in run.data.params]
        for start in range(0, len(new), PARAMETERS_PER_CALL):
            self._expect(REQUEST_SECONDS)
            self.client.log_batch(self.run_id, params=new[start : start + PARAMETERS_PER_CALL])
        names = Names()
        texts = {names(name): text[:TAG_LENGTH] for name, text in self.record.tags.items()}
        tags = [RunTag(name, text) for name, text in texts.items() if run.data.tags.get(name) != text]
        for start in range(0, len(tags), PARAMETERS_PER_CALL):
            self.client.log_batch(self.run_id, tags=tags[start : start + PARAMETERS_PER_CALL])
        there = {(one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs}
        data = [
            DatasetInput(Dataset(one.name, one.digest, "local", json.dumps({"uri": one.source})), [])
            for one in self.record.data
            if (one.name, one.digest) not in there
        ]
        if data:
            self.client.log_inputs(self.run_id, data)
        self.sent += Counter({"parameters": len(new), "tags": len(tags), "data sets": len(data)})

    def _join_parent(self) -> None:
        """Stand below the run that this one belongs to, as soon as that is there."""
        if self.record.parent is None or PARENT in self._done:
            return
        self._expect(REQUEST_SECONDS)
        if parents := sorted(run.info.run_id for run in self._search(KEY, self.record.parent)):
            known = self.client.get_run(self.run_id).data.tags.get("mlflow.parentRunId")
            if known != parents[0]:
                self._set_tag("mlflow.parentRunId", parents[0])
            self._done.add(PARENT)

    def _set_tag(self, name: str, text: str, run_id: str | None = None) -> None:
        self.client.set_tag(run_id or self.run_id, name, text)
        self.sent["tags"] += 1

    def _send_lines(self, name: str) -> None:
        """Whole lines after those already sent."""
        path = self.run_dir / name
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._offsets[name])
            news = file.read()
        news = news[: news.rfind(b"\n") + 1]
        metrics = list(self._points(news))
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._expect(REQUEST_SECONDS)
            self.client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_PER_CALL])
        self._offsets[name] += len(news)
        self.sent["metric values"] += len(metrics)

    def _points(self, lines: bytes) -> Iterator[Any]:
        """MLflow's metrics of lines, but for those that it has."""
        from mlflow.entities import Metric

        for line in map(json.loads, lines.splitlines()):
            step, milliseconds = line.pop("step"), round(line.pop("time") * 1000)
            for given, value in line.items():
                name = self._names(given)
                if value is None:
                    continue
                known = self._known.get(name, set())
                if (step, milliseconds) in known:
                    known.remove((step, milliseconds))
                else:
                    yield Metric(name, value, milliseconds, step)

    def _send_artifact(self, path: Path) -> None:
        """Send a file or folder unless MLflow has these very bytes."""
        name = path.name
        if name in self._done or not path.exists():
            return
        digest, tag = digest_of(path), self._names(f"{SENT}.{name}")
        if self.client.get_run(self.run_id).data.tags.get(tag) != digest:
            self._send_files(path, name)
            self.client.set_tag(self.run_id, tag, digest)  # last: half a folder does not count
            self.sent["artifacts"] += 1
        self._done.add(name)

    def _send_files(self, path: Path, name: str) -> None:
        for file in files_of(path):
            self._expect(REQUEST_SECONDS + file.stat().st_size / BYTES_PER_SECOND)
            inside = None if file == path else (Path(name) / file.relative_to(path)).parent.as_posix()
            self.client.log_artifact(self.run_id, str(file), inside)

    def _send_model(self) -> None:
        """Send the model in a form that MLflow loads, and register it."""
        model, name = self.record.model, "model"
        assert model is not None
        folder = self.run_dir / model.folder
        if name in self._done or not folder.exists():
            return
        digest, tag = digest_of(folder), f"{SENT}.{name}"
        run = self.client.get_run(self.run_id)
        if run.data.tags.get(tag) != digest:
            self._expect(DATABASE_SECONDS)  # MLflow imports half a dozen libraries for it
            with mlflow_model.written(folder, model.loader) as made:
                self._send_files(made, name)
            self.client.set_tag(self.run_id, tag, digest)
            self.sent["models"] += 1
        if model.register is not None:
            self._expect(DATABASE_SECONDS)
            source = f"{run.info.artifact_uri}/{name}"
            self.sent["registered versions"] += mlflow_model.register(
                self.client, model.register, source, self.run_id, digest, model.numbers
            )
        self._done.add(name)
