"""The folder of a trained model: `model.safetensors`, and `model.json` with all but the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from medattn.atomic import atomic_path, replaced_folder, write_text
from medattn.errors import InputError

FORMAT = 1
VOLUMES, CLASSIFICATION, PANOPTIC = "volumes", "classification", "panoptic"
Card = TypeVar("Card")


def write_model(folder: Path, task: str, card: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write the folder with both files, whole or not at all, in place of what was there.

    task: what the model does. card: in plain values.
    """
    content = {"format": FORMAT, "task": task} | dict(card)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(folder) as building:  # not file by file: weights beside another's card mean nothing
        write_weights(building / "model.safetensors", weights)
        write_text(building / "model.json", json.dumps(content, indent=1) + "\n")


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights as safetensors, whole or not at all, into a folder that is there."""
    # contiguous: safetensors refuses weights that lie channels-last
    plain = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(plain))  # save_file would keep other users from reading it


def model_task(folder: Path) -> str:
    """What the model in a folder does. Raises InputError where there is none."""
    task: str = _read(folder)["task"]
    return task


def read_card(folder: Path, task: str, parse: Callable[[Mapping[str, Any]], Card]) -> Card:
    """The card of a model for this task. Raises InputError where there is none or it is damaged."""
    content = _read(folder)
    if content.pop("task") != task:
        raise InputError(f"{folder}: no model for {task}; `medattn predict` chooses by what the model does")
    try:
        return parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder / 'model.json'}: damaged ({reason}); copy the model again") from None


def load_weights(folder: Path, network: nn.Module, name: str) -> None:
    """Load the weights into a network, called `name` in the error that says they are of another one."""
    try:
        network.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{folder / 'model.safetensors'}: does not hold the weights of {name} ({reason})"
        ) from None


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            f"{folder}: no model here (model.json is missing); give the `model` folder of a run"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InputError(f"{path}: written by another version of medattn, expected format {FORMAT}")
    return {"task": VOLUMES} | content
