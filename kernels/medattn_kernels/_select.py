"""Choosing an implementation: explicit choices are obeyed or refused, never replaced."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Impl = Literal["naive", "eager", "triton"]
Function = TypeVar("Function", bound=Callable[..., Any])

HAS_TRITON = find_spec("triton") is not None
WIDEST_KEY, WIDEST_VALUE = 128, 256
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def select(
    operator: str, implementations: Mapping[Impl, Function], impl: Impl | None, q: Tensor, v: Tensor
) -> Function:
    """The implementation that `impl` names; for None triton on CUDA where the operator has it, else eager.

    Raises ValueError for a name that is unknown or that this operator does not have.
    """
    if impl is None:
        usable = q.is_cuda and "triton" in implementations and not _refusal(q, v)
        return implementations["triton" if usable else "eager"]
    if impl in implementations:
        if impl == "triton" and (reason := _refusal(q, v)):
            raise ValueError(f"{operator}: impl='triton' {reason}; use impl='eager'")
        return implementations[impl]
    known = " or ".join(repr(name) for name in implementations)
    if impl == "triton":
        raise ValueError(f"{operator} has no Triton kernel in this version: impl='triton' must be {known}")
    raise ValueError(f"{operator}: unknown {impl=}; expected {known}")


def _refusal(q: Tensor, v: Tensor) -> str:
    """Why the Triton kernels cannot take these tensors; empty if they can."""
    if q.dtype not in FUSED_DTYPES:
        return f"takes float32, bfloat16 or float16, got {q.dtype}"
    if q.shape[-1] > WIDEST_KEY or v.shape[-1] > WIDEST_VALUE:
        return (
            f"takes heads of at most {WIDEST_KEY} for q and k and {WIDEST_VALUE} for v, "
            f"got {q.shape[-1]} and {v.shape[-1]}"
        )
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    if not q.is_cuda and (q.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1"):
        return (
            f"runs on a GPU, got q on {q.device.type} (on a CPU, TRITON_INTERPRET=1 set before Python starts "
            "interprets the kernels, slowly)"
        )
    return ""
