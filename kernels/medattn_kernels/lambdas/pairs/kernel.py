"""Lambda attention in Triton, queries first: what each query of a tile takes from each key of a tile.

How tensors and the table come is told in `lambdas.tiles`. A tile is B places in a row of the last axis; one
of queries has G heads of each, side by side: B G rows. W and X are the padded widths of keys and values.

Queries at t + i and keys at s + j meet at offset first + B - 1 + j - i with first = s - t - (B - 1): B early
offsets first + c and B - 1 late ones first + B + c. Of its B keys, a query meets some at an early and the
others at a late offset, and all at different c = j - i - 1 modulo B. So entries are picked from two products
with B table rows each, and a gather by row turns what is by offset into what is by key. Gradients go the same
way back. Late rows of one tile of keys are early rows of the next: a walk along a row of keys takes one new
product per tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medattn_kernels._device import dot
from medattn_kernels.lambdas.tiles import content_gradients, load_matrix, radius_of


@triton.jit
def row_start(x, batch, first, second, head):
    """Where a row of the last axis begins, for one head or depth."""
    strides = x[1]
    return (
        x[0]
        + batch * strides[0]
        + tl.cast(first, tl.int64) * strides[1]
        + tl.cast(second, tl.int64) * strides[2]
        + tl.cast(head, tl.int64) * strides[4]
    )


@triton.jit
def tile_at(x, row, start, length, group, heads, width, B: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """Pointers [B G, D] to places start ... start + B - 1 of a row and G heads, and which of them exist."""
    r = tl.arange(0, B * G)
    place = start + r // G
    head = group * G + r % G
    channel = tl.arange(0, D)
    exists = (place >= 0) & (place < length) & (head < heads)
    along = place.to(tl.int64) * x[1][3] + head.to(tl.int64) * x[1][4]
    address = row + along[:, None] + channel.to(tl.int64)[None, :] * x[1][5]
    return address, exists[:, None] & (channel < width)[None, :]


@triton.jit
def load_tile(x, row, start, length, group, heads, width, B: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """Vectors of a tile, zeros where there are none; [B G, D]."""
    address, exists = tile_at(x, row, start, length, group, heads, width, B, G, D)
    return tl.load(address, mask=exists, other=0.0)


@triton.jit
def store_tile(
    x, value, row, start, length, group, heads, width, B: tl.constexpr, G: tl.constexpr, D: tl.constexpr
):
    """Write the vectors of a tile that exist."""
    address, exists = tile_at(x, row, start, length, group, heads, width, B, G, D)
    tl.store(address, value.to(x[0].dtype.element_ty), mask=exists)


@triton.jit
def table_rows(table, first, second, third, depth, depths, width, B: tl.constexpr, W: tl.constexpr):
    """Table entries of offsets (first, second, third + c) at one depth, zeros beyond the table; [B, W]."""
    rows = table[1]
    last = third + rows[2] // 2 + tl.arange(0, B)
    line = (tl.cast(first + rows[0] // 2, tl.int64) * rows[1] + second + rows[1] // 2) * rows[2]
    channel = tl.arange(0, W)
    address = table[0] + ((line + last) * depths + depth) * width
    mask = ((last >= 0) & (last < rows[2]))[:, None] & (channel < width)[None, :]
    return tl.load(address[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def meets_early(B: tl.constexpr, G: tl.constexpr):
    """Whether a query meets its key at c with an early offset; [B G, B]."""
    i = tl.arange(0, B * G) // G
    return i[:, None] + tl.arange(0, B)[None, :] >= B - 1


@triton.jit
def by_key(early, late, B: tl.constexpr, G: tl.constexpr):
    """Products with early and late rows, [B G, c], turned into those of pairs, [B G, j]."""
    i = tl.arange(0, B * G) // G
    place = (tl.arange(0, B)[None, :] - i[:, None] - 1) & (B - 1)
    return tl.gather(tl.where(meets_early(B, G), early, late), place, 1)


@triton.jit
def by_offset(x, B: tl.constexpr, G: tl.constexpr):
    """[B G, j] turned into [B G, c], of which `meets_early` tells early and late."""
    i = tl.arange(0, B * G) // G
    place = (tl.arange(0, B)[None, :] + i[:, None] + 1) & (B - 1)
    return tl.gather(x, place, 1)


@triton.jit
def span(place, side: tl.constexpr, radius, size):
    """First place and end of what lies within reach of some places in a row."""
    return tl.maximum(place - radius, 0), tl.minimum(place + side + radius, size)


@triton.jit
def tile_of(n, size, B: tl.constexpr):
    """Place on the first two axes and start on the last of tile n."""
    tiles = tl.cdiv(size[2], B)
    return n // tiles // size[1], n // tiles % size[1], n % tiles * B


@triton.jit
def forward(
    q, v, table, content, out, size, heads, depths, width, value_width,
    B: tl.constexpr, G: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, batch, group of heads): their outputs."""
    batch = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    n0, n1, t = tile_of(tl.program_id(0), size, B)
    queries = load_tile(q, row_start(q, batch, n0, n1, 0), t, size[2], group, heads, width, B, G, W)
    acc = dot(queries.to(tl.float32), load_matrix(content, batch, width, value_width, W, X))
    radius = radius_of(table[1])
    low0, high0 = span(n0, 1, radius[0], size[0])
    low1, high1 = span(n1, 1, radius[1], size[1])
    low2, high2 = span(t, B, radius[2], size[2])
    for depth in tl.range(0, depths, disable_licm=True):
        for m0 in tl.range(low0, high0, disable_licm=True):
            for m1 in tl.range(low1, high1, disable_licm=True):
                row = row_start(v, batch, m0, m1, depth)
                near = table_rows(table, m0 - n0, m1 - n1, low2 - t - (B - 1), depth, depths, width, B, W)
                early = dot(queries, tl.trans(near))
                for s in tl.range(low2, high2, B, disable_licm=True):
                    near = table_rows(table, m0 - n0, m1 - n1, s - t + 1, depth, depths, width, B, W)
                    late = dot(queries, tl.trans(near))
                    weights = by_key(early, late, B, G)
                    values = load_tile(v, row, s, size[2], 0, 1, value_width, B, 1, X)
                    acc += dot(weights.to(values.dtype), values)
                    early = late
    store_tile(out, acc, row_start(out, batch, n0, n1, 0), t, size[2], group, heads, value_width, B, G, X)


