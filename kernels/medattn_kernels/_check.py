"""Argument checks shared by all operators. Messages name the argument, its value and the rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import SymInt, Tensor

PerAxis = int | Sequence[int]
Halo = int | Sequence[int | tuple[int, int]]


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Check q, k [B, *size, H, D] and v [B, *size, H, E]; return size (one to three axes).

    Raises TypeError for a dtype and ValueError for a shape or device that does not fit.
    """
    if not 4 <= q.ndim <= 6:
        raise ValueError(f"q must be [B, *size, H, D] with one to three spatial axes, got {shape(q)}")
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, got k {shape(k)} and q {shape(q)}")
    if v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"v must match q in all but its last axis, got v {shape(v)} and q {shape(q)}")
    if min(q.shape[1:]) < 1 or v.shape[-1] < 1:
        raise ValueError(f"every axis but the batch needs at least one entry, got q {shape(q)}, v {shape(v)}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, got {tensor.dtype} and {q.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, got {tensor.device} and {q.device}")
    return tuple(q.shape[1:-2])


def check_axis(axis: int, q: Tensor) -> int:
    """Check a spatial axis of q, 0-based or counted from the last one; return it 0-based."""
    axes = q.ndim - 3
    if not -axes <= axis < axes:
        raise ValueError(f"axis must be a spatial axis, {-axes} to {axes - 1} for q {shape(q)}, got {axis=}")
    return axis % axes


def check_span(span: int | None) -> None:
    """Check the number of keys that a query sees along an axis: odd, or None for all."""
    if span is not None and (span < 1 or span % 2 == 0):
        raise ValueError(f"span must be odd and positive, or None for the whole line, got {span=}")


def check_table(name: str, table: Tensor, width: int, q: Tensor) -> None:
    """Check a table of relative positions [R, width]: R odd, floating point, on q's device."""
    if table.ndim != 2 or table.shape[0] % 2 == 0 or table.shape[1] != width:
        raise ValueError(f"{name} must be [R, {width}] with an odd number of rows R, got {shape(table)}")
    check_parameter(name, table, q)


def check_bias(name: str, bias: Tensor, axes: int, q: Tensor) -> None:
    """Check a table of position biases [H, *R]: one odd R per axis, floating point, on q's device."""
    heads = q.shape[-2]
    if bias.ndim != 1 + axes or bias.shape[0] != heads or any(rows % 2 == 0 for rows in bias.shape[1:]):
        raise ValueError(
            f"{name} must be [{heads}, {', '.join(['R'] * axes)}] (heads, an odd R per axis), "
            f"got {shape(bias)}"
        )
    check_parameter(name, bias, q)


def check_parameter(name: str, tensor: Tensor, q: Tensor) -> None:
    """Check that a parameter of the operator is floating point and on q's device."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on the device of q, got {tensor.device} and {q.device}")


def per_axis(name: str, value: PerAxis, axes: int, smallest: int) -> tuple[int, ...]:
    """Spread an int over all axes, or check one int per axis; every value at least `smallest`."""
    values = _spread(value, axes)
    if len(values) != axes or not all(isinstance(n, int | SymInt) and n >= smallest for n in values):
        raise ValueError(
            f"{name} must be an int of at least {smallest}, or one per spatial axis ({axes} here), "
            f"got {value!r}"
        )
    return values


def halo_per_axis(halo: Halo, axes: int) -> tuple[tuple[int, int], ...]:
    """(before, after) per axis from an int, or from one int or (before, after) pair per axis."""
    pairs = [_spread(entry, 2) for entry in _spread(halo, axes)]
    sides = [side for pair in pairs for side in pair]
    if (
        len(pairs) != axes
        or any(len(pair) != 2 for pair in pairs)
        or not all(isinstance(n, int) and n >= 0 for n in sides)
    ):
        raise ValueError(
            f"halo must be an int, or per spatial axis ({axes} here) an int or (before, after), "
            f"none negative, got {halo!r}"
        )
    return tuple((pair[0], pair[1]) for pair in pairs)


def _spread(value: Any, count: int) -> tuple[Any, ...]:
    """A sequence as a tuple, anything else repeated."""
    return tuple(value) if isinstance(value, Sequence) else (value,) * count


def shape(tensor: Tensor) -> list[int]:
    """A tensor's shape as it should read in a message."""
    return list(tensor.shape)
