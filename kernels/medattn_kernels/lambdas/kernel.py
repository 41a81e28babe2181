"""Lambda attention in Triton: position lambdas of a few positions at a time, in registers.

How tensors come is told in `tiles`. P positions, T offsets, W and X the padded widths of keys and values.
`content` is float32 [B, K, V], the first lambda; `content_gradient` its gradient. `highest` and `total`,
float32 [B, U, K], are the largest key over all positions and the sum of exponentials over it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medattn_kernels._device import add, dot, exp, load, store, unravel, volume, within
from medattn_kernels.lambdas.tiles import (
    between,
    content_gradients,
    load_around,
    load_matrix,
    load_pairs,
    load_rows,
    partner_places,
    partners,
    places,
    products,
    radius_of,
    store_matrix,
    store_vector,
)


@triton.jit
def forward_content(
    k, v, highest, total, content, size, depths, width, value_width,
    P: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Program (batch, depth, part): the first lambda over a share of the positions, with its softmax sums."""
    item = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    batch = item // depths
    depth = item % depths
    top = tl.full([W], float("-inf"), tl.float32)
    sums = tl.zeros([W], tl.float32)
    acc = tl.zeros([W, X], tl.float32)
    for n in tl.range(part * P, volume(size), parts * P, disable_licm=True):
        place, exists = places((0, 0, 0), size, n, P)
        keys = load(k, batch, place, depth, exists, width, W).to(tl.float32)
        keys = tl.where(exists[:, None], keys, float("-inf"))
        values = load(v, batch, place, depth, exists, value_width, X)
        higher = tl.maximum(top, tl.max(keys, 0))
        a = exp(keys - higher[None, :])
        fade = exp(top - higher)
        sums = sums * fade + tl.sum(a, 0)
        acc = acc * fade[:, None] + dot(tl.trans(a.to(values.dtype)), values)
        top = higher
    row = item * parts + part
    store_vector(highest, top, row, width, W)
    store_vector(total, sums, row, width, W)
    store_matrix(content, acc, row, width, value_width, W, X)


