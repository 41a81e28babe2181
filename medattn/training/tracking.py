"""The record of a run: `metrics.jsonl` is the truth, MLflow a mirror that may be down."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from medattn.atomic import write_text
from medattn.errors import InputError
from medattn.training.mirror import Mirror

Status = Literal["finished", "failed", "killed"]


class Tracker:
    """Writes one JSON object per line, {"step": .., "time": .., name: value, ..}, and lets MLflow follow.

    run_dir: an existing folder. name: of the run, for people. parameters: dotted path -> value.
    mirror: follow in MLflow. resume_step: None starts anew; a step drops what was logged after it, so that no
    step stands twice, and mends a last line that a kill tore. Raises InputError for a metrics.jsonl that is
    damaged elsewhere.

    Used as a context manager it closes itself: finished, failed on an exception, killed on Ctrl-C or exit.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        name: str,
        parameters: Mapping[str, Any],
        mirror: bool,
        resume_step: int | None = None,
    ) -> None:
        path = run_dir / "metrics.jsonl"
        kept = "" if resume_step is None else _lines_until(path, resume_step)
        write_text(path, kept)
        self._file = path.open("a", encoding="utf-8")
        self._mirror = Mirror(run_dir, name, parameters, resume=resume_step is not None) if mirror else None

    def log(self, step: int, **values: float) -> None:
        """Append one line. A value that is not finite is written as null, which JSON can hold."""
        if reserved := values.keys() & {"step", "time"}:
            raise ValueError(f"{sorted(reserved)} cannot name a metric")
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = {"step": step, "time": round(time.time(), 3), **finite}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._mirror is not None:
            self._mirror.wake()

    def artifact(self, path: Path) -> None:
        """Have MLflow keep a copy of a file or folder."""
        if not path.exists():
            raise FileNotFoundError(path)
        if self._mirror is not None:
            self._mirror.artifact(path)

    def close(self, status: Status) -> None:
        """End the record. Waits a few seconds at most for MLflow; a second call does nothing."""
        self._file.close()
        if self._mirror is not None:
            self._mirror.close(status)
            self._mirror = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close("finished")
        else:
            self.close("failed" if isinstance(error, Exception) else "killed")


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
