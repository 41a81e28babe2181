"""Lambda attention in plain torch, queries first: the pairs of a box of queries and the window it sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from medattn_kernels._chunk import chunk_size
from medattn_kernels._select import without_autocast
from medattn_kernels.lambdas.order import Shape, box_sides, reach

Box = tuple[slice, ...]


def run_forward(q: Tensor, content: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Output [B, *size, H, V]; content: [B, K, V], the first lambda; table: cropped. In the inputs' dtype."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    with without_autocast(q):
        for piece in _Cut(q, v, table).pieces():
            by_content = piece.queries @ piece.of_batch(content)
            piece.write(out, torch.baddbmm(by_content, piece.weights(), piece.values))
    return out


def run_backward(
    grad: Tensor, q: Tensor, content: Tensor, v: Tensor, table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, content, v and the table, summed in float32 at least, that of the table in float64."""
    dq, dcontent = torch.empty_like(q), torch.zeros_like(content)
    with without_autocast(q):
        cut = _Cut(q, v, table)
        dv, dtable = torch.zeros_like(v, dtype=cut.dtype), torch.zeros_like(cut.table, dtype=torch.float64)
        for piece in cut.pieces():
            dy = piece.read(grad)
            seen = dv[piece.batch, *piece.window]
            seen += (piece.weights().mT @ dy).view(seen.shape)
            by_offset = piece.gradients(dy)
            by_content = dy @ piece.of_batch(content).mT
            piece.write(dq, torch.baddbmm(by_content, by_offset, piece.rows.expand(len(dy), -1, -1)))
            rows = dtable[piece.offsets]
            rows += (by_offset.flatten(0, 1).mT @ piece.queries.flatten(0, 1)).view(rows.shape)
            dcontent[piece.batch] += (piece.queries.mT @ dy).to(content.dtype)
        for axis, side in enumerate(cut.sides):
            dtable = dtable.narrow(axis, side - 1, table.shape[axis])
    return dq, dcontent, dv.to(v.dtype), dtable.to(table.dtype).contiguous()


@dataclass(frozen=True)
class _Piece:
    """A box of queries of some batch entries, n, and the window of positions within the table's reach.

    queries: [n, box heads, K]. values: [n, window depths, V]. rows: [offsets depths, K], the table's for all
    offsets from the box to the window, side + window - 1 of them on every axis. room: for what is by offset
    and for what is by pair.
    """

    queries: Tensor
    values: Tensor
    rows: Tensor
    batch: slice
    box: Box
    window: Box
    offsets: Box
    depths: int
    room: tuple[Tensor, Tensor]

    def read(self, x: Tensor) -> Tensor:
        """These queries' part of [B, *size, H, width], [n, box heads, width]."""
        return x[self.batch, *self.box].to(self.queries.dtype).flatten(1, -2)

    def write(self, x: Tensor, part: Tensor) -> None:
        """Put [n, box heads, width] where these queries are."""
        place = x[self.batch, *self.box]
        place.copy_(part.view(place.shape))

    def of_batch(self, content: Tensor) -> Tensor:
        """The first lambdas of these entries, [n, K, V]."""
        return content[self.batch].to(self.queries.dtype)

    def weights(self) -> Tensor:
        """q.table[m - n] of all pairs, [n, box heads, window depths], until the room is used again."""
        n, queries, _ = self.queries.shape
        wide = _part(self.room[0], n, queries, len(self.rows))
        torch.mm(self.queries.flatten(0, 1), self.rows.mT, out=wide.flatten(0, 1))
        pairs = self._pairs(wide)
        return _part(self.room[1], *pairs.shape).copy_(pairs).view(n, queries, -1)

    def gradients(self, dy: Tensor) -> Tensor:
        """The weights' gradients by offset, [n, box heads, offsets depths]; dy: [n, box heads, V]."""
        n, queries, _ = dy.shape
        dense = _part(self.room[1], n, queries, self.values.shape[1])
        torch.bmm(dy, self.values.mT, out=dense)
        wide = _part(self.room[0], n, queries, len(self.rows)).zero_()
        pairs = self._pairs(wide)
        pairs.copy_(dense.view(pairs.shape))
        return wide

    def _pairs(self, wide: Tensor) -> Tensor:
        """[n, box heads, offsets depths] seen by pairs: [n, *box, H, *window, U].

        Query j of the box and place i of the window meet at entry i - j + side - 1 of the offsets, on every
        axis: a step along the box is one step back along the offsets.
        """
        sides, windows, counts = (_lengths(x) for x in (self.box, self.window, self.offsets))
        n, queries, row = wide.shape
        heads = queries // math.prod(sides)
        steps = _strides(counts, self.depths)
        jumps = [jump - step for jump, step in zip(_strides(sides, heads * row), steps, strict=True)]
        first = sum((side - 1) * step for side, step in zip(sides, steps, strict=True))
        shape = (n, *sides, heads, *windows, self.depths)
        return wide.as_strided(shape, (queries * row, *jumps, row, *steps, 1), first + wide.storage_offset())


