"""Where a study is kept, so that many workers share it and a killed one leaves nothing undecided.

A worker asks for a trial in its `turn`, which only one worker has at a time and which ends with its process.
It marks the trial with its name before the turn is over, so a running trial without a name, seen in another's
turn, is one whose worker was killed. Whether a named one lives, a lock on its file says (journal) or its
heartbeat (PostgreSQL).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, fail_stale_trials
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from medattn.errors import InputError
from medattn.training.redaction import redacted

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

WORKER = "worker"  # a trial's attribute: the name of the worker that has it
GRACE = 3  # heartbeats that may fail to come
SETTLED = 2  # heartbeats after an outage until those that do not come mean anything: all failed meanwhile
# libpq's, in seconds and ms, so that a database behind a dead line shows within a minute
CONNECTION = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "tcp_user_timeout": "60000",
}
SCHEMES = ("postgresql", "postgres")

Requeue = Callable[[Study, FrozenTrial], None]
Result = TypeVar("Result")


class Store(Protocol):
    """A storage with what workers need to know of each other.

    worker: this one's name. patience: for how many seconds it is worth to wait for a storage that is away.
    """

    worker: str
    patience: float
    storage: BaseStorage

    def turn(self, at: str = "trials") -> AbstractContextManager[None]:
        """A context in which no other worker of the study asks for a trial, or is at something else."""

    def away(self, error: Exception) -> bool:
        """Whether an error says that the storage cannot be reached, as while its server starts again.

        The store keeps that in mind.
        """

    def fail_dead(self, study: Study) -> None:
        """In a turn: fail trials whose workers are gone, and hand each to `requeue`."""

    def alive(self, trial: Trial) -> AbstractContextManager[None]:
        """A context in which the others know that this worker is at work on the trial."""

    def outages(self) -> AbstractContextManager[None]:
        """A context in which errors of the storage become an InputError without any password."""

    def close(self) -> None:
        """Give back what the store holds."""


def open_store(url: str, study: str, *, heartbeat: int, requeue: Requeue) -> Store:
    """The storage of a URL, journal:FILE or postgresql://...; heartbeat in seconds.

    Raises InputError for another kind of URL and where there is no database or no permission.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "journal" and rest:
        return JournalStore(Path(rest.removeprefix("//")).expanduser(), requeue)
    if scheme.partition("+")[0] in SCHEMES:
        return PostgresStore(url, study, heartbeat, requeue)
    raise InputError(f"--storage {redacted(url)}: expected journal:FILE or postgresql://USER@HOST/DATABASE")


class _JournalLock(JournalFileOpenLock):
    """Optuna's lock of a journal as one that ends with its process.

    A worker that is killed while it writes leaves half a line at most, which the next one takes away.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._held: int | None = None

    def acquire(self) -> bool:
        # not the .lock of optuna-dashboard, which takes one that is there for a dead process's and removes it
        self._held = _locked(self._path.with_name(self._path.name + ".writing"))
        try:
            self._mend()
        except BaseException:  # of SIGTERM too, after which this process still writes results
            self.release()
            raise
        return True

    def _mend(self) -> None:
        with self._path.open("rb+") as file:
            content = file.seek(0, os.SEEK_END)
            if content:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)

    def release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _locked(path: Path, *, wait: bool = True) -> int:
    """A descriptor with the lock of a file; closing it, or the end of the process, gives the lock back.

    Raises BlockingIOError where another process has it and `wait` is False.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def held(path: Path) -> Iterator[None]:
    """One process of this machine at a time; the file is left, as its removal would let two in."""
    descriptor = _locked(path)
    try:
        yield
    finally:
        os.close(descriptor)


class JournalStore:
    """A file, for the workers of one machine. Beside it lie lock files."""

    patience = 0.0

    def __init__(self, path: Path, requeue: Requeue) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._requeue = path, requeue
        self.worker = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._workers = path.with_name(path.name + ".workers")
        self._workers.mkdir(exist_ok=True)
        self._mine = self._workers / self.worker
        self._presence = _locked(self._mine)
        path.touch()
        try:
            self.storage: BaseStorage = JournalStorage(
                JournalFileBackend(str(path), lock_obj=_JournalLock(path))
            )
        except (ValueError, KeyError, AssertionError) as error:
            raise InputError(f"{path}: not a journal of studies ({error}); give another --storage") from None

    @contextmanager
    def turn(self, at: str = "trials") -> Iterator[None]:
        """See Store."""
        with held(self._path.with_name(f"{self._path.name}.{at}")):
            yield

    def away(self, error: Exception) -> bool:
        """See Store; a file fails as other files do."""
        return False

    def fail_dead(self, study: Study) -> None:
        """See Store."""
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get(WORKER)
            if worker is None or not self._lives(str(worker)):
                fail(study, trial, self._requeue)

    def _lives(self, worker: str) -> bool:
        path = self._workers / worker
        if worker == self.worker:
            return True
        if not path.exists():
            return False
        try:
            os.close(_locked(path, wait=False))
        except BlockingIOError:
            return True
        path.unlink(missing_ok=True)
        return False

    @contextmanager
    def alive(self, trial: Trial) -> Iterator[None]:
        """See Store; the lock on this worker's file says it."""
        yield

    def outages(self) -> AbstractContextManager[None]:
        """See Store."""
        return nullcontext()

    def close(self) -> None:
        """See Store."""
        self._mine.unlink(missing_ok=True)
        os.close(self._presence)


