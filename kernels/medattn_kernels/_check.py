"""Argument checks shared by all operators. Messages name the argument, its value and the rule."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

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


def check_table(name: str, table: Tensor, width: int, q: Tensor) -> None:
    """Check a table of relative positions [R, width]: R odd, floating point, on q's device."""
    if table.ndim != 2 or table.shape[0] % 2 == 0 or table.shape[1] != width:
        raise ValueError(f"{name} must be [R, {width}] with an odd number of rows R, got {shape(table)}")
    check_parameter(name, table, q)


def check_parameter(name: str, tensor: Tensor, q: Tensor) -> None:
    """Check that a parameter of the operator is floating point and on q's device."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on the device of q, got {tensor.device} and {q.device}")


def per_axis(name: str, value: PerAxis, axes: int, smallest: int) -> tuple[int, ...]:
    """Spread an int over all axes, or check one int per axis; every value at least `smallest`."""
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or not all(isinstance(n, int) and n >= smallest for n in values):
        raise ValueError(
            f"{name} must be an int of at least {smallest}, or {axes} of them (one per spatial axis), got {value!r}"
        )
    return values


def halo_per_axis(halo: Halo, axes: int) -> tuple[tuple[int, int], ...]:
    """(before, after) per axis from an int, or from one int or (before, after) pair per axis."""
    entries = (halo,) * axes if isinstance(halo, int) else tuple(halo)
    pairs = tuple((n, n) if isinstance(n, int) else tuple(n) for n in entries)
    if len(pairs) != axes or not all(len(pair) == 2 and min(pair) >= 0 for pair in pairs):
        raise ValueError(
            f"halo must be an int, or per spatial axis ({axes} here) an int or (before, after), "
            f"none negative, got {halo!r}"
        )
    return tuple((pair[0], pair[1]) for pair in pairs)


def shape(tensor: Tensor) -> list[int]:
    """A tensor's shape as it should read in a message."""
    return list(tensor.shape)
