"""What ran: `run.json` in the run folder, from which MLflow's copy of a run can be made at any time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import medattn
from medattn.atomic import write_text
from medattn.errors import InputError
from medattn.training.redaction import redacted

FORMAT = 1
FILE = "run.json"
METRICS = "metrics.jsonl"
SYSTEM = "system.jsonl"

Status = Literal["running", "finished", "failed", "killed", "pruned"]


@dataclass(frozen=True)
class DataSet:
    """What a run learned from. digest: of 32 hexadecimal digits, another one for other data."""

    name: str
    digest: str
    source: str


@dataclass(frozen=True)
class TrainedModel:
    """A model folder. loader: the module that MLflow loads it with. register: the name under which it becomes
    a version of a registered model, None for no version. numbers: of its evaluation, by name."""

    folder: str
    loader: str
    register: str | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass
class RunRecord:
    """A run but for its metrics.

    key: the run's name for all time, whatever MLflow calls it. parent: the key of the run that it belongs to.
    tracking_uri: where MLflow was to follow, without secrets; None where it was not to. started_ms, ended_ms:
    since 1970. parameters: of the first session; what a resumed one changed is in `tags`. artifacts: files
    and folders, relative to the run folder or absolute.
    """

    key: str
    name: str
    experiment: str
    parent: str | None
    tracking_uri: str | None
    started_ms: int
    ended_ms: int | None = None
    status: Status = "running"
    parameters: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    data: list[DataSet] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    model: TrainedModel | None = None

    def write(self, run_dir: Path) -> None:
        """Write run.json."""
        content = {"format": FORMAT} | asdict(self)
        write_text(run_dir / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def begin(self, parameters: Mapping[str, Any], tags: Mapping[str, str], data: Sequence[DataSet]) -> None:
        """A session of the run starts, the first or one that resumes it."""
        given = {name: redacted(str(value)) for name, value in parameters.items()}
        self.parameters = self.parameters or dict(given)
        self.data = self.data or list(data)
        known = self.parameters | {f"data.{one.name}": one.digest for one in self.data}
        given |= {f"data.{one.name}": one.digest for one in data}
        changed = {f"resumed.{name}": text for name, text in given.items() if known.get(name) != text}
        self.tags |= {**tags, **{f"data.{one.name}": one.digest for one in self.data}, **changed}
        self.status, self.ended_ms = "running", None

    def end(self, status: Status) -> None:
        """The session ends now."""
        self.status, self.ended_ms = status, now_ms()


def new_record(name: str, experiment: str, parent: str | None, key: str | None) -> RunRecord:
    """Of a run that starts now. MLFLOW_EXPERIMENT_NAME takes the place of the experiment.

    Raises ValueError for a key that cannot be searched for.
    """
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment
    if not re.fullmatch(r"[\w.:/ -]{1,250}", key or "-"):
        raise ValueError(f"key {key!r}: expected 1 to 250 letters, digits or any of . : / - _ and spaces")
    return RunRecord(key or uuid.uuid4().hex, name, experiment, parent, None, now_ms())


def read_record(run_dir: Path) -> RunRecord:
    """The record that `write` wrote. Raises InputError where there is none or it is damaged."""
    path = run_dir / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise InputError(f"{path}: written by another version of medattn, expected format {FORMAT}")
        content["data"] = [DataSet(**one) for one in content["data"]]
        content["model"] = None if content["model"] is None else TrainedModel(**content["model"])
        return RunRecord(**{name: content[name] for name in (f.name for f in fields(RunRecord))})
    except OSError:
        raise InputError(
            f"{run_dir}: no run here that was recorded ({FILE} is missing); give the folder of a run, "
            "such as runs/hn_ct"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: damaged ({reason}); restore it, or train with --overwrite") from None


def now_ms() -> int:
    """Milliseconds since 1970."""
    return round(time.time() * 1000)


def hold(file: Any, *, shared: bool = False) -> None:
    """Mark an open file as being written, until this process ends in whichever way. shared: by several."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:  # a file system without locks, or a second writer: neither is a reason not to train
        return


def is_held(path: Path) -> bool:
    """Whether any process of this machine writes the file now."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


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
        changed = _output(*git, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        tags["git.dirty"] = str(bool(changed)).lower()
    return tags


def digest_of(path: Path) -> str:
    """Of a file's bytes, or of a folder's files by their names: 32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for file in files_of(path):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        found.update(f"{os.path.relpath(file, path)}\0{content}\n".encode())
    return found.hexdigest()


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files below the folder, in order."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
