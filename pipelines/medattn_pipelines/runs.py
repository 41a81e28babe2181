"""Run folders and the device a command works on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from medattn.errors import InputError
from medattn.training.distributed import ALONE, Processes
from medattn_pipelines.configfile import AnyConfig

TRACES = ("metrics.jsonl", "checkpoints", "model", "plan.json")  # what only a run writes


def open_run(config: AnyConfig, *, resume: bool, overwrite: bool, processes: Processes = ALONE) -> Path:
    """The run folder: new, emptied (overwrite) or as it was (resume). The main process opens it for all.

    A run that was killed before its first checkpoint resumes from its first step.

    Raises InputError where a run exists and neither was asked for, where there is no run to resume, and where
    a folder holds other things than a run: it is neither deleted nor mixed with one.
    """
    if processes.main:
        _open(config.run_dir, resume, overwrite)
    processes.wait()
    return config.run_dir


def _open(run: Path, resume: bool, overwrite: bool) -> None:
    names = {path.name for path in run.iterdir()} if run.is_dir() else set()
    if names and not names & set(TRACES):
        raise InputError(f"{run}: holds {sorted(names)[0]!r} and no run; choose another run.dir")
    # a command that stopped before its first step leaves these at most, and nothing worth asking about
    before = {"config.yaml", "plan.json", "checkpoints"}
    begun = bool({name for name in names if not name.startswith(".writing-")} - before) or (
        "checkpoints" in names and any((run / "checkpoints").iterdir())
    )
    if begun and not (resume or overwrite):
        raise InputError(
            f"{run}: this run exists; continue it with --resume, replace it with --overwrite, "
            "or choose another folder with run.dir=..."
        )
    if resume and not run.is_dir():
        raise InputError(
            f"{run}: nothing to resume, there is no such run; correct run.dir, or leave --resume out"
        )
    if names and not resume:
        shutil.rmtree(run)
    # first of all what marks it as a run, for the next command if this one is killed
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)


def machine(config: AnyConfig, processes: Processes) -> dict[str, Any]:
    """What a training's numbers depend on besides config, data and versions, by names like a config's."""
    return {
        "machine.device": processes.device.type,
        "machine.precision": str(choose_precision(config.training.precision, processes.device))[6:],
        "machine.threads": torch.get_num_threads(),
        "machine.processes": processes.world,
    }


def choose_device(wanted: str) -> torch.device:
    """auto, cpu or cuda as a device. Raises InputError for cuda where there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device 'cuda' was asked for, but torch finds no CUDA device; use device=cpu or auto"
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """bfloat16 where it was asked for, or for auto where the device computes in it."""
    if wanted == "auto":
        return torch.bfloat16 if _computes_bf16(device) else torch.float32
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
