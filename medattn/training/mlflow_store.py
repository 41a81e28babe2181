"""Where MLflow keeps runs: its client, the database beside a run, and the names that it takes."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

from medattn.training.runrecord import FILE

DEFAULTS = {  # MLflow's own switches, where the user has not set them
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # give up on a dead server quickly: there is another attempt
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # what lies in the working directory is no requirement of a model
}
CONNECT_SECONDS = 5
KEY_LENGTH = 250  # of the names of parameters, metrics and tags


def uri_for(run_dir: Path) -> str:
    """MLFLOW_TRACKING_URI, or the database beside the run folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_database(run_dir)}"


def connect(uri: str, run_dir: Path) -> Any:
    """MLflow's client. A database beside the run folder is made if need be, which takes seconds."""
    for variable, value in DEFAULTS.items():
        os.environ.setdefault(variable, value)
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print a password in the address
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one warning is enough: ours
    from mlflow.tracking import MlflowClient

    # the variable is read when MLflow is first imported, which a caller may have done before
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    if must_make(uri, run_dir):
        _make(_database(run_dir), run_dir)
    if uri.startswith(("postgresql", "mysql")):
        _reach(uri)
    return MlflowClient(uri)


def must_make(uri: str, run_dir: Path) -> bool:
    """Whether `connect` has to make the database beside the run folder first."""
    return uri == f"sqlite:///{_database(run_dir)}" and not _database(run_dir).exists()


def experiment_id(client: Any, name: str, uri: str, run_dir: Path) -> str:
    """Of the experiment of this name, which is made if it is not there."""
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, _artifacts(uri, run_dir)))
    except Exception:
        if found := client.get_experiment_by_name(name):  # another run was first
            return str(found.experiment_id)
        raise


class Names:
    """Names as MLflow takes them, distinct where the given ones are.

    >>> names = Names()
    >>> names("Parotid (left)"), names("Parotid (left)"), names("Parotid [left]"), names("../x")
    ('Parotid _left_', 'Parotid _left_', 'Parotid _left_ e68bfc', '_./x')
    """

    def __init__(self) -> None:
        self._allowed: dict[str, str] = {}
        self._taken: set[str] = set()

    def __call__(self, name: str) -> str:
        if name not in self._allowed:
            allowed = _allowed(name)
            if allowed in self._taken or len(allowed) > KEY_LENGTH:
                suffix = " " + hashlib.sha256(name.encode()).hexdigest()[:6]
                allowed = allowed[: KEY_LENGTH - len(suffix)] + suffix
            self._taken.add(allowed)
            self._allowed[name] = allowed
        return self._allowed[name]


def _allowed(name: str) -> str:
    """Characters that MLflow refuses replaced, and parts that would mean another folder."""
    parts = re.sub(r"[^\w\-./: ]", "_", name).split("/")
    return "/".join(f"_{part[1:]}" if part in ("", ".", "..") else part for part in parts)


def _database(run_dir: Path) -> Path:
    """Beside the run folder; a run in the folder of another one, as a trial in its sweep's, shares that's."""
    folder = run_dir.resolve().parent
    return (folder.parent if (folder / FILE).exists() else folder) / "mlflow.db"


def _artifacts(uri: str, run_dir: Path) -> str | None:
    """Where artefacts go: a server knows; with a database MLflow would take the working directory."""
    if uri.startswith(("http", "databricks", "file", "uc")):
        return None
    beside = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else _database(run_dir)
    return (beside.resolve().parent / "mlflow_artifacts").as_uri()


def _reach(uri: str) -> None:
    """Raise what the driver raises where a database server is away; MLflow would try for five minutes."""
    from sqlalchemy import create_engine

    engine = create_engine(uri, connect_args={"connect_timeout": CONNECT_SECONDS})
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _make(database: Path, run_dir: Path) -> None:
    """MLflow makes its tables aside, which takes seconds: a kill meanwhile leaves no half database."""
    from mlflow.tracking import MlflowClient

    making = run_dir / ".writing-mlflow.db"
    making.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{making}").search_experiments()
    if database.exists():  # another run was first
        making.unlink()
    else:
        making.rename(database)
