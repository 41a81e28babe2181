"""Axial attention through Triton: the operator as torch knows it, and the launches behind it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medattn_kernels._launch import padded

Strides = tuple[int, int, int, int, int, int]
Pointer = tuple[Tensor, Strides]

FORWARD_SIDE, BACKWARD_SIDE = 32, 16  # queries and keys per tile: the most that registers hold
PROGRAMS = 1024  # of the pass over the tables, together: a few for every multiprocessor of a large GPU


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axis: int,
    rel_q: Tensor | None,
    rel_k: Tensor | None,
    rel_v: Tensor | None,
    gain: Tensor | None,
    span: int | None,
    scale: float,
    separate: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`medattn_kernels.axial_attention` in float32, bfloat16 or float16, differentiable once."""
    content, position, _ = _attention(q, k, v, rel_q, rel_k, rel_v, gain, axis, span or 0, scale, separate)
    return (content, position) if separate else content


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_q: Tensor | None,
    rel_k: Tensor | None,
    rel_v: Tensor | None,
    gain: Tensor | None,
    axis: int,
    span: int,
    scale: float,
    separate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Content (or the whole output), position (empty unless separate), log-sum-exp in units of log 2."""
    from medattn_kernels.axial import kernel

    content, position, lse = _empty(q, v, axis, separate)
    if not q.numel():
        return content, position, lse
    launch = _Launch(q, v, (rel_q, rel_k, rel_v), gain, axis, span, scale, separate, side=FORWARD_SIDE)
    launch.run(kernel.forward, *launch.inputs(q, k, v), launch.at(content), launch.at(position), lse)
    return content, position, lse


def run_backward(
    dcontent: Tensor,
    dposition: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_q: Tensor | None,
    rel_k: Tensor | None,
    rel_v: Tensor | None,
    gain: Tensor | None,
    content: Tensor,
    position: Tensor,
    lse: Tensor,
    axis: int,
    span: int,
    scale: float,
    separate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the three tables and the gain; empty for what is not there."""
    from medattn_kernels.axial import kernel

    tables = (rel_q, rel_k, rel_v)
    dq, dk, dv, *dtables, dgain = _empty_gradients(q, k, v, *tables, gain)
    if not q.numel():
        drel_q, drel_k, drel_v = (x.zero_() for x in dtables)
        return dq, dk, dv, drel_q, drel_k, drel_v, dgain.zero_()
    launch = _Launch(q, v, tables, gain, axis, span, scale, separate, side=BACKWARD_SIDE)
    inputs, gradients = launch.inputs(q, k, v), (launch.at(dcontent), launch.at(dposition))
    outputs = launch.at(content), launch.at(position)
    delta = torch.empty_like(lse)
    gains = None if gain is None else lse.new_empty(3, *launch.grid)
    launch.run(kernel.backward_queries, *inputs, *outputs, *gradients, lse, delta, launch.at(dq), gains)
    launch.run(kernel.backward_keys, *inputs, *gradients, lse, delta, launch.at(dk), launch.at(dv), gains)
    if any(table is not None for table in tables):
        sums = launch.table_sums()
        grid = next(tuple(x.shape[:2]) for x in sums if x is not None)
        # its six sums stay in registers only if eight warps share them
        arguments = (*inputs, *gradients, lse, delta, sums, launch.lines, grid[1])
        launch.run(kernel.backward_tables, *arguments, grid=grid, num_warps=8)
        dtables = [
            empty if table is None or total is None else launch.by_row(total, table)
            for empty, table, total in zip(dtables, tables, sums, strict=True)
        ]
    if gain is not None and gains is not None:
        by_head = gains.view(3, -1, launch.heads, launch.tiles)
        dgain = by_head.sum((1, 3), dtype=torch.float64).to(gain.dtype)
    drel_q, drel_k, drel_v = dtables
    return dq, dk, dv, drel_q, drel_k, drel_v, dgain


_attention = torch.library.custom_op("medattn::axial_attention", run_forward, mutates_args=())
_backward = torch.library.custom_op("medattn::axial_attention_backward", run_backward, mutates_args=())


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    axis, _, _, separate = rest[-4:]
    return _empty(q, v, axis, separate)


