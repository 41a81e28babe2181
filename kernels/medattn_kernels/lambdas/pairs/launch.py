"""How the Triton kernels that put queries first are launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medattn_kernels._launch import at
from medattn_kernels.lambdas.launch import Launch
from medattn_kernels.lambdas.order import TILE

MOST_HEADS = 2  # that a tile of queries has: with more, programs take registers that too few can have at once
NUMBERS = 2**9  # of one lambda, for every warp of a program
MOST_WARPS = 8


class QueriesFirst(Launch):
    """The weights of a tile of queries and a tile of keys, then the values."""

    def __init__(self, q: Tensor, v: Tensor, table: Tensor) -> None:
        super().__init__(q, v, table)
        self.group = min(MOST_HEADS, self.heads)
        self.warps = max(1, min(MOST_WARPS, self.W * self.X // NUMBERS))
        self.more_warps = min(MOST_WARPS, 2 * self.warps)  # for what takes more registers
        self.groups = -(-self.heads // self.group)
        self.tiles = self.size[0] * self.size[1] * -(-self.size[2] // TILE)

    def run_pairs(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 0) -> None:
        """Launch one of these kernels on the device of q."""
        self.run(kernel, grid, *arguments, B=TILE, G=self.group, num_warps=warps or self.warps)

    def by_query(self, name: str, x: Tensor, content: Tensor, out: Tensor) -> None:
        """See `Launch`."""
        from medattn_kernels.lambdas.pairs import kernel

        grid = self.tiles, self.batch, self.groups
        arguments = at(x), at(self.v), self.table, content, at(out), *self.numbers
        self.run_pairs(getattr(kernel, name), grid, *arguments)

    def by_value(
        self, k: Tensor, dout: Tensor, statistics: tuple[Tensor, ...], dk: Tensor, dv: Tensor
    ) -> None:
        """See `Launch`."""
        from medattn_kernels.lambdas.pairs import kernel

        grid = self.tiles, self.batch * self.depths
        tensors = at(self.q), at(k), at(self.v), at(dout), self.table, *statistics, at(dk), at(dv)
        self.run_pairs(kernel.backward_values, grid, *tensors, *self.numbers, warps=self.more_warps)

    def by_offset(self, dout: Tensor) -> Tensor:
        """See `Launch`."""
        from medattn_kernels.lambdas.pairs import kernel

        steps = -(-(TILE + self.rows[2] - 1) // TILE)
        lines = self.rows[0] * self.rows[1]
        parts = self._parts(lines * steps * self.depths, self.batch * self.size[0] * self.size[1])
        sums = self.q.new_empty(parts, self.depths, lines, steps, 2, TILE, self.W, dtype=torch.float32)
        tensors = at(self.q), at(self.v), at(dout), sums, self.rows, self.size, self.batch
        grid = lines * steps, self.depths, parts
        self.run_pairs(
            kernel.backward_table,
            grid,
            *tensors,
            *self.numbers[1:],
            steps,
            warps=min(MOST_WARPS, 2 * self.warps),
        )
        early, late = sums.sum(0, dtype=torch.float64)[..., : self.widths[0]].unbind(3)
        # the late offsets of a step are the early ones of the next
        total = early.new_zeros(self.depths, lines, steps + 1, TILE, self.widths[0])
        total[:, :, :-1] += early
        total[:, :, 1:] += late
        near = total.flatten(2, 3).narrow(2, TILE - 1, self.rows[2]).movedim(0, 2)
        return near.reshape(*self.rows[3 - self.axes :], self.depths, self.widths[0])
