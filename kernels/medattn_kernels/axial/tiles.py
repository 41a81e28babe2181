"""Tiles of one line for the axial kernels: reading and writing them, and the ways between offset and key.

A tensor comes as (pointer, strides) with the strides of batch, first and second place off the axis, axis,
head and channel; `shape` is (first and second size off the axis, heads, length, width of keys, width of
values).

The pair of query tile m and key tile n holds the 2 B - 1 offsets from first = (n - m) B - (B - 1) on: B
early ones and B - 1 late ones. Two products with B table rows each give every query its logits by offset. Of
its B keys, some have an early offset first + c and the others a late one first + B + c, and all have
different c = j - i - 1 modulo B. So an entry is picked from either product and one rotation per row, a
gather, turns logits by offset into logits by key. Gradients go the same way back. Terms of the keys do so by
column.

B is the side of a tile, W the padded width of its vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medattn_kernels._device import dot


@triton.jit
def line_of(x, line, shape):
    """A tensor (pointer, strides) moved to a line; the strides off the axis are used up."""
    head = line % shape[2]
    place = line // shape[2]
    second = place % shape[1]
    first = (place // shape[1]) % shape[0]
    batch = place // shape[1] // shape[0]
    strides = x[1]
    start = batch * strides[0] + first * strides[1] + second * strides[2] + head * strides[4]
    return x[0] + start, strides[3], strides[5]


@triton.jit
def addresses(x, start, length, width, B: tl.constexpr, W: tl.constexpr):
    """Pointers [B, W] to positions start ... start + B - 1 of a line, and which of them exist."""
    i = start + tl.arange(0, B)
    d = tl.arange(0, W)
    inside = (i[:, None] < length) & (d[None, :] < width)
    return x[0] + i.to(tl.int64)[:, None] * x[1] + d.to(tl.int64)[None, :] * x[2], inside


@triton.jit
def load_tile(x, start, length, width, B: tl.constexpr, W: tl.constexpr):
    """Positions start ... start + B - 1 of a line, zeros beyond its end; [B, W]."""
    places, inside = addresses(x, start, length, width, B, W)
    return tl.load(places, mask=inside, other=0.0)


@triton.jit
def store_tile(x, value, start, length, width, B: tl.constexpr, W: tl.constexpr):
    """Write [B, W] to positions start ... start + B - 1 of a line."""
    places, inside = addresses(x, start, length, width, B, W)
    tl.store(places, value.to(x[0].dtype.element_ty), mask=inside)


@triton.jit
def table_rows(table, count, first, width, B: tl.constexpr, W: tl.constexpr):
    """Table rows of the offsets first ... first + B - 1, those beyond the table its end rows; [B, W]."""
    row = tl.minimum(tl.maximum(first + tl.arange(0, B) + count // 2, 0), count - 1)
    d = tl.arange(0, W)
    return tl.load(table + row[:, None] * width + d[None, :], mask=d[None, :] < width, other=0.0)


@triton.jit
def place_of_pair(B: tl.constexpr):
    """c of local query i and key j, [i, j]; also the query of c and key j, [c, j]."""
    i = tl.arange(0, B)
    return (i[None, :] - i[:, None] - 1) & (B - 1)


@triton.jit
def early_by_query(B: tl.constexpr):
    """Whether query i meets its key at c with an early offset; [i, c]."""
    i = tl.arange(0, B)
    return i[None, :] + i[:, None] >= B - 1


@triton.jit
def early_by_key(B: tl.constexpr):
    """Whether key j meets its query at c with an early offset; [c, j]."""
    i = tl.arange(0, B)
    return i[:, None] >= i[None, :]


@triton.jit
def query_logits(x, table, count, first, width, B: tl.constexpr, W: tl.constexpr):
    """x_i.table[j - i] of a tile pair; [i, j]."""
    early = dot(x, tl.trans(table_rows(table, count, first, width, B, W)))
    late = dot(x, tl.trans(table_rows(table, count, first + B, width, B, W)))
    return tl.gather(tl.where(early_by_query(B), early, late), place_of_pair(B), 1)


@triton.jit
def key_logits(x, table, count, first, width, B: tl.constexpr, W: tl.constexpr):
    """x_j.table[j - i] of a tile pair; [i, j]."""
    early = dot(table_rows(table, count, first, width, B, W), tl.trans(x))
    late = dot(table_rows(table, count, first + B, width, B, W), tl.trans(x))
    return tl.gather(tl.where(early_by_key(B), early, late), place_of_pair(B), 0)


@triton.jit
def split_by_query(x, dtype: tl.constexpr, B: tl.constexpr):
    """[i, j] -> early and late [i, c]."""
    i = tl.arange(0, B)
    moved = tl.gather(x, (i[None, :] + i[:, None] + 1) & (B - 1), 1)
    early = early_by_query(B)
    return tl.where(early, moved, 0.0).to(dtype), tl.where(early, 0.0, moved).to(dtype)


@triton.jit
def split_by_key(x, dtype: tl.constexpr, B: tl.constexpr):
    """[i, j] -> early and late [c, j]."""
    moved = tl.gather(x, place_of_pair(B), 0)
    early = early_by_key(B)
    return tl.where(early, moved, 0.0).to(dtype), tl.where(early, 0.0, moved).to(dtype)


@triton.jit
def query_sums(x, table, count, first, width, B: tl.constexpr, W: tl.constexpr):
    """sum_j x_ij table[j - i]; [i, W]."""
    early, late = split_by_query(x, table.dtype.element_ty, B)
    total = dot(early, table_rows(table, count, first, width, B, W))
    return total + dot(late, table_rows(table, count, first + B, width, B, W))


@triton.jit
def key_sums(x, table, count, first, width, B: tl.constexpr, W: tl.constexpr):
    """sum_i x_ij table[j - i]; [j, W]."""
    early, late = split_by_key(x, table.dtype.element_ty, B)
    total = dot(tl.trans(early), table_rows(table, count, first, width, B, W))
    return total + dot(tl.trans(late), table_rows(table, count, first + B, width, B, W))
