"""Checkpoints to resume from: a folder that appears whole, while the one before it survives until then."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim.swa_utils import AveragedModel

from medattn.errors import InputError
from medattn.training.loop import State


def save_checkpoint(
    folder: Path, model: nn.Module, averaged: AveragedModel, optimizer: torch.optim.Optimizer, state: State
) -> None:
    """Write model, averaged weights, optimizer, random state and position; atomic, also against a full disk.

    The format is torch's distributed checkpoint, which other world sizes can read.
    """
    building, previous = (
        folder.with_name(f".writing-{folder.name}"),
        folder.with_name(f".previous-{folder.name}"),
    )
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.parent.mkdir(parents=True, exist_ok=True)
        with _alone():
            save(_content(model, averaged, optimizer, state), checkpoint_id=building, no_dist=True)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise InputError(
            f"{folder}: checkpoint of step {state.step} could not be written ({_cause(error)}); "
            "the previous one is intact: free some space, then continue with --resume"
        ) from None
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    building.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def load_checkpoint(
    folder: Path, model: nn.Module, averaged: AveragedModel, optimizer: torch.optim.Optimizer, state: State
) -> None:
    """Continue exactly where `save_checkpoint` was called; fills in all arguments."""
    previous = folder.with_name(f".previous-{folder.name}")
    if not folder.exists() and previous.exists():  # killed between the two renames
        previous.rename(folder)
    if not folder.exists():
        raise InputError(f"{folder}: no checkpoint to resume from; start again with --overwrite")
    content = _content(model, averaged, optimizer, state)
    try:
        with _alone():
            load(content, checkpoint_id=folder, no_dist=True)
    except (OSError, CheckpointException) as error:
        raise InputError(
            f"{folder}: cannot be loaded ({_cause(error)}); it was made with another network or is damaged: "
            "start again with --overwrite"
        ) from None
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    averaged.load_state_dict(content["averaged"])
    torch.set_rng_state(content["random"])
    for field in dataclasses.fields(State):
        setattr(state, field.name, content["state"][field.name])


@contextmanager
def _alone() -> Iterator[None]:
    """One process is what we mean; torch would warn of it each time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _content(
    model: nn.Module, averaged: AveragedModel, optimizer: torch.optim.Optimizer, state: State
) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {
        "model": weights,
        "optimizer": moments,
        "averaged": averaged.state_dict(),
        "random": torch.get_rng_state(),
        "state": dataclasses.asdict(state),
    }


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next((failure[0] for failure in error.failures.values()), error)
    return (str(error) or type(error).__name__).splitlines()[0]
