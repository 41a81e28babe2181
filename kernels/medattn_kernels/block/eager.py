"""Block attention in plain torch, slab by slab: logits and key windows never exist all together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from medattn_kernels._chunk import chunk_size, pieces
from medattn_kernels._select import without_autocast
from medattn_kernels.block.tiling import (
    Tiles,
    Tiling,
    add_windows,
    cut,
    merge_blocks,
    padded,
    query_blocks,
    table_row,
    windows,
)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: tuple[int, ...],
    halo: tuple[tuple[int, int], ...],
    rel: tuple[Tensor, ...] | None,
    bias: Tensor | None,
    stride: tuple[int, ...],
    scale: float,
    masked: bool,
    step: tuple[int, ...] | None = None,
) -> Tensor:
    """`medattn_kernels.block_attention` on any device, differentiable once.

    step: between neighbouring queries as offsets count them, the stride if None.

    q.rel is needed once per query and place along an axis, not per pair: these products become further
    columns of the queries, and ones at the key's places the same columns of the keys, so that one matrix
    product gives the whole logit.
    """
    tiles = tuple(
        cut(n, b, h, t, masked, e)
        for n, b, h, t, e in zip(q.shape[1:-2], block, halo, stride, step or stride, strict=True)
    )
    queries = query_blocks(q, tiles)
    columns = [scale * queries] if rel is None else [scale * queries, *_relative(queries, tiles, rel)]
    table = None if bias is None else _pairs(bias.to(q.dtype), tiles)
    cuts = [getattr(t, field.name) for t in tiles for field in fields(t)]
    out = _attention(torch.cat(columns, -1), padded(k, tiles), padded(v, tiles), table, cuts, masked)
    return merge_blocks(out, tiles)


@dataclass(frozen=True)
class _Slab:
    """The blocks of one step: some entries of the batch, some blocks of the first axis, n blocks in all.

    queries [n, H, queries, D + P], keys [n, H, keys, D], values [n, H, keys, E], outside [n, 1, 1, keys];
    places [keys, P], the columns that all keys share.
    """

    batch: slice
    rows: slice
    queries: Tensor
    keys: Tensor
    values: Tensor
    places: Tensor
    outside: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """The slab's part of [B, *blocks, H, queries, E] as a view [n, H, queries, E]."""
        return x[self.batch, self.rows].view(-1, *x.shape[-3:])

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Blocks and queries of each step over the slab's logits."""
        n, heads, queries = self.queries.shape[:3]
        return pieces(n, queries, chunk_size(self.queries) // (heads * self.keys.shape[2]))

    def placed_keys(self, n: slice) -> Tensor:
        """Keys of the blocks n with their columns for places, [n, H, keys, D + P]."""
        keys = self.keys[n]
        return (
            torch.cat([keys, self.places.expand(*keys.shape[:2], -1, -1)], -1)
            if self.places.numel()
            else keys
        )

    def attention(self, keys: Tensor, n: slice, m: slice, bias: Tensor | None) -> Tensor:
        """Softmax weights of queries m of the blocks n, [n, H, m, keys]."""
        logits = self.queries[n, :, m] @ keys.mT
        if bias is not None:
            logits += bias[:, m]
        if self.outside is not None:
            logits.masked_fill_(self.outside[n], float("-inf"))
        return logits.softmax(-1)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cuts: Sequence[int], masked: bool
) -> Tensor:
    """Softmax attention of query blocks on their key windows, [B, *blocks, H, queries, E].

    q: [B, *blocks, H, queries, D + P], P columns for places along the axes or none. k, v: padded volumes.
    bias: [H, queries, keys] or None. cuts: `Tiles` as numbers. Computes in the inputs' dtype.
    """
    out = _empty(q, v)
    with without_autocast(q):
        for slab in _slabs(q, k, v, _tiles(cuts), masked):
            part = slab.of(out)
            for n, m in slab.chunks():
                part[n, :, m] = slab.attention(slab.placed_keys(n), n, m, bias) @ slab.values[n]
    return out


