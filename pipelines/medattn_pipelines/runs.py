"""Run folders and the device a command works on."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from medattn.atomic import write_text
from medattn.errors import InputError
from medattn_pipelines.config import Config
from medattn_pipelines.configfile import dump


def open_run(config: Config, *, resume: bool, overwrite: bool) -> Path:
    """The run folder with `config.yaml` in it: new, emptied (overwrite) or as it was (resume).

    Raises InputError where a run exists and neither was asked for, where there is nothing to resume, and
    where overwriting would delete a folder that is not a run.
    """
    run = config.run.dir
    assert run is not None, "configfile.load fills in run.dir"
    # a command that stopped before its first step leaves these two, and nothing worth asking about
    exists = run.is_dir() and any(path.name not in ("config.yaml", "plan.json") for path in run.iterdir())
    if exists and not (resume or overwrite):
        raise InputError(
            f"{run}: this run exists; continue it with --resume, replace it with --overwrite, "
            "or choose another folder with run.dir=..."
        )
    if resume and not (run / "checkpoints").is_dir():
        raise InputError(f"{run}: nothing to resume, no checkpoint was written here; leave out --resume")
    if exists and overwrite:
        if not (run / "config.yaml").is_file():
            raise InputError(
                f"{run}: holds no config.yaml, so it is no run and is not overwritten; choose another run.dir"
            )
        shutil.rmtree(run)
    if not resume:
        (run / "plan.json").unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "config.yaml", dump(config))
    return run


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
