"""How block attention cuts a volume: query blocks, their key windows, and the way back of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """One axis, cut.

    size: voxels. blocks: number of blocks. block: voxels from one block's start to the next one's.
    stride: voxels between queries. before, window: a key window starts `before` voxels ahead of its block and
    has `window` positions. step: between queries as offsets count them, the stride where they count voxels.
    """

    size: int
    blocks: int
    block: int
    stride: int
    before: int
    window: int
    step: int

    @property
    def queries(self) -> int:
        """Queries per block."""
        return -(-self.block // self.stride)

    @property
    def after_end(self) -> int:
        """Positions that the last window has beyond the volume."""
        return (self.blocks - 1) * self.block + self.window - self.before - self.size

    @property
    def offsets(self) -> int:
        """How many different offsets the pairs have."""
        return self.window + (self.queries - 1) * self.step

    def all_offsets(self, device: torch.device) -> Tensor:
        """They, from the smallest to the largest."""
        return torch.arange(self.offsets, device=device) - self.before - (self.queries - 1) * self.step

    def offset(self, device: torch.device) -> Tensor:
        """Key index minus query index of every pair, [queries, window]."""
        query = torch.arange(self.queries, device=device) * self.step
        return torch.arange(self.window, device=device) - self.before - query[:, None]

    def outside(self, device: torch.device) -> Tensor:
        """Which window positions lie outside the volume, [blocks, window]."""
        start = torch.arange(self.blocks, device=device) * self.block - self.before
        index = start[:, None] + torch.arange(self.window, device=device)
        return (index < 0) | (index >= self.size)


Tiles = tuple[Tiling, ...]


def cut(
    size: int, block: int, halo: tuple[int, int], stride: int, masked: bool, step: int | None = None
) -> Tiling:
    """Cut one axis. If the outside of the volume is masked, windows reach no further than a block needs.

    step: the stride if None.
    """
    blocks = -(-size // block)
    before, after = halo
    if masked:
        block = min(block, size)
        before, after = min(before, (blocks - 1) * block), min(after, size - block)
    return Tiling(size, blocks, block, stride, before, before + block + after, step or stride)


def table_row(offset: Tensor, rows: int) -> Tensor:
    """Table row of an offset; offsets outside the table take its first or last row."""
    return (offset + (rows - 1) // 2).clamp(0, rows - 1)


def query_blocks(q: Tensor, tiles: Tiles) -> Tensor:
    """[B, *size, H, D] -> [B, *blocks, H, queries, D]; queries beyond a ragged border are zeros."""
    axes = len(tiles)
    q = q[:, *(slice(None, None, t.stride) for t in tiles)]
    q = _pad(q, [(0, t.blocks * t.queries - n) for t, n in zip(tiles, q.shape[1:-2], strict=True)])
    for axis, t in enumerate(tiles):
        q = torch.unflatten(q, 1 + 2 * axis, (t.blocks, t.queries))
    return q.permute(0, *range(1, 2 * axes, 2), -2, *range(2, 2 * axes + 1, 2), -1).flatten(axes + 2, -2)


def merge_blocks(out: Tensor, tiles: Tiles) -> Tensor:
    """[B, *blocks, H, queries, E] -> [B, *ceil(size / stride), H, E]: the inverse of `query_blocks`."""
    axes = len(tiles)
    out = torch.unflatten(out, -2, [t.queries for t in tiles])
    pairs = [axis for a in range(axes) for axis in (1 + a, axes + 2 + a)]
    out = out.permute(0, *pairs, axes + 1, -1)
    for axis in range(axes):
        out = out.flatten(1 + axis, 2 + axis)
    return out[:, *(slice(-(-t.size // t.stride)) for t in tiles)]


def padded(x: Tensor, tiles: Tiles) -> Tensor:
    """[B, *size, H, D] with zeros around it, as far as the windows reach."""
    return _pad(x, [(t.before, t.after_end) for t in tiles])


def windows(x: Tensor, tiles: Tiles, batch: slice, rows: slice) -> Tensor:
    """Key windows of some blocks, [n, H, keys, D], from the padded volume: a copy of these blocks only.

    batch, rows: which entries of the batch and which blocks of the first axis; n counts all their blocks.
    """
    axes = len(tiles)
    x = _slab(x, tiles, batch, rows)
    for axis, t in enumerate(tiles):
        x = x.unfold(1 + axis, t.window, t.block)  # in the end [b, *blocks, H, D, *window]
    return x.movedim(axes + 2, -1).flatten(axes + 2, -2).flatten(0, axes)


def add_windows(x: Tensor, part: Tensor, tiles: Tiles, batch: slice, rows: slice) -> None:
    """Add `part` [n, H, keys, D] to the padded volume in place, at the positions that `windows` reads.

    Windows overlap, so they are added in pieces no wider than a block; within a piece no two blocks meet.
    """
    axes = len(tiles)
    x = _slab(x, tiles, batch, rows)
    blocks = [(x.shape[1 + axis] - t.window) // t.block + 1 for axis, t in enumerate(tiles)]
    part = torch.unflatten(torch.unflatten(part, 0, (-1, *blocks)), -2, [t.window for t in tiles])
    part = part.movedim(-1, axes + 2)  # [b, *blocks, H, D, *window]
    for starts in product(*(range(0, t.window, t.block) for t in tiles)):
        target, source = x, part
        for axis, (t, start) in enumerate(zip(tiles, starts, strict=True)):
            width = min(t.block, t.window - start)
            target = target.narrow(1 + axis, start, (blocks[axis] - 1) * t.block + width)
            target = target.unfold(1 + axis, width, t.block)
            source = source.narrow(axes + 3 + axis, start, width)
        target += source


def _slab(x: Tensor, tiles: Tiles, batch: slice, rows: slice) -> Tensor:
    """The part of the padded volume that some blocks of the first axis see."""
    first = tiles[0]
    return x[batch, rows.start * first.block : (rows.stop - 1) * first.block + first.window]


def _pad(x: Tensor, margins: Sequence[tuple[int, int]]) -> Tensor:
    """Zeros around the spatial axes of [B, *size, H, D]."""
    if not any(before or after for before, after in margins):
        return x
    return F.pad(x, (0, 0, 0, 0, *(n for pair in reversed(margins) for n in pair)))
