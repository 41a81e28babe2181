"""MLflow's copy of a run: a thread follows `metrics.jsonl`, so a slow or absent server never holds a step."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import subprocess
import threading
from collections import deque
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import medattn
from medattn.atomic import write_text

RETRY_SECONDS = 60.0
CLOSE_SECONDS = 10.0
# MLflow's own switches, where the user has not set them: no telemetry; give up on a dead server quickly
MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
METRICS_PER_CALL, PARAMETERS_PER_CALL = 1000, 100  # limits of MLflow's REST interface
PARAMETER_LENGTH = 6000

logger = logging.getLogger(__name__)


class Mirror:
    """Sends what `metrics.jsonl` holds to MLflow, from its first line, in a background thread.

    Where: MLFLOW_TRACKING_URI, or mlflow.db beside the run folder. A resumed run goes on under its MLflow id,
    which is kept in the run folder; lines that MLflow has already are recognised there and not doubled. A
    failure is logged as one warning and tried again every minute and at the end.
    """

    def __init__(self, run_dir: Path, name: str, parameters: Mapping[str, Any], *, resume: bool) -> None:
        self._run_dir, self._name, self._parameters = run_dir.resolve(), name, parameters
        self._database = self._run_dir.parent / "mlflow.db"
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self._database}"
        self._identity = run_dir / "mlflow.json"
        if not resume:
            self._identity.unlink(missing_ok=True)
        self._artifacts: deque[Path] = deque()
        self._sent_bytes = 0
        self._status: str | None = None
        self._news, self._closing = threading.Event(), threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._follow, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is a new line."""
        self._news.set()

    def artifact(self, path: Path) -> None:
        """Copy a file or folder as soon as MLflow is there."""
        self._artifacts.append(path)
        self._news.set()

    def close(self, status: str) -> None:
        """Send the rest and end MLflow's run with this status, or give up after CLOSE_SECONDS."""
        self._status = status.upper()
        self._closing.set()
        self._news.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn("no answer in time")

    def _follow(self) -> None:
        client: Any = None
        while True:
            self._news.clear()
            last = self._closing.is_set()
            failed = False
            try:
                if client is None:
                    client, run_id = self._connect()
                self._send(client, run_id)
                if last:
                    client.set_terminated(run_id, self._status)
            except Exception as error:  # noqa: BLE001  a copy may fail in any way, and never ends a training
                self._warn(f"{self._uri}: {type(error).__name__}: {error}")
                failed = True
            if last:
                return
            if failed:
                self._closing.wait(RETRY_SECONDS)
            else:
                self._news.wait()

    def _connect(self) -> tuple[Any, str]:
        """MLflow's client and the id of this run there, with its parameters and tags set."""
        for variable, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(variable, value)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one warning is enough: ours
        from mlflow.entities import Param, RunTag
        from mlflow.tracking import MlflowClient

        # the variable is read when MLflow is first imported, which a caller may have done before
        logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
        if self._is_local() and not self._database.exists():
            self._make_database()
        client = MlflowClient(self._uri)
        run_id = self._known_run()
        if run_id is None:
            run_id = client.create_run(self._experiment(client), run_name=self._name).info.run_id
            write_text(self._identity, json.dumps({"tracking_uri": self._uri, "run_id": run_id}) + "\n")
        else:
            client.update_run(run_id, status="RUNNING")
        known = client.get_run(run_id).data.params
        new, tags = [], provenance()
        for name, value in self._parameters.items():
            text = str(value)[:PARAMETER_LENGTH]
            if name not in known:
                new.append(Param(_allowed(name), text))
            elif known[name] != text:  # MLflow's parameters cannot change; a resumed run's may
                tags[f"resumed.{_allowed(name)}"] = text
        for start in range(0, len(new), PARAMETERS_PER_CALL):
            client.log_batch(run_id, params=new[start : start + PARAMETERS_PER_CALL])
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        return client, run_id

    def _known_run(self) -> str | None:
        if not self._identity.exists():
            return None
        identity = json.loads(self._identity.read_text(encoding="utf-8"))
        return str(identity["run_id"]) if identity["tracking_uri"] == self._uri else None

    def _experiment(self, client: Any) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "medattn")
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        files = (self._run_dir.parent / "mlflow_artifacts").as_uri()
        return str(client.create_experiment(name, files if self._is_local() else None))

    def _is_local(self) -> bool:
        return self._uri == f"sqlite:///{self._database}"

    def _make_database(self) -> None:
        """MLflow makes its tables aside, which takes seconds: a kill meanwhile leaves no half database."""
        from mlflow.tracking import MlflowClient

        making = self._run_dir / ".writing-mlflow.db"
        making.unlink(missing_ok=True)
        MlflowClient(f"sqlite:///{making}").search_experiments()
        if self._database.exists():  # another run was first
            making.unlink()
        else:
            making.rename(self._database)

    def _send(self, client: Any, run_id: str) -> None:
        """Whole lines after those already sent, then waiting files."""
        from mlflow.entities import Metric

        with (self._run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(self._sent_bytes)
            news = file.read()
        news = news[: news.rfind(b"\n") + 1]
        metrics = []
        for line in map(json.loads, news.splitlines()):
            step, milliseconds = line.pop("step"), round(line.pop("time") * 1000)
            metrics += [Metric(_allowed(k), v, milliseconds, step) for k, v in line.items() if v is not None]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])
        self._sent_bytes += len(news)
        while self._artifacts:
            path = self._artifacts[0]
            if path.is_dir():
                client.log_artifacts(run_id, str(path), artifact_path=path.name)
            else:
                client.log_artifact(run_id, str(path))
            self._artifacts.popleft()

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "MLflow does not follow this run, metrics.jsonl does (%s)", reason.splitlines()[0][:300]
            )


def provenance() -> dict[str, str]:
    """What ran: versions of medattn, Python and the main libraries, and the git commit of a checkout."""
    tags = {"version.medattn": medattn.__version__, "version.python": platform.python_version()}
    for package in ("torch", "monai", "numpy"):
        tags[f"version.{package}"] = version(package)
    git = ("git", "-C", str(Path(medattn.__file__).parent))
    # an installed copy may lie inside somebody's repository, whose commit says nothing about it
    tracked = _output(*git, "ls-files", "__init__.py")
    if tracked and (commit := _output(*git, "rev-parse", "HEAD")):
        tags["mlflow.source.git.commit"] = commit
    return tags


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _allowed(name: str) -> str:
    """The name with characters that MLflow refuses replaced."""
    return re.sub(r"[^\w\-./: ]", "_", name)
