"""MLflow follows a run in a background thread, so that a slow or absent server never holds a step."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from medattn.training.mlflow_run import MlflowRun
from medattn.training.redaction import redacted
from medattn.training.runrecord import RunRecord
from medattn.training.system_metrics import SystemMetrics

RETRY_SECONDS = 60.0
SEND_SECONDS = 5.0  # between two messages: one carries many lines, and costs the training less
CLOSE_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Mirror:
    """Keeps MLflow's copy of a run up to what the run folder holds, at the end also its state.

    uri: where. A failure is logged as one warning and tried again every minute and at the end, from what the
    server has then. turn: for a run that several processes mirror, a context in which no other one does.
    """

    def __init__(
        self,
        run_dir: Path,
        record: RunRecord,
        uri: str,
        turn: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._run_dir, self._record, self._uri = run_dir, record, uri
        self._turn, self._shared = turn or nullcontext, turn is not None
        self._system = None if self._shared else SystemMetrics(run_dir)
        self._news, self._closing = threading.Event(), threading.Event()
        self._patient_until = 0.0
        self._waits = False  # for the turn of another process, which is no silence of MLflow's
        self._caught_up = False
        self._warned = False
        self._thread = threading.Thread(target=self._follow, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something new in the run folder."""
        self._news.set()

    def idle(self) -> bool:
        """Whether MLflow has all that there is."""
        return self._caught_up and not self._news.is_set()

    def close(self) -> None:
        """Send the rest, or give up CLOSE_SECONDS after MLflow's last answer; later while it takes a file.

        The turn of another process is waited for.
        """
        self._patient_until = max(self._patient_until, time.monotonic() + CLOSE_SECONDS)
        self._closing.set()
        self._news.set()
        while self._thread.is_alive() and (self._waits or time.monotonic() < self._patient_until):
            self._thread.join(0.1)
        if self._thread.is_alive():
            self._warn("no answer in time")

    def _expect(self, seconds: float) -> None:
        self._patient_until = time.monotonic() + max(seconds, CLOSE_SECONDS)

    def _follow(self) -> None:
        copy: MlflowRun | None = None
        while True:
            self._caught_up = False
            self._news.clear()
            last = self._closing.is_set()
            try:
                with self._my_turn():
                    if copy is None or self._shared:  # others may have sent what is there by now
                        copy = MlflowRun(self._run_dir, self._record, self._uri, self._expect)
                    copy.update()
                    self._caught_up = True
                    if last and self._record.status != "running":
                        copy.end()
            except Exception as error:  # noqa: BLE001  a copy may fail in any way, and never ends a training
                self._warn(f"{self._uri}: {type(error).__name__}: {error}")
                copy = None
            if last:
                return
            self._wait(RETRY_SECONDS if copy is None else SEND_SECONDS)

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        with ExitStack() as stack:
            self._waits = self._shared
            try:
                stack.enter_context(self._turn())
                self._expect(CLOSE_SECONDS)
            finally:
                self._waits = False
            yield

    def _wait(self, seconds: float) -> None:
        """For the end of the run; or so long and then for news. Looks at the machine meanwhile."""
        until = time.monotonic() + seconds
        while not self._closing.is_set():
            if self._system is not None and self._system.sample():
                self._news.set()
            if (left := until - time.monotonic()) > 0:
                self._closing.wait(min(left, 1.0))
            elif self._news.wait(1.0):
                return

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "MLflow does not follow this run, metrics.jsonl does (%s); `medattn track sync %s` sends "
                "what it lacks at the end",
                redacted(reason).splitlines()[0][:300],
                self._run_dir,
            )
