"""Lambda attention through Triton: the operator as torch knows it, and the launches behind it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from medattn_kernels._launch import at, padded
from medattn_kernels.lambdas.eager import cropped

WIDEST_KEY = 64
LAMBDAS = 2**13  # numbers of one program's lambdas, in registers
PRODUCTS = 2**11  # numbers of outer products q dy' that a backward pass forms at a time
MOST_PLACES = 16  # whose lambdas these are
OFFSETS, OFFSETS_OF_TABLE = 32, 64  # per tile: in sums over them, and of the table's gradient
POSITIONS = 64  # per tile of the sums for the first lambda
BOX = 64  # positions whose values' gradients one program finds; half as many where lambdas are large
LARGE = 2**10  # numbers of one lambda that are many
PROGRAMS = 1024  # of sums over positions


def lambda_attention(q: Tensor, k: Tensor, v: Tensor, *, table: Tensor | None) -> Tensor:
    """`medattn_kernels.lambda_attention` in float32, bfloat16 or float16, differentiable once."""
    out: Tensor = _attention(q, k, v, table)[0]
    return out


def refusal(q: Tensor) -> str:
    """Why the kernels cannot take these queries; empty if they can."""
    return "" if q.shape[-1] <= WIDEST_KEY else f"takes keys of at most {WIDEST_KEY}, got {q.shape[-1]}"


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, and float32: the first lambda by depth [B, U, K, V], the largest keys and sums [B, U, K]."""
    from medattn_kernels.lambdas import kernel

    out, content, highest, total = _empty(q, k, v)
    if q.numel():
        launch = _Launch(q, k, v, table)
        highest, total, content = launch.content(kernel, k, v)
        summed = content.sum(1, dtype=torch.float64).float()
        inputs = at(q), at(v), launch.table, summed, at(out)
        launch.run(kernel.forward, launch.tiles, *inputs, *launch.numbers, **launch.position_tiles)
    return out, content, highest, total


