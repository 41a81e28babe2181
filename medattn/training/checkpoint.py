"""Checkpoints to resume from: a folder that appears whole, while the one before it survives until then."""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim.swa_utils import AveragedModel

from medattn.atomic import replaced_folder, restore_folder
from medattn.errors import InputError
from medattn.training.checkpoint_reading import PlainPlanner, PlainReader
from medattn.training.distributed import ALONE, Processes
from medattn.training.loop import State
from medattn.training.sharding import is_sharded


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    averaged: AveragedModel,
    optimizer: torch.optim.Optimizer,
    state: State,
    processes: Processes = ALONE,
) -> None:
    """Write model, averaged weights, optimizer, random state and position; atomic, also against a full disk.

    All processes call it. What is sharded is written by all, each its share; else by the main one. Buffers,
    random state and position are the main one's. The format is torch's distributed checkpoint, which any
    number of processes can read, sharded or not.
    """
    sharded = is_sharded(model)
    if not (sharded or processes.main):
        return
    writers = processes if sharded else ALONE
    for module in (model, averaged):
        writers.share_buffers(module)
    content = _content(model, averaged, optimizer, state)
    if not processes.main:
        content = {name: content[name] for name in ("model", "optimizer", "averaged")}
    try:
        with _building(folder, writers) as building, _alone():
            save(
                content,
                checkpoint_id=building,
                process_group=writers.control,
                no_dist=writers.control is None,
            )
    except (OSError, CheckpointException) as error:
        raise InputError(
            f"{folder}: checkpoint of step {state.step} could not be written ({_cause(error)}); "
            "the previous one is intact: free some space, then continue with --resume"
        ) from None


def has_checkpoint(folder: Path) -> bool:
    """Whether there is one to resume from, put back where a kill moved it aside."""
    return restore_folder(folder)


def load_checkpoint(
    folder: Path, model: nn.Module, averaged: AveragedModel, optimizer: torch.optim.Optimizer, state: State
) -> None:
    """Continue exactly where `save_checkpoint` was called; fills in all arguments."""
    if not has_checkpoint(folder):
        raise InputError(f"{folder}: no checkpoint to resume from; start again with --overwrite")
    content = _content(model, averaged, optimizer, state)
    try:
        with _alone():
            load(content, storage_reader=PlainReader(folder), planner=PlainPlanner(), no_dist=True)
    except (OSError, CheckpointException, pickle.UnpicklingError) as error:
        raise InputError(
            f"{folder}: cannot be loaded ({_cause(error)}); it was made with another network or is damaged: "
            "start again with --overwrite"
        ) from None
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    averaged.load_state_dict(content["averaged"])
    torch.set_rng_state(content["random"])
    for name, value in json.loads(content["state"]).items():
        setattr(state, name, value)


@contextmanager
def _building(folder: Path, writers: Processes) -> Iterator[Path]:
    """A folder that takes the place of `folder` when the block ends well in the main process."""
    with ExitStack() as stack:
        building = stack.enter_context(replaced_folder(folder)) if writers.main else folder
        yield writers.gathered(building)[0]


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
        # one text, so that a run that began with an earlier State, of fewer fields, goes on
        "state": json.dumps(dataclasses.asdict(state)),
    }


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next((failure[0] for failure in error.failures.values()), error)
    return (str(error) or type(error).__name__).splitlines()[0]
