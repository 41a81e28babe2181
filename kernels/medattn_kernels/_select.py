"""Choosing an implementation: explicit choices are obeyed or refused, never replaced."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
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
    Raises ValueError for a name that is unknown and for triton where it cannot run, RuntimeError under a
    torch.func transform.
    """
    if impl is None:
        impl = "triton" if q.is_cuda and not (refusal or _refusal(q, v)) else "eager"
    elif impl not in implementations:
        known = " or ".join(repr(name) for name in implementations)
        raise ValueError(f"{operator}: unknown {impl=}; expected {known}")
    elif impl == "triton" and (reason := _refusal(q, v) or refusal):
        raise ValueError(f"{operator}: impl='triton' {reason}; use impl='eager'")
    if impl != "naive" and _transformed():
        raise RuntimeError(
            f"{operator}: impl={impl!r} has no rule for torch.func transforms such as grad, vjp and jvp; "
            "use impl='naive'"
        )
    return implementations[impl]


def as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the dtype of the autocast region around, if any, as PyTorch's own attention takes them.

    `torch.library.register_autocast` would not do: it knows one dtype, not the one that the region has.
    """
    device = q.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (x.to(dtype) if x.dtype in FUSED_DTYPES else x for x in (q, k, v))
    return q, k, v


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Products in the dtype of their factors, on x's device; one that has no autocast is left alone."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _transformed() -> bool:
    """Whether a torch.func transform other than vmap is at work; torch.compile finds out by itself."""
    if torch.compiler.is_compiling():
        return False
    running: Any = torch._C._functorch.peek_interpreter_stack()  # None outside of any
    return running is not None and running.key() != torch._C._functorch.TransformType.Vmap


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
