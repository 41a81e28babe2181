"""How the Triton kernels of lambda attention are launched: what both orders share, and lambdas first."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from medattn_kernels._launch import at, padded
from medattn_kernels.lambdas.eager import cropped

LAMBDAS = 2**13  # numbers of one program's lambdas, in registers
PRODUCTS = 2**11  # numbers of outer products q dy' that a backward pass forms at a time
MOST_PLACES = 16  # whose lambdas these are
OFFSETS, OFFSETS_OF_TABLE = 32, 64  # per tile: in sums over them, and of the table's gradient
POSITIONS = 64  # per tile of the sums for the first lambda
BOX = 64  # positions whose values' gradients one program finds; half as many where lambdas are large
LARGE = 2**10  # numbers of one lambda that are many
PROGRAMS = 1024  # of sums over positions


class Launch:
    """How one call is cut: tiles, grids and the arguments that the kernels share."""

    def __init__(self, q: Tensor, v: Tensor, table: Tensor | None) -> None:
        self.q, self.v, self.axes = q, v, q.ndim - 3
        self.batch, self.heads, self.depths = len(q), q.shape[-2], v.shape[-2]
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

    def by_query(self, name: str, x: Tensor, content: Tensor, out: Tensor) -> None:
        """`forward`: outputs from queries x. `backward_queries`: their gradients from those of outputs.

        content: float32 [B, K, V], the first lambda.
        """
        raise NotImplementedError

    def by_value(
        self, k: Tensor, dout: Tensor, statistics: tuple[Tensor, ...], dk: Tensor, dv: Tensor
    ) -> None:
        """Gradients of keys and values; statistics: content_gradient, inner, highest and total."""
        raise NotImplementedError

    def by_offset(self, dout: Tensor) -> Tensor:
        """Gradient of the cropped table, float64 [*rows, U, K]."""
        raise NotImplementedError

    def run(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: int) -> None:
        """Launch a kernel on the device of q."""
        own = {"W": self.W, "X": self.X, "num_warps": 8 if self.large else 4, "num_stages": 1}
        with torch.cuda.device_of(self.q):  # type: ignore[no-untyped-call]
            kernel[grid](*arguments, **own | options)

    def content(self, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Largest keys, sums of exponentials [B, U, K] and the first lambda by depth [B, U, K, V]."""
        from medattn_kernels.lambdas import kernel

        parts = self._parts(self.batch * self.depths, -(-self.positions // POSITIONS))
        room = self.batch, self.depths, parts, *self.widths
        tops, sums = (k.new_empty(room[:-1], dtype=torch.float32) for _ in range(2))
        lambdas = k.new_empty(room, dtype=torch.float32)
        arguments = at(k), at(self.v), tops, sums, lambdas, self.size, self.depths, *self.widths
        self.run(kernel.forward_content, (self.batch * self.depths, parts), *arguments, P=POSITIONS)
        highest = tops.amax(2)
        fade = (tops - highest[:, :, None]).double().exp()
        total = (sums * fade).sum(2)
        content = (lambdas * fade[..., None]).sum(2) / total[..., None]
        return highest, total.float(), content.float()

    def content_gradient(self, dout: Tensor) -> Tensor:
        """Gradient of the first lambda, float32 [B, K, V]."""
        from medattn_kernels.lambdas import kernel

        parts = self._parts(self.batch, -(-self.positions // POSITIONS))
        sums = self.q.new_empty(self.batch, parts, *self.widths, dtype=torch.float32)
        arguments = at(self.q), at(dout), sums, self.size, self.heads, *self.widths
        self.run(kernel.backward_content, (self.batch, parts), *arguments, P=POSITIONS)
        return sums.sum(1, dtype=torch.float64).float()

    def _parts(self, others: int, steps: int) -> int:
        """Shares of a sum of so many steps, with so many other programs beside each."""
        return max(1, min(steps, PROGRAMS // others))

    def _triple(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return (*[1] * (3 - self.axes), *numbers)


class LambdasFirst(Launch):
    """The lambdas of some positions, then the queries of all heads."""

    def __init__(self, q: Tensor, v: Tensor, table: Tensor | None) -> None:
        super().__init__(q, v, table)
        self.aligned = all(n % 16 == 0 for n in self.widths)  # else numbers are loaded one by one

    def by_query(self, name: str, x: Tensor, content: Tensor, out: Tensor) -> None:
        """See `Launch`."""
        from medattn_kernels.lambdas import kernel

        places = max(1, min(MOST_PLACES, LAMBDAS // (self.W * self.X)))
        grid = -(-self.positions // places), self.batch
        arguments = at(x), at(self.v), self.table, content, at(out), *self.numbers
        self.run(
            getattr(kernel, name), grid, *arguments, P=places, T=OFFSETS if self.aligned else OFFSETS // 2
        )

    def by_value(
        self, k: Tensor, dout: Tensor, statistics: tuple[Tensor, ...], dk: Tensor, dv: Tensor
    ) -> None:
        """See `Launch`."""
        from medattn_kernels.lambdas import kernel

        sides = self._box()
        boxes = tuple(-(-n // side) for n, side in zip(self.size, sides, strict=True))
        options = {"B0": sides[0], "B1": sides[1], "B2": sides[2], "P": max(1, 64 // self.W)}
        tensors = at(self.q), at(k), at(self.v), at(dout), self.table, *statistics, at(dk), at(dv)
        arguments = (*tensors, self.size, boxes, *self.numbers[1:])
        self.run(kernel.backward_values, (math.prod(boxes), self.batch * self.depths), *arguments, **options)

    def by_offset(self, dout: Tensor) -> Tensor:
        """See `Launch`."""
        from medattn_kernels.lambdas import kernel

        offsets = OFFSETS_OF_TABLE if self.aligned else OFFSETS_OF_TABLE // 2
        places = max(1, PRODUCTS // (self.W * self.X))
        tiles = -(-math.prod(self.rows) // offsets)
        parts = self._parts(tiles * self.depths, self.batch * -(-self.positions // places))
        near = self.rows[3 - self.axes :]
        sums = self.q.new_empty(parts, *near, self.depths, self.widths[0], dtype=torch.float32)
        tensors = at(self.q), at(self.v), at(dout), sums, self.rows, self.size, self.batch
        arguments = (*tensors, self.heads, self.depths, *self.widths)
        self.run(kernel.backward_table, (tiles, self.depths, parts), *arguments, P=places, T=offsets)
        return sums.sum(0, dtype=torch.float64)

    def _box(self) -> list[int]:
        """Sides of boxes of positions: powers of two, as equal as the volume lets."""
        sides = [1, 1, 1]
        while math.prod(sides) < (BOX // 2 if self.large else BOX):
            open_axes = [axis for axis in range(3) if sides[axis] < self.size[axis]]
            axis = min(open_axes, key=lambda a: sides[a]) if open_axes else 2
            sides[axis] *= 2
        return sides
