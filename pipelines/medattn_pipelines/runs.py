"""Run folders and the device a command works on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from medattn.atomic import write_text
from medattn.errors import InputError
from medattn.training.distributed import ALONE, Processes
from medattn_pipelines.configfile import AnyConfig

TRACES = ("metrics.jsonl", "checkpoints", "model", "plan.json")  # what only a run writes
LAUNCHES = ".launches"  # the torchruns that opened the run, in the run folder


def resumes(run: Path, resume: bool, processes: Processes) -> bool:
    """Whether to continue a run: as asked, and always after torchrun has started the training again.

    It does so with the same command when a process died or machines came or went: then that it has opened the
    run counts, and neither --overwrite nor a missing --resume. Says so. All processes get the same answer.
    """
    launches = processes.gathered(_launch())
    begun = (run / LAUNCHES).read_text(encoding="utf-8").splitlines() if (run / LAUNCHES).is_file() else []
    restarted = any(launch in begun for launch in launches)
    if restarted and processes.main:
        print(f"{run}: torchrun started this training again; it goes on from its last checkpoint")
    # the main process's: another machine's may have been started later, when there was a run to resume
    return processes.gathered(restarted or resume)[0]


def open_run(config: AnyConfig, *, resume: bool, overwrite: bool, processes: Processes = ALONE) -> Path:
    """The run folder: new, emptied (overwrite) or as it was (resume). The main process opens it for all.

    A run that was killed before its first checkpoint resumes from its first step.

    Raises InputError where a run exists and neither was asked for, where there is no run to resume, and where
    a folder holds other things than a run: it is neither deleted nor mixed with one.
    """
    launches = [launch for launch in processes.gathered(_launch()) if launch is not None]
    if processes.main:
        _open(config.run_dir, resume, overwrite)
        if launches:
            write_text(config.run_dir / LAUNCHES, "".join(f"{launch}\n" for launch in launches))
    processes.wait()
    return config.run_dir


def _launch() -> str | None:
    """The folder that a torchrun makes for itself, and keeps through restarts; None where there is none."""
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # <folder>/attempt_<n>/<rank>/error.json
    return str(file.parents[2]) if file.name and file.parent.is_dir() else None


def _open(run: Path, resume: bool, overwrite: bool) -> None:
    names = {path.name for path in run.iterdir()} if run.is_dir() else set()
    if names and not names & set(TRACES):
        raise InputError(f"{run}: holds {sorted(names)[0]!r} and no run; choose another run.dir")
    # a command that stopped before its first step leaves these at most, and nothing worth asking about
    before = {"config.yaml", "plan.json", "checkpoints", LAUNCHES}
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