@triton.jit
def _lambdas(
    v, table, content, batch, place, exists, size, depths, width, value_width,
    P: tl.constexpr, T: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Both lambdas of some positions; [W, P, X]."""
    acc = tl.broadcast_to(load_matrix(content, batch, width, value_width, W, X)[:, None, :], [W, P, X])
    if table is not None:
        acc = tl.reshape(acc, [W, P * X])
        low, high = partners(place, size, radius_of(table[1]))
        box = between(low, high)
        for depth in tl.range(0, depths, disable_licm=True):
            for n in tl.range(0, volume(box), T, disable_licm=True):
                offset, known = places(low, box, n, T)
                rows = load_rows(table, offset, known, depth, depths, width, W)
                x = load_around(v, batch, depth, place, exists, offset, known, size, value_width, X)
                acc += dot(tl.trans(rows), tl.reshape(x, [T, P * X]))
        acc = tl.reshape(acc, [W, P, X])
    return acc


@triton.jit
def forward(
    q, v, table, content, out, size, heads, depths, width, value_width,
    P: tl.constexpr, T: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Program (tile of positions, batch): their lambdas, applied to the queries of all heads."""
    batch = tl.program_id(1).to(tl.int64)
    place, exists = places((0, 0, 0), size, tl.program_id(0) * P, P)
    matrices = _lambdas(v, table, content, batch, place, exists, size, depths, width, value_width, P, T, W, X)
    for h in tl.range(0, heads, disable_licm=True):
        queries = load(q, batch, place, tl.cast(h, tl.int64), exists, width, W).to(tl.float32)
        y = tl.sum(matrices * tl.trans(queries)[:, :, None], 0)
        store(out, y, batch, place, tl.cast(h, tl.int64), exists, value_width, X)


@triton.jit
def backward_queries(
    dout, v, table, content, dq, size, heads, depths, width, value_width,
    P: tl.constexpr, T: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Program (tile of positions, batch): their lambdas again, applied to the gradients of the outputs."""
    batch = tl.program_id(1).to(tl.int64)
    place, exists = places((0, 0, 0), size, tl.program_id(0) * P, P)
    matrices = _lambdas(v, table, content, batch, place, exists, size, depths, width, value_width, P, T, W, X)
    for h in tl.range(0, heads, disable_licm=True):
        gradient = load(dout, batch, place, tl.cast(h, tl.int64), exists, value_width, X).to(tl.float32)
        by_query = tl.sum(matrices * gradient[None, :, :], 2)
        store(dq, tl.trans(by_query), batch, place, tl.cast(h, tl.int64), exists, width, W)


@triton.jit
def backward_content(
    q, dout, sums, size, heads, width, value_width,
    P: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Program (batch, part): gradient of the first lambda from a share of the positions."""
    batch = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    acc = tl.zeros([W, X], tl.float32)
    for n in tl.range(part * P, volume(size), parts * P, disable_licm=True):
        place, exists = places((0, 0, 0), size, n, P)
        for h in tl.range(0, heads, disable_licm=True):
            queries = load(q, batch, place, tl.cast(h, tl.int64), exists, width, W)
            gradient = load(dout, batch, place, tl.cast(h, tl.int64), exists, value_width, X)
            acc += dot(tl.trans(queries), gradient)
    store_matrix(sums, acc, batch * parts + part, width, value_width, W, X)


@triton.jit
def backward_table(
    q, v, dout, sums, rows, size, batches, heads, depths, width, value_width,
    P: tl.constexpr, T: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Program (tile of offsets, depth, part): their gradient from a share of the positions.

    sums: float32 [parts, *rows, U, K].
    """
    depth = tl.program_id(1)
    part = tl.program_id(2)
    radius = radius_of(rows)
    offset, known = places((-radius[0], -radius[1], -radius[2]), rows, tl.program_id(0) * T, T)
    low, high = partner_places(offset, size)
    box = between(low, high)
    tiles = tl.cdiv(volume(box), P)
    acc = tl.zeros([T, W], tl.float32)
    for item in tl.range(part, batches * tiles, tl.num_programs(2), disable_licm=True):
        batch = (item // tiles).to(tl.int64)
        place, exists = places(low, box, item % tiles * P, P)
        x = load_around(v, batch, depth, place, exists, offset, known, size, value_width, X)
        outer = products(dout, q, batch, place, exists, heads, value_width, width, P, X, W)
        acc += dot(tl.reshape(x, [T, P * X]), tl.reshape(outer, [P * X, W]).to(x.dtype))
    n = tl.program_id(0) * T + tl.arange(0, T)
    row = ((part.to(tl.int64) * volume(rows) + n) * depths + depth) * width
    channel = tl.arange(0, W)
    tl.store(sums + row[:, None] + channel[None, :], acc, mask=known[:, None] & (channel < width)[None, :])


@triton.jit
def backward_values(
    q, k, v, dout, table, content_gradient, inner, highest, total, dk, dv,
    size, boxes, heads, depths, width, value_width,
    P: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
):  # fmt: skip
    """Program (box of positions, batch and depth): gradients of its keys and values.

    boxes: how many along each axis. inner: float32 [B, U, K], sum over all positions of weight times its
    gradient. Every position around the box sends it the products of queries and gradients, through the table.
    """
    M: tl.constexpr = B0 * B1 * B2
    item = tl.program_id(1).to(tl.int64)
    batch = item // depths
    depth = item % depths
    box = unravel(tl.program_id(0), boxes)
    start = (box[0] * B0, box[1] * B1, box[2] * B2)
    place = add(unravel(tl.arange(0, M), (B0, B1, B2)), start)
    exists = within(place, size)
    by_key, acc = content_gradients(
        k, v, content_gradient, inner, highest, total, item, batch, depth, place, exists,
        width, value_width, W, X,
    )  # fmt: skip
    store(dk, by_key, batch, place, depth, exists, width, W)
    if table is not None:
        radius = radius_of(table[1])
        low = (
            tl.maximum(start[0] - radius[0], 0),
            tl.maximum(start[1] - radius[1], 0),
            tl.maximum(start[2] - radius[2], 0),
        )
        high = (
            tl.minimum(start[0] + B0 + radius[0], size[0]) - 1,
            tl.minimum(start[1] + B1 + radius[1], size[1]) - 1,
            tl.minimum(start[2] + B2 + radius[2], size[2]) - 1,
        )
        around = between(low, high)
        for n in tl.range(0, volume(around), P, disable_licm=True):
            other, real = places(low, around, n, P)
            rows = load_pairs(table, place, other, real, depth, depths, width, W)
            outer = products(q, dout, batch, other, real, heads, width, value_width, P, W, X)
            acc += dot(tl.reshape(rows, [M, P * W]), tl.reshape(outer, [P * W, X]).to(rows.dtype))
    store(dv, acc, batch, place, depth, exists, value_width, X)