@triton.jit
def backward_queries(
    dout, v, table, content, dq, size, heads, depths, width, value_width,
    B: tl.constexpr, G: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, batch, group of heads): their gradients.

    Every block of table rows is late for one tile of keys and early for the next: both at once.
    """
    batch = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    n0, n1, t = tile_of(tl.program_id(0), size, B)
    dy = load_tile(dout, row_start(dout, batch, n0, n1, 0), t, size[2], group, heads, value_width, B, G, X)
    acc = dot(dy.to(tl.float32), tl.trans(load_matrix(content, batch, width, value_width, W, X)))
    is_early = meets_early(B, G)
    radius = radius_of(table[1])
    low0, high0 = span(n0, 1, radius[0], size[0])
    low1, high1 = span(n1, 1, radius[1], size[1])
    low2, high2 = span(t, B, radius[2], size[2])
    for depth in tl.range(0, depths, disable_licm=True):
        for m0 in tl.range(low0, high0, disable_licm=True):
            for m1 in tl.range(low1, high1, disable_licm=True):
                row = row_start(v, batch, m0, m1, depth)
                before = tl.zeros([B * G, B], tl.float32)
                # one tile more: what is late for the last one
                for s in tl.range(low2, high2 + B, B, disable_licm=True):
                    near = table_rows(table, m0 - n0, m1 - n1, s - t - (B - 1), depth, depths, width, B, W)
                    values = load_tile(v, row, s, size[2], 0, 1, value_width, B, 1, X)
                    moved = by_offset(dot(dy, tl.trans(values)), B, G)
                    acc += dot(tl.where(is_early, moved, before).to(near.dtype), near)
                    before = moved
    store_tile(dq, acc, row_start(dq, batch, n0, n1, 0), t, size[2], group, heads, width, B, G, W)


@triton.jit
def backward_values(
    q, k, v, dout, table, content_gradient, inner, highest, total, dk, dv,
    size, heads, depths, width, value_width,
    B: tl.constexpr, G: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Program (tile of keys, batch and depth): gradients of its keys and values.

    inner: float32 [B, U, K], sum over all positions of weight times its gradient.
    """
    item = tl.program_id(1).to(tl.int64)
    batch = item // depths
    depth = item % depths
    m0, m1, s = tile_of(tl.program_id(0), size, B)
    place = s + tl.arange(0, B)
    zero = tl.zeros([B], tl.int32)
    by_key_part, acc = content_gradients(
        k, v, content_gradient, inner, highest, total, item, batch, depth,
        (zero + m0, zero + m1, place), place < size[2], width, value_width, W, X,
    )  # fmt: skip
    start = row_start(dk, batch, m0, m1, depth)
    store_tile(dk, by_key_part, start, s, size[2], 0, 1, width, B, 1, W)
    radius = radius_of(table[1])
    low0, high0 = span(m0, 1, radius[0], size[0])
    low1, high1 = span(m1, 1, radius[1], size[1])
    low2, high2 = span(s, B, radius[2], size[2])
    for n0 in tl.range(low0, high0, disable_licm=True):
        for n1 in tl.range(low1, high1, disable_licm=True):
            query_row = row_start(q, batch, n0, n1, 0)
            gradient_row = row_start(dout, batch, n0, n1, 0)
            for t in tl.range(low2, high2, B, disable_licm=True):
                first = s - t - (B - 1)
                soon = table_rows(table, m0 - n0, m1 - n1, first, depth, depths, width, B, W)
                then = table_rows(table, m0 - n0, m1 - n1, first + B, depth, depths, width, B, W)
                for group in tl.range(0, tl.cdiv(heads, G), disable_licm=True):
                    queries = load_tile(q, query_row, t, size[2], group, heads, width, B, G, W)
                    dy = load_tile(dout, gradient_row, t, size[2], group, heads, value_width, B, G, X)
                    early = dot(queries, tl.trans(soon))
                    late = dot(queries, tl.trans(then))
                    weights = by_key(early, late, B, G)
                    acc += dot(tl.trans(weights.to(dy.dtype)), dy)
    store_tile(dv, acc, row_start(dv, batch, m0, m1, depth), s, size[2], 0, 1, value_width, B, 1, X)