class _Cut:
    """One call in pieces that keep to the chunk size.

    table: [*offsets, U, K], by side - 1 zeros longer than the given one at both ends of every axis, for pairs
    of box and window beyond it. dtype: float32 at least.
    """

    def __init__(self, q: Tensor, v: Tensor, table: Tensor) -> None:
        self.q, self.v = q, v
        self.shape, self.limit = Shape.of(q, v, table), chunk_size(q)
        self.sides = box_sides(self.shape, self.limit)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        margins = [n for side in reversed(self.sides) for n in (side - 1, side - 1)]
        self.table = F.pad(table.to(self.dtype), (0, 0, 0, 0, *margins))

    def pieces(self) -> Iterator[_Piece]:
        """Box by box, the batch entries of each box in turn."""
        depths = self.shape.depths
        entry = (
            math.prod(self.sides) * self.shape.heads * depths * math.prod(reach(self.shape, self.sides)[1])
        )
        entries = min(len(self.q), max(1, self.limit // entry))
        room = tuple(self.q.new_empty(entries * entry, dtype=self.dtype) for _ in range(2))
        for box, window, offsets in self._boxes():
            rows = self.table[offsets].flatten(0, -2)
            for first in range(0, len(self.q), entries):
                batch = slice(first, min(first + entries, len(self.q)))
                queries, values = (
                    x[batch, *b].to(self.dtype).flatten(1, -2) for x, b in ((self.q, box), (self.v, window))
                )
                yield _Piece(queries, values, rows, batch, box, window, offsets, depths, (room[0], room[1]))

    def _boxes(self) -> Iterator[tuple[Box, Box, Box]]:
        """Boxes of queries, what they see and the table's entries for the offsets between."""
        size, radii = self.shape.size, [n // 2 for n in self.shape.rows]
        centres = [n // 2 for n in self.table.shape[: len(size)]]
        for starts in product(*(range(0, n, side) for n, side in zip(size, self.sides, strict=True))):
            ends = [min(s + side, n) for s, side, n in zip(starts, self.sides, size, strict=True)]
            lows = [max(0, s - r) for s, r in zip(starts, radii, strict=True)]
            highs = [min(n, e + r) for e, r, n in zip(ends, radii, size, strict=True)]
            first = [low - end + 1 + c for low, end, c in zip(lows, ends, centres, strict=True)]
            last = [high - start + c for high, start, c in zip(highs, starts, centres, strict=True)]
            yield _slices(starts, ends), _slices(lows, highs), _slices(first, last)


def _slices(starts: Sequence[int], ends: Sequence[int]) -> Box:
    return tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))


def _lengths(box: Box) -> list[int]:
    return [s.stop - s.start for s in box]


def _strides(counts: Sequence[int], last: int) -> list[int]:
    """Of contiguous axes, the last of which has stride `last`."""
    return [last * math.prod(counts[axis + 1 :]) for axis in range(len(counts))]


def _part(room: Tensor, *shape: int) -> Tensor:
    """The start of a flat tensor in some shape."""
    return room[: math.prod(shape)].view(shape)
