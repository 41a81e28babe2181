"""What the lambda kernels load: values around positions, rows of the table, outer products.

A tensor comes as (pointer, strides) with the strides of batch, three spatial axes, head (of queries) or depth
(of keys and values) and channel. Volumes of one or two axes have leading axes of size 1. The table comes as
(pointer, rows): contiguous [*rows, U, K], three odd numbers of rows, none beyond 2 size - 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medattn_kernels._device import add, dot, exp, load, unravel, volume, within


@triton.jit
def between(low, high):
    """Sides of a box from its first and last places."""
    return high[0] - low[0] + 1, high[1] - low[1] + 1, high[2] - low[2] + 1


@triton.jit
def partners(place, size, radius):
    """First and last offsets that lead some of the places to others in the volume, within the table.

    For offsets and places exchanged, as a sum over positions needs them, see `partner_places`.
    """
    low = (
        tl.maximum(-radius[0], -tl.max(place[0], 0)),
        tl.maximum(-radius[1], -tl.max(place[1], 0)),
        tl.maximum(-radius[2], -tl.max(place[2], 0)),
    )
    high = (
        tl.minimum(radius[0], size[0] - 1 - tl.min(place[0], 0)),
        tl.minimum(radius[1], size[1] - 1 - tl.min(place[1], 0)),
        tl.minimum(radius[2], size[2] - 1 - tl.min(place[2], 0)),
    )
    return low, high


@triton.jit
def partner_places(offset, size):
    """First and last places that some of the offsets lead to others in the volume."""
    low = (
        tl.maximum(0, -tl.max(offset[0], 0)),
        tl.maximum(0, -tl.max(offset[1], 0)),
        tl.maximum(0, -tl.max(offset[2], 0)),
    )
    high = (
        size[0] - 1 - tl.maximum(0, tl.min(offset[0], 0)),
        size[1] - 1 - tl.maximum(0, tl.min(offset[1], 0)),
        size[2] - 1 - tl.maximum(0, tl.min(offset[2], 0)),
    )
    return low, high


@triton.jit
def radius_of(rows):
    """The largest offsets of a table."""
    return rows[0] // 2, rows[1] // 2, rows[2] // 2


@triton.jit
def along(x, place):
    """How far places lie from the first one of a tensor."""
    strides = x[1]
    return (
        place[0].to(tl.int64) * strides[1]
        + place[1].to(tl.int64) * strides[2]
        + place[2].to(tl.int64) * strides[3]
    )


@triton.jit
def load_around(x, batch, depth, place, exists, offset, known, size, width, X: tl.constexpr):
    """Values at every place moved by every offset, zeros outside the volume; [offsets, places, X]."""
    inside = known[:, None] & exists[None, :]
    for axis in tl.static_range(3):
        moved = offset[axis][:, None] + place[axis][None, :]
        inside &= moved.to(tl.uint32) < size[axis]  # negative ones, taken as unsigned, lie beyond the end
    start = x[0] + batch * x[1][0] + tl.cast(depth, tl.int64) * x[1][4]
    address = start + (along(x, offset)[:, None] + along(x, place)[None, :])
    channel = tl.arange(0, X)
    return tl.load(
        address[:, :, None] + channel.to(tl.int64)[None, None, :] * x[1][5],
        mask=inside[:, :, None] & (channel < width)[None, None, :],
        other=0.0,
    )


@triton.jit
def row_of(offset, rows):
    """Table row of offsets within the table."""
    first = (offset[0] + rows[0] // 2).to(tl.int64)
    return (first * rows[1] + offset[1] + rows[1] // 2) * rows[2] + offset[2] + rows[2] // 2


@triton.jit
def load_rows(table, offset, known, depth, depths, width, W: tl.constexpr):
    """Table entries of some offsets at one depth, zeros where there are none; [offsets, W]."""
    channel = tl.arange(0, W)
    address = table[0] + (row_of(offset, table[1]) * depths + depth) * width
    mask = known[:, None] & (channel < width)[None, :]
    return tl.load(address[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def load_pairs(table, place, other, exists, depth, depths, width, W: tl.constexpr):
    """Table entries of the offsets from every other place to every place; [places, others, W]."""
    rows = table[1]
    offset = (
        place[0][:, None] - other[0][None, :],
        place[1][:, None] - other[1][None, :],
        place[2][:, None] - other[2][None, :],
    )
    known = exists[None, :] & within(add(offset, radius_of(rows)), rows)
    channel = tl.arange(0, W)
    address = table[0] + (row_of(offset, rows) * depths + depth) * width
    mask = known[:, :, None] & (channel < width)[None, None, :]
    return tl.load(address[:, :, None] + channel[None, None, :], mask=mask, other=0.0)


@triton.jit
def products(
    a, b, batch, place, exists, heads, width, other_width, P: tl.constexpr, W: tl.constexpr, X: tl.constexpr
):
    """Outer products of two vectors at every place, summed over the heads; [places, W, X]."""
    total = tl.zeros([P, W, X], tl.float32)
    for h in tl.range(0, heads, disable_licm=True):
        first = load(a, batch, place, tl.cast(h, tl.int64), exists, width, W).to(tl.float32)
        second = load(b, batch, place, tl.cast(h, tl.int64), exists, other_width, X).to(tl.float32)
        total += first[:, :, None] * second[:, None, :]
    return total


@triton.jit
def load_matrix(x, row, width, value_width, W: tl.constexpr, X: tl.constexpr):
    """One of many contiguous matrices [width, value_width], zeros around it; [W, X]."""
    w = tl.arange(0, W)[:, None]
    c = tl.arange(0, X)[None, :]
    address = x + row * width * value_width + w * value_width + c
    return tl.load(address, mask=(w < width) & (c < value_width), other=0.0)


@triton.jit
def store_matrix(x, value, row, width, value_width, W: tl.constexpr, X: tl.constexpr):
    """Write one of many contiguous matrices."""
    w = tl.arange(0, W)[:, None]
    c = tl.arange(0, X)[None, :]
    address = x + row * width * value_width + w * value_width + c
    tl.store(address, value, mask=(w < width) & (c < value_width))


@triton.jit
def load_vector(x, row, width, other: tl.constexpr, W: tl.constexpr):
    """One of many contiguous vectors, `other` beyond it; [W]."""
    w = tl.arange(0, W)
    return tl.load(x + row * width + w, mask=w < width, other=other)


@triton.jit
def store_vector(x, value, row, width, W: tl.constexpr):
    """Write one of many contiguous vectors."""
    w = tl.arange(0, W)
    tl.store(x + row * width + w, value, mask=w < width)


@triton.jit
def content_gradients(
    k, v, gradient, inner, highest, total, item, batch, depth, place, exists, width, value_width,
    W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """What the first lambda sends to the keys and values at some places, [places, W] and [places, X].

    gradient, inner, highest, total: as the kernels have them; item: batch and depth as one number.
    """
    keys = load(k, batch, place, depth, exists, width, W).to(tl.float32)
    values = load(v, batch, place, depth, exists, value_width, X).to(tl.float32)
    share = 1.0 / load_vector(total, item, width, 1.0, W)
    weights = exp(keys - load_vector(highest, item, width, 0.0, W)[None, :]) * share[None, :]
    matrix = load_matrix(gradient, batch, width, value_width, W, X)
    by_weight = dot(values, tl.trans(matrix))
    by_key = weights * (by_weight - load_vector(inner, item, width, 0.0, W)[None, :])
    return by_key, dot(weights, matrix)


@triton.jit
def places(start, box, first, P: tl.constexpr):
    """Places first, first + 1, ... of a box in the volume, and which exist; others repeat the last."""
    n = first + tl.arange(0, P)
    near = unravel(tl.minimum(n, volume(box) - 1), box)
    return add(near, start), n < volume(box)