@triton.jit
def backward_table(
    q, v, dout, sums, rows, size, batches, heads, depths, width, value_width, steps,
    B: tl.constexpr, G: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Program (first two offsets and step, depth, part): table gradients from a share of the rows.

    Keys start at t - radius + step B for queries that start at t. sums: float32 [parts, U, R, R, steps, 2 B,
    W], early offsets, then late ones.
    """
    step = tl.program_id(0) % steps
    line = tl.program_id(0) // steps
    depth = tl.program_id(1)
    radius = radius_of(rows)
    o0 = line // rows[1] - radius[0]
    o1 = line % rows[1] - radius[1]
    shift = step * B - radius[2]
    side0 = size[0] - tl.abs(o0)
    side1 = size[1] - tl.abs(o1)
    begin = tl.maximum(-shift, 0) // B * B
    end = tl.minimum(size[2], size[2] - shift)
    early = tl.zeros([B, W], tl.float32)
    late = tl.zeros([B, W], tl.float32)
    is_early = meets_early(B, G)
    for n in tl.range(tl.program_id(2), batches * side0 * side1, tl.num_programs(2), disable_licm=True):
        batch = (n // side1 // side0).to(tl.int64)
        n0 = n // side1 % side0 + tl.maximum(-o0, 0)
        n1 = n % side1 + tl.maximum(-o1, 0)
        row = row_start(v, batch, n0 + o0, n1 + o1, depth)
        query_row = row_start(q, batch, n0, n1, 0)
        gradient_row = row_start(dout, batch, n0, n1, 0)
        for t in tl.range(begin, end, B, disable_licm=True):
            values = load_tile(v, row, t + shift, size[2], 0, 1, value_width, B, 1, X)
            for group in tl.range(0, tl.cdiv(heads, G), disable_licm=True):
                queries = load_tile(q, query_row, t, size[2], group, heads, width, B, G, W)
                dy = load_tile(dout, gradient_row, t, size[2], group, heads, value_width, B, G, X)
                moved = by_offset(dot(dy, tl.trans(values)), B, G)
                early += dot(tl.trans(tl.where(is_early, moved, 0.0).to(queries.dtype)), queries)
                late += dot(tl.trans(tl.where(is_early, 0.0, moved).to(queries.dtype)), queries)
    item = (tl.program_id(2).to(tl.int64) * depths + depth) * tl.num_programs(0) + tl.program_id(0)
    where = item * 2 * B + tl.arange(0, B)
    channel = tl.arange(0, W)
    address = sums + where[:, None] * W + channel[None, :]
    tl.store(address, early)
    tl.store(address + B * W, late)
