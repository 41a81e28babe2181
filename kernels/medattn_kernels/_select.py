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
    operator: str,
    implementations: Mapping[Impl, Function],
    impl: Impl | None,
    q: Tensor,
    v: Tensor,
    refusal: str = "",
) -> Function:
    """The implementation that `impl` names; for None triton on CUDA where it takes the arguments, else eager.

    refusal: why this operator's Triton kernels cannot take the arguments besides q and v, empty if they can.
    Raises ValueError for a name that is unknown and for triton where it cannot run.
    """
    if impl is None:
        usable = q.is_cuda and not (refusal or _refusal(q, v))
        return implementations["triton" if usable else "eager"]
    if impl not in implementations:
        known = " or ".join(repr(name) for name in implementations)
        raise ValueError(f"{operator}: unknown {impl=}; expected {known}")
    if impl == "triton" and (reason := _refusal(q, v) or refusal):
        raise ValueError(f"{operator}: impl='triton' {reason}; use impl='eager'")
    return implementations[impl]


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