def run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    content: Tensor,
    highest: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the table; empty without a table."""
    from medattn_kernels.lambdas import kernel

    dq, dk, dv, dtable = _empty_gradients(q, k, v, table)
    if not q.numel():
        return dq, dk, dv, dtable.zero_()
    launch = _Launch(q, k, v, table)
    summed = content.sum(1, dtype=torch.float64).float()
    inputs = at(dout), at(v), launch.table, summed, at(dq)
    launch.run(kernel.backward_queries, launch.tiles, *inputs, *launch.numbers, **launch.position_tiles)
    gradient = launch.content_gradient(kernel, q, dout)
    inner = (content * gradient[:, None]).sum(-1)
    statistics = gradient, inner, highest, total
    tensors = [at(x) for x in (q, k, v, dout)]
    results = at(dk), at(dv)
    boxes, options = launch.boxes()
    grid = (math.prod(boxes), len(q) * k.shape[-2])
    arguments = (*tensors, launch.table, *statistics, *results, launch.size, boxes, *launch.numbers[1:])
    launch.run(kernel.backward_values, grid, *arguments, **options)
    if table is not None:
        dtable = launch.table_gradient(kernel, q, v, dout, table)
    return dq, dk, dv, dtable


_attention = torch.library.custom_op("medattn::lambda_attention", run_forward, mutates_args=())
_backward = torch.library.custom_op("medattn::lambda_attention_backward", run_backward, mutates_args=())


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(q, k, v)


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(q, k, v, table)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _differentiate(ctx: Any, dout: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dtable = _backward(dout, *ctx.saved_tensors)
    return dq, dk, dv, None if ctx.saved_tensors[3] is None else dtable


_attention.register_autograd(_differentiate, setup_context=_remember)


def _empty(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by_channel = len(k), *k.shape[-2:]
    return (
        v.new_empty(*q.shape[:-1], v.shape[-1]),
        v.new_empty(*by_channel, v.shape[-1], dtype=torch.float32),
        k.new_empty(by_channel, dtype=torch.float32),
        k.new_empty(by_channel, dtype=torch.float32),
    )


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    last = q.new_empty(0) if table is None else table.new_empty(table.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), last


class _Launch:
    """How one call is cut: tiles, grids and the arguments that the kernels share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> None:
        self.q, self.axes = q, q.ndim - 3
        self.batch, self.heads, self.depths = len(q), q.shape[-2], k.shape[-2]
        self.widths = q.shape[-1], v.shape[-1]
        self.size = self._triple(q.shape[1:-2])
        self.positions = math.prod(self.size)
        self.rows: tuple[int, ...] = (1, 1, 1)
        self.table = None
        if table is not None:
            near = cropped(table, q).to(q.dtype).contiguous()
            self.rows = self._triple(near.shape[: self.axes])
            self.table = near, self.rows
        self.W, self.X = (padded(n) for n in self.widths)
        self.numbers = self.size, self.heads, self.depths, *self.widths
        self.large = self.W * self.X > LARGE
        aligned = all(n % 16 == 0 for n in self.widths)  # else numbers are loaded one by one
        places = max(1, min(MOST_PLACES, LAMBDAS // (self.W * self.X)))
        self.position_tiles = {"P": places, "T": OFFSETS if aligned else OFFSETS // 2}
        self.offsets_of_table = OFFSETS_OF_TABLE if aligned else OFFSETS_OF_TABLE // 2
        self.tiles = -(-self.positions // places), self.batch

    def run(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: int) -> None:
        """Launch a kernel on the device of q."""
        widths = {"W": self.W, "X": self.X, "num_warps": 8 if self.large else 4}
        with torch.cuda.device_of(self.q):  # type: ignore[no-untyped-call]
            kernel[grid](*arguments, **widths, **options, num_stages=1)

    def content(self, kernel: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Largest keys, sums of exponentials [B, U, K] and the first lambda by depth [B, U, K, V]."""
        parts = self._parts(self.batch * self.depths, -(-self.positions // POSITIONS))
        room = self.batch, self.depths, parts, *self.widths
        tops, sums = (k.new_empty(room[:-1], dtype=torch.float32) for _ in range(2))
        lambdas = v.new_empty(room, dtype=torch.float32)
        arguments = at(k), at(v), tops, sums, lambdas, self.size, self.depths, *self.widths
        self.run(kernel.forward_content, (self.batch * self.depths, parts), *arguments, P=POSITIONS)
        highest = tops.amax(2)
        fade = (tops - highest[:, :, None]).double().exp()
        total = (sums * fade).sum(2)
        content = (lambdas * fade[..., None]).sum(2) / total[..., None]
        return highest, total.float(), content.float()

    def content_gradient(self, kernel: Any, q: Tensor, dout: Tensor) -> Tensor:
        """Gradient of the first lambda, float32 [B, K, V]."""
        parts = self._parts(self.batch, -(-self.positions // POSITIONS))
        sums = q.new_empty(self.batch, parts, *self.widths, dtype=torch.float32)
        arguments = at(q), at(dout), sums, self.size, self.heads, *self.widths
        self.run(kernel.backward_content, (self.batch, parts), *arguments, P=POSITIONS)
        return sums.sum(1, dtype=torch.float64).float()

    def table_gradient(self, kernel: Any, q: Tensor, v: Tensor, dout: Tensor, table: Tensor) -> Tensor:
        """Gradient of the table, zero for offsets that no two positions have."""
        places = max(1, PRODUCTS // (self.W * self.X))
        tiles = -(-math.prod(self.rows) // self.offsets_of_table)
        parts = self._parts(tiles * self.depths, self.batch * -(-self.positions // places))
        near = self.rows[3 - self.axes :]
        sums = q.new_empty(parts, *near, self.depths, self.widths[0], dtype=torch.float32)
        tensors = at(q), at(v), at(dout), sums, self.rows, self.size, self.batch
        arguments = (*tensors, self.heads, self.depths, *self.widths)
        grid = (tiles, self.depths, parts)
        self.run(kernel.backward_table, grid, *arguments, P=places, T=self.offsets_of_table)
        gradient = table.new_zeros(table.shape)
        cropped(gradient, q).copy_(sums.sum(0, dtype=torch.float64))
        return gradient

    def boxes(self) -> tuple[tuple[int, ...], dict[str, int]]:
        """How many boxes lie along each axis, and their sides: powers of two, as equal as the volume lets."""
        sides = [1, 1, 1]
        while math.prod(sides) < (BOX // 2 if self.large else BOX):
            open_axes = [axis for axis in range(3) if sides[axis] < self.size[axis]]
            axis = min(open_axes, key=lambda a: sides[a]) if open_axes else 2
            sides[axis] *= 2
        boxes = tuple(-(-n // side) for n, side in zip(self.size, sides, strict=True))
        places = max(1, 64 // self.W)
        return boxes, {"B0": sides[0], "B1": sides[1], "B2": sides[2], "P": places}

    def _parts(self, others: int, steps: int) -> int:
        """Shares of a sum of so many steps, with so many other programs beside each."""
        return max(1, min(steps, PROGRAMS // others))

    def _triple(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return (*[1] * (3 - self.axes), *numbers)
