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
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim.swa_utils import AveragedModel

from medattn.atomic import replaced_folder, restore_folder
from medattn.errors import InputError
from medattn.training.checkpoint_reading import PlainPlanner, PlainReader
from medattn.training.distributed import ALONE, Processes, is_sharded
from medattn.training.loop import State


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
    for module in (model, averaged.module):
        writers.share_buffers(module)
    content = _content(model, averaged, optimizer, state if processes.main else None)
    try:
        with _building(folder, writers) as building, _without_warning():
            table = save(
                content,
                checkpoint_id=building,
                process_group=writers.control,
                no_dist=writers.control is None,
            )
            if processes.main:
                _require_shares(folder, building, table)
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
    trained = _trained(content)
    try:
        with _without_warning():
            load(content, storage_reader=PlainReader(folder), planner=_Planner(), no_dist=True)
    except (OSError, CheckpointException, pickle.UnpicklingError) as error:
        raise _foreign(folder, _cause(error)) from None
    if others := sorted(trained - _trained(content)):
        raise _foreign(folder, f"{others[0]} was not trained")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=content["model"],
        optim_state_dict=content["optimizer"],
        options=StateDictOptions(strict=False),  # a parameter may have no moments; `load` saw to the rest
    )
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


def _require_shares(folder: Path, building: Path, table: Metadata) -> None:
    """Torch makes a folder that is missing, so each process may have written into one of its own."""
    named = {stored.relative_path for stored in table.storage_data.values()}
    if missing := sorted(named - {path.name for path in building.iterdir()}):
        raise InputError(
            f"{folder}: {missing[0]} is missing, which another process has written; all processes must see "
            "one file system; the previous checkpoint is intact: move the run there, then --resume"
        )


@contextmanager
def _without_warning() -> Iterator[None]:
    """Torch would say each time that one process reads or writes alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Planner(PlainPlanner):
    """Leaves out the moments of a parameter of which the checkpoint has none, as it never had a gradient."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Before torch's planner looks for all that is in `state_dict`."""
        assert metadata is not None
        moments = state_dict["optimizer"]["state"]
        for name, parts in list(moments.items()):
            if not any(f"optimizer.state.{name}.{part}" in metadata.state_dict_metadata for part in parts):
                del moments[name]
        super().set_up_planner(state_dict, metadata, is_coordinator)


def _foreign(folder: Path, cause: str) -> InputError:
    return InputError(
        f"{folder}: cannot be loaded ({cause}); it was made with another network or is damaged: "
        "start again with --overwrite"
    )


def _trained(content: dict[str, Any]) -> set[str]:
    """The parameters that the optimizer moves."""
    return {name for group in content["optimizer"]["param_groups"] for name in group["params"]}


def _content(
    model: nn.Module, averaged: AveragedModel, optimizer: torch.optim.Optimizer, state: State | None
) -> dict[str, Any]:
    """state: None for a process that leaves the position and what goes with it to the main one."""
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments, "averaged": averaged.state_dict()}
    if state is None:
        return content
    # one text, so that a run that began with an earlier State, of fewer fields, goes on
    return content | {"random": torch.get_rng_state(), "state": json.dumps(dataclasses.asdict(state))}


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next((failure[0] for failure in error.failures.values()), error)
    return (str(error) or type(error).__name__).splitlines()[0]