class PostgresStore:
    """A database, for workers of any machines."""

    def __init__(self, url: str, study: str, heartbeat: int, requeue: Requeue) -> None:
        for package in ("psycopg", "sqlalchemy"):
            if importlib.util.find_spec(package) is None:
                raise InputError(
                    f"--storage {redacted(url)}: needs the package {package}; "
                    'install it with `pip install "psycopg[binary]" sqlalchemy`'
                )
        self._url, self._study, self._requeue, self._heartbeat = url, study, requeue, heartbeat
        self.patience = float(GRACE * heartbeat)  # then the others run its trial anyhow
        self.worker = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._unreached = time.monotonic()  # when it last was not, as far as this worker can tell
        with self.outages(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            address = _address(url)
            self._engine = self._connect(address)
            with self.turn():  # two that make the tables at the same time would collide
                self._rdb = RDBStorage(
                    address,
                    engine_kwargs={"pool_pre_ping": True},
                    heartbeat_interval=heartbeat,
                    grace_period=GRACE * heartbeat,
                    heartbeat_stale_trial_callback=requeue,
                )
        self.storage: BaseStorage = self._rdb

    @staticmethod
    def _connect(address: str) -> Engine:
        from sqlalchemy import create_engine
        from sqlalchemy.pool import NullPool

        return create_engine(address, poolclass=NullPool)

    @contextmanager
    def outages(self) -> Iterator[None]:
        """Errors of the database become an InputError without its password."""
        from sqlalchemy.exc import ArgumentError, SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, ArgumentError, optuna.exceptions.StorageInternalError) as error:
            text = str(getattr(error, "orig", None) or error.__cause__ or error).strip().splitlines()
            reason = text[0] if text else type(error).__name__
            raise InputError(f"--storage {redacted(self._url)}: {redacted(reason, self._url)}") from None

    @contextmanager
    def turn(self, at: str = "trials") -> Iterator[None]:
        """See Store; PostgreSQL takes the lock back when the connection ends."""
        from sqlalchemy import text

        digest = hashlib.sha256(f"medattn tune {self._study} {at}".encode()).digest()
        lock = {"key": int.from_bytes(digest[:8], "big", signed=True)}
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), lock)
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), lock)

    def away(self, error: Exception) -> bool:
        """See Store."""
        from sqlalchemy.exc import InterfaceError, OperationalError, PendingRollbackError

        cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        away = isinstance(cause, InterfaceError | OperationalError | PendingRollbackError)
        if away:
            self._unreached = time.monotonic()
        return away

    def fail_dead(self, study: Study) -> None:
        """See Store; not soon after an outage, in which the living could not show themselves either."""
        if time.monotonic() - self._unreached < SETTLED * self._heartbeat:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(study)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if WORKER not in trial.user_attrs:
                fail(study, trial, self._requeue)

    @contextmanager
    def alive(self, trial: Trial) -> Iterator[None]:
        """See Store; a thread says it every `heartbeat` seconds."""
        from sqlalchemy.exc import SQLAlchemyError

        over = threading.Event()

        def beat() -> None:
            while not over.wait(self._heartbeat):
                try:
                    self._rdb.record_heartbeat(trial._trial_id)
                except (SQLAlchemyError, optuna.exceptions.OptunaError) as error:
                    self.away(error)  # one of GRACE; the next one may come through

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        with ExitStack() as stack:
            self._rdb.record_heartbeat(trial._trial_id)
            thread.start()
            stack.callback(thread.join)
            stack.callback(over.set)
            yield

    def close(self) -> None:
        """See Store."""
        self._rdb.engine.dispose()
        self._engine.dispose()


def _address(url: str) -> str:
    """The URL as SQLAlchemy and psycopg take it, with what CONNECTION says where it says nothing else."""
    from sqlalchemy import make_url

    address = make_url("postgresql+psycopg:" + url.partition(":")[2])
    return address.update_query_dict(CONNECTION | dict(address.query)).render_as_string(hide_password=False)


def patiently(store: Store, call: Callable[[], Result]) -> Result:
    """The call's result; called again until the storage is there, for as long as the store has patience."""
    until: float | None = None
    while True:
        try:
            return call()
        except Exception as error:
            if not store.away(error):
                raise
            if until is None:
                until = time.monotonic() + store.patience
                print(f"the storage is away; waiting {store.patience:.0f} s for it", flush=True)
            if time.monotonic() > until:
                raise
            time.sleep(1)


def fail(study: Study, trial: FrozenTrial, requeue: Requeue) -> None:
    """Fail a trial whose worker is gone, and hand it to `requeue`."""
    study.tell(trial.number, state=TrialState.FAIL)
    requeue(study, trial)
