"""Weights that others have saved: read without running their code, and fitted to a network or refused."""

from __future__ import annotations

import itertools
import pickle
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medattn.errors import InputError

WRAPPERS = (  # names under which training scripts keep the network's weights, the surest first
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights"),
    "params",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of DataParallel, torch.compile and other wrappers
LISTED = 5  # misfits that a message names
NOT_READABLE = (
    *(RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, RecursionError, struct.error),
)
SNIPPET = """\
  import torch; checkpoint = torch.load({path!r}, map_location="cpu", weights_only=False)
  torch.save(checkpoint["state_dict"], "plain.pth")  # of a pickled network: checkpoint.state_dict()"""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file of torch.save or safetensors by their names there, on the CPU.

    Wrappers are taken off: a dict around the state dict ("state_dict", "model", ...) and a prefix that all
    names share ("module.", ...). No code of the file is ever run. Raises InputError where the file is
    missing, damaged, no checkpoint, would have to run code, or holds no weights.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; give a checkpoint file")
    with path.open("rb") as file:
        head = file.read(1024)
    content: Any
    if head[8:9] == b"{":  # behind the length of its header, as every safetensors file begins
        content = _read_safetensors(path)
    elif head.startswith((b"PK", b"\x80")):  # torch.save, now and before version 1.6
        content = _read_torch(path)
    else:
        raise InputError(f"{path}: {_what_else(head)}")
    weights = _without_prefix(_find_weights(path, content))
    if not weights:
        keys = (
            f" ({', '.join(map(str, itertools.islice(content, 5)))})" if isinstance(content, Mapping) else ""
        )
        raise InputError(f"{path}: holds {_article(content)}{keys} and no weights; save a state dict")
    for name, value in weights.items():
        if value.is_meta or value.is_quantized or value.is_complex() or value.layout != torch.strided:
            raise InputError(f"{path}: {name} is no ordinary tensor of real numbers; save it as one")
        if not bool(value.float().isfinite().all()):
            raise InputError(f"{path}: {name} holds numbers that are not finite; take another checkpoint")
    return weights


def fit_weights(
    network: nn.Module, weights: Mapping[str, Tensor], path: Path, *, name: str, theirs: Mapping[str, str]
) -> None:
    """Load weights under our names into a network, all of them or none.

    theirs: our name -> the name in the file, for messages. Raises InputError with the counts of missing,
    unexpected and differently shaped weights and the first five with their shapes.
    """
    expected = network.state_dict()
    # counters of batches have no effect on the output and are absent before torch 0.4.1
    required = [key for key in expected if not key.endswith("num_batches_tracked")]
    missing = [f"missing {key} {_shape(expected[key])}" for key in required if key not in weights]
    unexpected = [
        f"unexpected {theirs.get(key, key)} {_shape(value)}"
        for key, value in weights.items()
        if key not in expected
    ]
    shapes = [
        f"{theirs.get(key, key)} is {_shape(value)}, expected {_shape(expected[key])}"
        for key, value in weights.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if found := list(_in_turn(shapes, unexpected, missing)):
        raise InputError(
            f"{path}: not the weights of {name}: {len(shapes)} of another shape, "
            f"{len(unexpected)} unexpected, {len(missing)} missing; the first: {'; '.join(found[:LISTED])}"
        )
    network.load_state_dict(weights)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, error) from None
    return found


def _read_torch(path: Path) -> Any:
    """What torch.save wrote, of plain types only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and archive formats; errors tell more
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise _refusal(path, named[1] if named else "instructions beyond plain weights") from None
    except NOT_READABLE as error:
        if "weights_only=True" in str(error):  # compiled programs and archives that torch reads no other way
            raise _refusal(path, "a program, or a format from before torch 0.1.10") from None
        raise _damaged(path, error) from None


def _refusal(path: Path, found: str) -> InputError:
    return InputError(
        f"{path}: not read, because it would run code that came with the file ({found}); if you trust "
        "whoever made it, save the weights alone where its code is installed, and convert plain.pth:\n"
        + SNIPPET.format(path=path.name)
    )


def _damaged(path: Path, error: Exception) -> InputError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return InputError(
        f"{path}: damaged, incomplete or no checkpoint ({reason[0][:120]}); copy or download it again"
    )


def _what_else(head: bytes) -> str:
    """A sentence about a file that no checkpoint begins like."""
    if not head:
        return "an empty file; copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself; run `git lfs pull` where it came from"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            "a web page, not a checkpoint; the download asks for something first, open the link in a browser"
        )
    return (
        f"no checkpoint: expected a file of torch.save or safetensors, found {head[:12]!r} at its beginning"
    )


def _find_weights(path: Path, content: Any, depth: int = 3) -> dict[str, Tensor]:
    """The state dict in what a training script saved: the content itself or a dict inside it."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return {}  # such as an optimizer's state, which counts its tensors
    own = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    inner = {
        key: found
        for key, value in content.items()
        if depth and (found := _find_weights(path, value, depth - 1))
    }
    known = [key for key in WRAPPERS if key in inner]
    if not inner or len(own) > max(map(len, inner.values())):
        return own
    if not known and len(inner) > 1:
        raise InputError(f"{path}: holds several sets of weights, {', '.join(inner)}; save one of them alone")
    return inner[known[0] if known else next(iter(inner))]


def _without_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            return _without_prefix({name.removeprefix(prefix): value for name, value in weights.items()})
    return weights


def _in_turn(*lists: list[str]) -> Iterator[str]:
    """One of each list after the other, so that a short message shows every kind."""
    return (text for row in itertools.zip_longest(*lists) for text in row if text is not None)


def _shape(value: Tensor) -> str:
    return str(list(value.shape))


def _article(content: Any) -> str:
    kind = type(content).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
