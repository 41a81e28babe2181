"""Choosing an implementation: explicit choices are obeyed or refused, never replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

from torch import Tensor

Impl = Literal["naive", "eager", "triton"]
Function = TypeVar("Function", bound=Callable[..., Any])


def select(operator: str, implementations: Mapping[Impl, Function], impl: Impl | None, q: Tensor) -> Function:
    """The implementation that `impl` names; for None triton on CUDA where the operator has it, else eager.

    Raises ValueError for a name that is unknown or that this operator does not have.
    """
    if impl is None:
        usable = q.is_cuda and "triton" in implementations and find_spec("triton") is not None
        return implementations["triton" if usable else "eager"]
    if impl in implementations:
        return implementations[impl]
    known = " or ".join(repr(name) for name in implementations)
    if impl == "triton":
        raise ValueError(f"{operator} has no Triton kernel in this version: impl='triton' must be {known}")
    raise ValueError(f"{operator}: unknown {impl=}; expected {known}")
