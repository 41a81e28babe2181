"""Query tiles and key tiles for the block kernels: where their voxels lie, and the way of position terms.

A tensor comes as (pointer, strides) with the strides of batch, three spatial axes, head and channel. Volumes
of one or two axes have leading axes of size 1. `cut` tells what every axis is cut into, in triples: size in
voxels, blocks, voxels per block, queries per block, voxels between queries, voxels of the window before the
block, voxels of the window; then what `quick_unravel` needs of queries and windows; last the distance of
queries as offsets count it, or None where they count voxels. Blocks of too few queries for a tile are joined
into larger ones: then `own` has the triples of what an axis was to be cut into: voxels per block, of the
window before it, of the window. Else it is None.

A query meets the places 0 ... P - 1 of an axis, those of its window or of a box of keys. What a table adds
to its logits depends on the query and on the place along one axis, so it is one small matrix per axis, found
once per query tile: a product with the table gives the logits by offset and a gather those by place. A
matrix of zeros and ones then spreads them over the keys in the same kind of product that q.k is. Gradients
go the same way back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medattn_kernels._device import addresses, dot, load, store, volume, within


@triton.jit
def quick_unravel(i, shape, inverse):
    """`unravel` of many indices: products in the place of divisions.

    inverse: 2^31 over the last two sides together and over the last one, rounded up; exact while i times
    the divisor is below 2^31.
    """
    first = tl.umulhi((2 * i).to(tl.uint32), inverse[0].to(tl.uint32)).to(tl.int32)
    both = tl.umulhi((2 * i).to(tl.uint32), inverse[1].to(tl.uint32)).to(tl.int32)
    return first, both - first * shape[1], i - both * shape[2]


@triton.jit
def load_number(x, batch, place, head, inside):
    """One number per place, zero where there is none; [places]."""
    return tl.sum(load(x, batch, place, head, inside, 1, 1), 1)


@triton.jit
def store_number(x, value, batch, place, head, inside):
    """Write one number per place."""
    store(x, value[:, None], batch, place, head, inside, 1, 1)


@triton.jit
def store_norm(x, highest, total, batch, place, head, exists):
    """Keep the largest logit of each query and the sum of exponentials over it; x: [.., 2].

    Their log-sum-exp would be one number, but its rounding grows with the logits.
    """
    store_number(x, highest, batch, place, head, exists)
    store_number((x[0] + x[1][5], x[1]), total, batch, place, head, exists)


@triton.jit
def load_norm(x, batch, place, head, exists):
    """The largest logit of each query and one over the sum of exponentials; 0 and 1 where there is none."""
    total = load_number((x[0] + x[1][5], x[1]), batch, place, head, exists)
    return load_number(x, batch, place, head, exists), 1.0 / tl.where(exists, total, 1.0)


@triton.jit
def queries_of(block, tile, cut, B: tl.constexpr):
    """Places of a tile of a block's queries among all queries, in the volume, and which of them exist."""
    size, _, _, queries, stride, _, _, inverses, _ = cut
    n = tile * B + tl.arange(0, B)
    near = quick_unravel(n, queries, inverses[0])
    number = (
        block[0] * queries[0] + near[0],
        block[1] * queries[1] + near[1],
        block[2] * queries[2] + near[2],
    )
    place = (number[0] * stride[0], number[1] * stride[1], number[2] * stride[2])
    return number, place, (n < volume(queries)) & within(place, size)


@triton.jit
def window_start(block, cut):
    """First voxel of a block's window, which may lie before the volume."""
    _, _, step, _, _, before, _, _, _ = cut
    return block[0] * step[0] - before[0], block[1] * step[1] - before[1], block[2] * step[2] - before[2]


@triton.jit
def hide(s, whole, seen, place, key_place, own):
    """Minus infinity for keys that a query does not see; whole: all are seen by all queries of the tile."""
    if not whole:
        s = tl.where(seen[None, :], s, float("-inf"))
        if own is not None:
            for axis in tl.static_range(3):
                mine = _in_own_window(place[axis], key_place[axis], own[0][axis], own[1][axis], own[2][axis])
                s = tl.where(mine, s, float("-inf"))
    return s