@_backward.register_fake
def _(dcontent: Tensor, dposition: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_empty_gradients(q, k, v, *rest[:4]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.numbers = inputs[7:]
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dcontent: Tensor | None, dposition: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    content, position = saved[7:9]
    dcontent = torch.zeros_like(content) if dcontent is None else dcontent
    dposition = torch.zeros_like(position) if dposition is None else dposition
    gradients = _backward(dcontent, dposition, *saved, *ctx.numbers)
    present = [g if x is not None else None for x, g in zip(saved[:7], gradients, strict=True)]
    return *present, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_remember)


def _empty(q: Tensor, v: Tensor, axis: int, separate: bool) -> tuple[Tensor, Tensor, Tensor]:
    length = q.shape[1 + axis]
    lines = math.prod(q.shape[:-1]) // length
    return (
        v.new_empty(v.shape),
        v.new_empty(v.shape if separate else (0,)),
        q.new_empty(lines, length, dtype=torch.float32),
    )


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor | None) -> list[Tensor]:
    gradients = [x.new_empty(x.shape) for x in (q, k, v)]
    return gradients + [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in parameters]


class _Launch:
    """How one call is cut: tiles, grid and the arguments that all kernels share."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        tables: tuple[Tensor | None, ...],
        gain: Tensor | None,
        axis: int,
        span: int,
        scale: float,
        separate: bool,
        *,
        side: int,
    ) -> None:
        off = [n for a, n in enumerate(q.shape[1:-2]) if a != axis]
        self.q = q
        self.axis, self.heads, self.length = axis, q.shape[-2], q.shape[1 + axis]
        self.lines = math.prod(q.shape[:-1]) // self.length
        widths = q.shape[-1], v.shape[-1]
        columns = [padded(n) for n in widths]
        self.tiles = -(-self.length // side)
        self.grid = (self.lines * self.tiles,)
        self.tables = tuple(None if t is None else t.to(q.dtype).contiguous() for t in tables)
        self.gain = None if gain is None else gain.float().contiguous()
        self.reach = min(span // 2, self.length) if span else self.length
        shape = (*([1] * (2 - len(off)) + off), self.heads, self.length, *widths)
        rows = tuple(0 if t is None else len(t) for t in tables)
        self.numbers = rows, shape, self.reach, scale
        self.options = {
            "HAS_GAIN": gain is not None,
            "SEPARATE": separate,
            "B": side,
            "W": columns[0],
            "X": columns[1],
            "num_warps": 8 if max(columns) > 64 else 4,
            "num_stages": 1,
        }

    def run(self, kernel: Any, *arguments: Any, grid: tuple[int, ...] | None = None, **options: int) -> None:
        """Launch a kernel on the device of q; options take the place of the launch's own."""
        with torch.cuda.device_of(self.q):  # type: ignore[no-untyped-call]
            kernel[grid or self.grid](*arguments, *self.numbers, **self.options | options)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        """What every kernel takes first."""
        return self.at(q), self.at(k), self.at(v), self.tables, self.gain

    def at(self, x: Tensor) -> Pointer:
        """A tensor and its strides: batch, two places off the axis, axis, head, channel."""
        if x.ndim < 4:
            return x, (0, 0, 0, 0, 0, 0)  # a part that is not there
        first, *spatial, head, channel = x.stride()
        along = spatial.pop(self.axis)
        one, two = [0] * (2 - len(spatial)) + spatial
        return x, (first, one, two, along, head, channel)

    def table_sums(self) -> tuple[Tensor | None, ...]:
        """Room for table gradients by part of the lines, tile diagonal and offset in the tile."""
        side = self.options["B"]
        reach = min(self.tiles - 1, -(-self.reach // side))
        diagonals = 2 * reach + 1
        parts = max(1, min(self.lines, PROGRAMS // diagonals))
        widths = (self.options["W"], self.options["W"], self.options["X"])
        return tuple(
            None if table is None else table.new_empty(parts, diagonals, 2 * side, width, dtype=torch.float32)
            for table, width in zip(self.tables, widths, strict=True)
        )

    def by_row(self, sums: Tensor, table: Tensor) -> Tensor:
        """Add up [parts, diagonals, 2 B, W] over parts and over the offsets that share a row of the table."""
        side, last = sums.shape[2] // 2, len(table) - 1
        early, late = torch.split(sums.sum(0, dtype=torch.float64)[..., : table.shape[1]], side, 1)
        # the late offsets of a diagonal are the early ones of the next
        by_offset = (F.pad(early, (0, 0, 0, 0, 0, 1)) + F.pad(late, (0, 0, 0, 0, 1, 0))).flatten(0, 1)
        first = last // 2 - (len(early) // 2) * side - (side - 1)  # row of the first offset
        before, after = max(0, -first), max(0, first + len(by_offset) - len(table))
        inside = by_offset[before : len(by_offset) - after]
        rows = by_offset.new_zeros(table.shape)
        rows[first + before : first + before + len(inside)] = inside
        rows[0] += by_offset[:before].sum(0)
        rows[-1] += by_offset[len(by_offset) - after :].sum(0)
        return rows.to(table.dtype)
