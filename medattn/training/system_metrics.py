"""How busy the machine is while a run trains: `system.jsonl`, which MLflow's copy follows as well."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from medattn.training.runrecord import SYSTEM

SECONDS = 15.0


class SystemMetrics:
    """Samples what MLflow's own monitors measure: processor, memory, disk and network where the package
    psutil is installed, GPUs where nvidia-ml-py is. Lines as in metrics.jsonl; `step` counts samples."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / SYSTEM
        self._monitors: list[Any] | None = None
        self._step = 0
        self._due = time.monotonic() + SECONDS

    def sample(self) -> bool:
        """Append a line if it is time; whether it was."""
        if time.monotonic() < self._due:
            return False
        self._due = time.monotonic() + SECONDS
        if self._monitors is None:
            self._monitors = _monitors()
            self._step = self._mend()
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        if not values:
            return False
        self._step += 1
        line = {"step": self._step, "time": round(time.time(), 3)} | values
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return True

    def _mend(self) -> int:
        """The number of whole lines of an earlier session; a line that a kill tore is dropped."""
        if not self._path.exists():
            return 0
        with self._path.open("r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
        return content.count(b"\n")


def _monitors() -> list[Any]:
    found: list[Any] = []
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        found += [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    except ImportError:  # no psutil
        pass
    try:
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        found.append(GPUMonitor())
    except (ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
        pass
    return found