@triton.jit
def _in_own_window(query, key, block, before, window):
    distance = key[None, :] - (query // block * block - before)[:, None]
    return (distance >= 0) & (distance < window)


@triton.jit
def offsets(cut, axis: tl.constexpr):
    """How many offsets queries and keys of an axis have, and rows its table."""
    _, _, _, queries, stride, _, window, _, steps = cut
    step = stride[axis] if steps is None else steps[axis]
    return window[axis] + (queries[axis] - 1) * step


@triton.jit
def row_of_first(place, start, cut, axis: tl.constexpr):
    """Table row of the pair (query, place `start` of an axis): tables begin at the smallest offset."""
    _, _, block, queries, stride, before, _, _, steps = cut
    row = start[axis] - place[axis] + before[axis] + (queries[axis] - 1) * stride[axis]
    if steps is not None:
        behind = queries[axis] - 1 - place[axis] % block[axis] // stride[axis]  # queries of the block
        row -= behind * (stride[axis] - steps[axis])
    return row


@triton.jit
def rows_of(table, count, width, R: tl.constexpr, W: tl.constexpr):
    """A table, zeros below its last row and beside its last column; [R, W]."""
    o = tl.arange(0, R)
    d = tl.arange(0, W)
    mask = (o[:, None] < count) & (d[None, :] < width)
    return tl.load(table + o[:, None] * width + d[None, :], mask=mask, other=0.0)


@triton.jit
def by_place(q, table, count, first, width, R: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """q_n.table[first_n + p]; [queries, P]. Places beyond the table are not for use."""
    product = dot(q, tl.trans(rows_of(table, count, width, R, W)))
    row = tl.minimum(tl.maximum(first[:, None] + tl.arange(0, P)[None, :], 0), R - 1)
    return tl.gather(product, row, 1).to(q.dtype)


@triton.jit
def by_offset(gradient, first, places, dtype: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """The way back of `by_place`: [queries, P] -> [queries, R]."""
    place = tl.arange(0, R)[None, :] - first[:, None]
    moved = tl.gather(gradient, tl.minimum(tl.maximum(place, 0), P - 1), 1)
    return tl.where((place >= 0) & (place < places), moved, 0.0).to(dtype)


@triton.jit
def position_terms(q, rel, place, start, cut, width, R: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """`by_place` for every axis; for one without a table something that is not used."""
    first = q
    second = q
    third = q
    if rel[0] is not None:
        first = by_place(q, rel[0], offsets(cut, 0), row_of_first(place, start, cut, 0), width, R, W, P)
    if rel[1] is not None:
        second = by_place(q, rel[1], offsets(cut, 1), row_of_first(place, start, cut, 1), width, R, W, P)
    if rel[2] is not None:
        third = by_place(q, rel[2], offsets(cut, 2), row_of_first(place, start, cut, 2), width, R, W, P)
    return first, second, third


@triton.jit
def hot(near, dtype: tl.constexpr, P: tl.constexpr):
    """One where a key stands at a place of an axis; [P, keys]."""
    return tl.where(tl.arange(0, P)[:, None] == near[None, :], 1.0, 0.0).to(dtype)


@triton.jit
def logits(q, k, rel, terms, near, scale, P: tl.constexpr):
    """Logits of a tile pair, nothing hidden; near: places of the keys; [queries, keys]."""
    s = dot(q, tl.trans(k)) * scale
    for axis in tl.static_range(3):
        if rel[axis] is not None:
            s += dot(terms[axis], hot(near[axis], q.dtype, P))
    return s


@triton.jit
def bias_of(bias, head, place, start, near, exists, seen, cut):
    """Position bias [queries, keys] from [H, *offsets], for queries that exist and keys that are seen."""
    by_query = head
    by_key = 0
    for axis in tl.static_range(3):
        by_query = by_query * offsets(cut, axis) + row_of_first(place, start, cut, axis)
        by_key = by_key * offsets(cut, axis) + near[axis]
    row = by_query[:, None] + by_key[None, :]
    return tl.load(bias + row, mask=exists[:, None] & seen[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_terms(saved, terms, rel, batch, number, head, exists, window, P: tl.constexpr):
    """Keep what `position_terms` found; saved: [.., heads, places of all axes one after the other]."""
    base = 0
    for axis in tl.static_range(3):
        if rel[axis] is not None:
            shifted = saved[0] + base * saved[1][5], saved[1]
            store(shifted, terms[axis], batch, number, head, exists, window[axis], P)
            base += window[axis]


@triton.jit
def column_of_box(box, rel, C: tl.constexpr):
    """Axis and place of each column of a box's position terms, side by side; axis 3 for columns without."""
    c = tl.arange(0, C)
    axis = tl.full([C], 3, tl.int32)
    place = c
    end = 0
    for a in tl.static_range(3):
        if rel[a] is not None:
            mine = (c >= end) & (c < end + box[a])
            axis = tl.where(mine, a, axis)
            place = tl.where(mine, c - end, place)
            end += box[a]
    return axis, place


@triton.jit
def load_terms(saved, columns, rel, batch, number, head, exists, from_window, window, C: tl.constexpr):
    """Position terms [queries, C] of a box that stands at from_window in the queries' window."""
    axis, place = columns
    inside = axis < 0
    column = place
    base = 0
    for a in tl.static_range(3):
        if rel[a] is not None:
            at = from_window[a] + place
            inside |= (axis == a) & (at >= 0) & (at < window[a])
            column = tl.where(axis == a, base + at, column)
            base += window[a]
    row = addresses(saved, batch, number, head, 1)
    return tl.load(row + column[None, :] * saved[1][5], mask=exists[:, None] & inside[None, :], other=0.0)


@triton.jit
def hot_of_box(columns, near, dtype: tl.constexpr):
    """One where a key stands at the place of a column; [C, keys]."""
    axis, place = columns
    stands = (axis == 0)[:, None] & (near[0][None, :] == place[:, None])
    for a in tl.static_range(1, 3):
        stands |= (axis == a)[:, None] & (near[a][None, :] == place[:, None])
    return tl.where(stands, 1.0, 0.0).to(dtype)