def run_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cuts: Sequence[int], masked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias, the last three summed in float32 at least; empty without bias."""
    tiles, grad = _tiles(cuts), grad.contiguous()
    precise = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=precise), torch.zeros_like(v, dtype=precise)
    dbias = None if bias is None else torch.zeros_like(bias, dtype=precise)
    with without_autocast(q):
        for slab in _slabs(q, k, v, tiles, masked):
            dkeys = torch.zeros_like(slab.keys, dtype=precise)
            dvalues = torch.zeros_like(slab.values, dtype=precise)
            part, dout = slab.of(dq), slab.of(grad)
            for n, m in slab.chunks():
                keys = slab.placed_keys(n)
                attention = slab.attention(keys, n, m, bias)
                dvalues[n] += attention.mT @ dout[n, :, m]
                dattention = dout[n, :, m] @ slab.values[n].mT
                dlogits = torch._softmax_backward_data(dattention, attention, -1, attention.dtype)
                part[n, :, m] = dlogits @ keys
                dkeys[n] += dlogits.mT @ slab.queries[n, :, m, : k.shape[-1]]
                if dbias is not None:
                    dbias[:, m] += dlogits.sum(0, dtype=precise)
            add_windows(dk, dkeys, tiles, slab.batch, slab.rows)
            add_windows(dv, dvalues, tiles, slab.batch, slab.rows)
    return dq, dk.to(k.dtype), dv.to(v.dtype), q.new_empty(0) if dbias is None else dbias.to(q.dtype)


# operators to torch, so that torch.compile takes the loops and their writes in place as they are
_attention = torch.library.custom_op("medattn::block_attention_eager", run_forward, mutates_args=())
_backward = torch.library.custom_op("medattn::block_attention_eager_backward", run_backward, mutates_args=())


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return _empty(q, v)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    last = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), last


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.numbers = inputs[4:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing computes them again, and allows no more
    dq, dk, dv, dbias = _backward(grad, *saved, *ctx.numbers)
    return dq, dk, dv, None if saved[3] is None else dbias, None, None


_attention.register_autograd(_differentiate, setup_context=_remember)


def _empty(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _tiles(cuts: Sequence[int]) -> Tiles:
    step = len(fields(Tiling))
    return tuple(Tiling(*cuts[n : n + step]) for n in range(0, len(cuts), step))


def _slabs(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, masked: bool) -> Iterator[_Slab]:
    """Walk over all blocks, gathering the key windows of a few at a time."""
    axes = len(tiles)
    places = (
        _places(tiles, q) if q.shape[-1] > k.shape[-1] else q.new_empty(math.prod(t.window for t in tiles), 0)
    )
    outside = _outside(tiles, q) if masked else None
    numbers = math.prod(q.shape[2 : axes + 2]) * len(places) * (k.shape[-1] + v.shape[-1])  # windows of a row
    for batch, rows in pieces(q.shape[0], q.shape[1], chunk_size(q) // numbers):
        queries = q[batch, rows].flatten(0, axes)
        yield _Slab(
            batch,
            rows,
            queries,
            windows(k, tiles, batch, rows),
            windows(v, tiles, batch, rows),
            places,
            None if outside is None else outside[batch, rows].flatten(0, axes)[:, None, None],
        )


def _outside(tiles: Tiles, q: Tensor) -> Tensor | None:
    """Which window positions lie outside the volume, [B, *blocks, keys], or None where none does."""
    if all(t.before == 0 and t.after_end == 0 for t in tiles):
        return None
    outside = torch.zeros(1, 1, dtype=torch.bool, device=q.device)  # [blocks, keys] of the axes so far
    for t in tiles:
        one = t.outside(q.device)
        outside = (outside[:, None, :, None] | one[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return torch.unflatten(outside, 0, [t.blocks for t in tiles]).expand(len(q), *(-1,) * (len(tiles) + 1))


def _relative(queries: Tensor, tiles: Tiles, rel: tuple[Tensor, ...]) -> list[Tensor]:
    """q.rel per axis for every place of that axis in the window, each [B, *blocks, H, queries, window]."""
    near = torch.unflatten(queries, -2, [t.queries for t in tiles])
    terms = []
    for axis, (t, table) in enumerate(zip(tiles, rel, strict=True)):
        rows = table.to(queries.dtype)[
            table_row(t.offset(queries.device), table.shape[0])
        ]  # [queries, window, D]
        along = near.movedim(axis - len(tiles) - 1, 0)
        term = torch.unflatten(along.flatten(1, -2) @ rows.mT, 1, along.shape[1:-1])
        terms.append(term.movedim(0, axis - len(tiles) - 1).flatten(-len(tiles) - 1, -2))
    return terms


def _places(tiles: Tiles, like: Tensor) -> Tensor:
    """[keys, sum of window sides]: one where the key stands at that place of that axis."""
    grid = torch.meshgrid(*(torch.arange(t.window, device=like.device) for t in tiles), indexing="ij")
    hot = [
        place.flatten()[:, None] == torch.arange(t.window, device=like.device)
        for t, place in zip(tiles, grid, strict=True)
    ]
    return torch.cat(hot, 1).to(like.dtype)


def _pairs(bias: Tensor, tiles: Tiles) -> Tensor:
    """[H, *R] -> [H, queries, keys] by the offset of every pair."""
    axes = len(tiles)
    for axis, t in enumerate(tiles):
        rows = table_row(t.offset(bias.device), bias.shape[1 + 2 * axis])
        bias = bias.movedim(1 + 2 * axis, 1)[:, rows].movedim((1, 2), (1 + 2 * axis, 2 + 2 * axis))
    bias = bias.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2))
    return bias.flatten(1 + axes, -1).flatten(1, axes)
