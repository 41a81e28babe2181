"""Tiles of positions and of channel pairs for the cross-covariance kernels.

A tensor [B, *size, H, D] comes as (pointer, strides) with the strides of batch, three spatial axes, head and
channel. Positions are numbered with the last axis fastest. `inner` holds the lengths of the last two spatial
axes, or None where all positions lie at one stride, the third. The stride of heads is None where they lie
side by side.

The columns of a tile are the channels of G heads one after the other, padded to W, so that a row of a tile is
a whole piece of memory even where one head is a few bytes. A product over positions then gives [W, W] pairs
of channels, of which the D x D blocks on the diagonal belong to pairs of one head. Matrices [B, H, D, D] are
loaded and stored as such blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """Triton's own takes four more instructions to keep results below 1e-38."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def item(heads, parts, G: tl.constexpr):
    """Part, group of heads and batch entry of a program; groups are fastest, since they share lines."""
    groups = tl.cdiv(heads, G)
    program = tl.program_id(0)
    return program // groups % parts, program % groups, (program // groups // parts).to(tl.int64)


@triton.jit
def columns_of(group, heads, D: tl.constexpr, G: tl.constexpr, W: tl.constexpr):
    """Running channel, head and channel in it of each column of a tile, and which of them exist; [W] each."""
    c = tl.arange(0, W)
    head = group * G + c // D
    return group * G * D + c, head, c % D, (c < G * D) & (head < heads)


@triton.jit
def _along(n, inner, strides):
    if inner is None:
        return n.to(tl.int64) * strides[3]
    else:  # noqa: RET505 - Triton compiles what follows a return as well
        row = n // inner[1]
        first = (row // inner[0]).to(tl.int64) * strides[1]
        return first + (row % inner[0]).to(tl.int64) * strides[2] + (n % inner[1]).to(tl.int64) * strides[3]


@triton.jit
def _across(columns, strides):
    if strides[4] is None:
        return columns[0].to(tl.int64) * strides[5]
    else:  # noqa: RET505
        return columns[1].to(tl.int64) * strides[4] + columns[2].to(tl.int64) * strides[5]


@triton.jit
def addresses(x, batch, n, inner, columns):
    """Pointers [positions, W] to some channels at some positions."""
    start = x[0] + batch * x[1][0]
    return start + _along(n, inner, x[1])[:, None] + _across(columns, x[1])[None, :]


@triton.jit
def load(x, batch, n, count, inner, columns):
    """A tile [positions, W], zeros where there is nothing."""
    mask = (n < count)[:, None] & columns[3][None, :]
    return tl.load(addresses(x, batch, n, inner, columns), mask=mask, other=0.0)


@triton.jit
def store(x, value, batch, n, count, inner, columns):
    """Write a tile where there is something."""
    mask = (n < count)[:, None] & columns[3][None, :]
    tl.store(addresses(x, batch, n, inner, columns), value.to(x[0].dtype.element_ty), mask=mask)


@triton.jit
def same_head(columns):
    """Which pairs of columns are channels of one head; [W, W]."""
    _, head, _, inside = columns
    return (head[:, None] == head[None, :]) & inside[:, None] & inside[None, :]


@triton.jit
def _pairs(matrix, batch, heads, columns, D: tl.constexpr):
    _, head, channel, _ = columns
    row = (batch * heads + head) * D + channel
    return matrix + row[:, None] * D + channel[None, :]


@triton.jit
def load_pairs(matrix, batch, heads, columns, D: tl.constexpr):
    """[B, H, D, D] as blocks on the diagonal, zeros beside them; [W, W]."""
    return tl.load(_pairs(matrix, batch, heads, columns, D), mask=same_head(columns), other=0.0)


@triton.jit
def load_norm(norm, which: tl.constexpr, batch, heads, columns, D: tl.constexpr):
    """Norms [B, H, 2, D] of the channels of q (0) or k (1), one where there is no channel; [W]."""
    _, head, channel, inside = columns
    place = ((batch * heads + head) * 2 + which) * D + channel
    return tl.load(norm + place, mask=inside, other=1.0)


@triton.jit
def load_gain(temperature, columns):
    """The temperature of each column's head; [W]."""
    return tl.load(temperature + columns[1], mask=columns[3], other=0.0).to(tl.float32)


@triton.jit
def attention_of(cosine, temperature, batch, heads, columns, D: tl.constexpr):
    """Softmax over the channels of each row's own head; [W, W]."""
    logits = load_gain(temperature, columns)[:, None] * load_pairs(cosine, batch, heads, columns, D)
    seen = same_head(columns)
    logits = tl.where(seen, logits, -1e30)
    a = tl.where(seen, exp(logits - tl.max(logits, 1)[:, None]), 0.0)
    return a / tl.where(columns[3], tl.sum(a, 1), 1.0)[:, None]


@triton.jit
def store_sums(sums, value, first, batch, heads, part, parts, rows, columns, D: tl.constexpr):
    """Put a part's sums [W, W] into [B, H, parts, rows, D] from row `first` on."""
    _, head, channel, _ = columns
    row = ((batch * heads + head) * parts + part) * rows + first + channel
    tl.store(sums + row[:, None] * D + channel[None, :], value, mask=same_head(columns))


@triton.jit
def store_squares(sums, value, row, batch, heads, part, parts, rows, columns, D: tl.constexpr):
    """Put a part's sums [W] into a row of [B, H, parts, rows, D]."""
    _, head, channel, inside = columns
    place = (((batch * heads + head) * parts + part) * rows + row) * D + channel
    tl.store(sums + place, value, mask=inside)


@triton.jit
def add_parts(sums, head, row, first, width, parts, rows, D: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Sum of all parts of a row of [B H, parts, rows, D], from column `first` on, in float64; [W].

    head: the number of head and batch entry together. width: how many columns.
    """
    d = tl.arange(0, W)
    total = tl.zeros([W], tl.float64)
    for p in tl.range(0, parts, P):
        part = p + tl.arange(0, P)
        places = ((head * parts + part) * rows + row) * D
        mask = (part < parts)[:, None] & (d < width)[None, :]
        found = tl.load(sums + places[:, None] + first + d[None, :], mask=mask, other=0.0)
        total += tl.sum(found.to(tl.float64), 0)
    return total
