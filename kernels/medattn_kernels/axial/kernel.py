"""Axial attention in Triton: tiles of queries and keys of one line; no map and no unfolded table exists.

A line is everything along the axis for one batch entry, one place off the axis and one head. How tensors are
passed and how tables meet tiles is told in `tiles`. B is the side of a tile, W and X are the padded widths
of keys and values; `tables` are rel_q, rel_k, rel_v or None each, `rows` their lengths, `reach` the largest
offset that is seen. Logits are in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medattn_kernels._device import dot
from medattn_kernels.axial.tiles import (
    key_logits,
    key_sums,
    line_of,
    load_tile,
    query_logits,
    query_sums,
    split_by_key,
    split_by_query,
    store_tile,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _gains(gain, head, heads, scale, HAS_GAIN: tl.constexpr):
    """scale times the gain of each term."""
    if HAS_GAIN:
        return (
            scale * tl.load(gain + head),
            scale * tl.load(gain + heads + head),
            scale * tl.load(gain + 2 * heads + head),
        )
    return scale, scale, scale


@triton.jit
def _logits(q, k, tables, rows, first, width, gains, B: tl.constexpr, W: tl.constexpr):
    """Logits of a tile pair in units of log 2, unmasked; [B, B]."""
    s = gains[0] * dot(q, tl.trans(k))
    if tables[0] is not None:
        s += gains[1] * query_logits(q, tables[0], rows[0], first, width, B, W)
    if tables[1] is not None:
        s += gains[2] * key_logits(k, tables[1], rows[1], first, width, B, W)
    return s * LOG2E


@triton.jit
def _seen(m, n, length, reach, B: tl.constexpr):
    """Which pairs take part; [B, B]."""
    i = m * B + tl.arange(0, B)
    j = n * B + tl.arange(0, B)
    offset = j[None, :] - i[:, None]
    return (j[None, :] < length) & (i[:, None] < length) & (offset <= reach) & (-offset <= reach)


@triton.jit
def _neighbours(m, length, reach, B: tl.constexpr):
    """First tile and end of the tiles within reach of tile m."""
    first = tl.maximum(m * B - reach, 0) // B
    last = tl.minimum(m * B + B - 1 + reach, length - 1) // B
    return first, last + 1


@triton.jit
def forward(
    q, k, v, tables, gain, content, position, lse,
    rows, shape, reach, scale,
    HAS_GAIN: tl.constexpr, SEPARATE: tl.constexpr, B: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Program (line, m): outputs and log-sum-exp of the queries of tile m."""
    length, width, value_width = shape[3], shape[4], shape[5]
    tiles = tl.cdiv(length, B)
    program = tl.program_id(0).to(tl.int64)
    line = program // tiles
    m = tl.program_id(0) % tiles
    q = line_of(q, line, shape)
    k = line_of(k, line, shape)
    v = line_of(v, line, shape)
    gains = _gains(gain, line % shape[2], shape[2], scale, HAS_GAIN)
    queries = load_tile(q, m * B, length, width, B, W)
    highest = tl.full([B], float("-inf"), tl.float32)
    total = tl.zeros([B], tl.float32)
    y = tl.zeros([B, X], tl.float32)
    z = tl.zeros([B, X], tl.float32)
    start, end = _neighbours(m, length, reach, B)
    # masks and places hoisted out of the loop would take half of the registers
    for n in tl.range(start, end, disable_licm=True):
        first = (n - m) * B - (B - 1)
        keys = load_tile(k, n * B, length, width, B, W)
        s = _logits(queries, keys, tables, rows, first, width, gains, B, W)
        s = tl.where(_seen(m, n, length, reach, B), s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
        a = tl.exp2(s - shift[:, None])
        fade = tl.exp2(highest - shift)
        total = total * fade + tl.sum(a, 1)
        highest = higher
        y = y * fade[:, None]
        values = load_tile(v, n * B, length, value_width, B, X)
        y += dot(a.to(values.dtype), values)
        if tables[2] is not None:
            part = query_sums(a, tables[2], rows[2], first, value_width, B, X)
            if SEPARATE:
                z = z * fade[:, None] + part
            else:
                y += part
    i = m * B + tl.arange(0, B)
    total = tl.where(i < length, total, 1.0)
    content = line_of(content, line, shape)
    store_tile(content, y / total[:, None], m * B, length, value_width, B, X)
    if SEPARATE:
        position = line_of(position, line, shape)
        store_tile(position, z / total[:, None], m * B, length, value_width, B, X)
    tl.store(lse + line * length + i, highest + tl.log2(total), mask=i < length)


@triton.jit
def _gradients(
    s, lse, delta, values, gradient, position_gradient, table, count, first, value_width, seen,
    B: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Attention and the gradient of the logits of a tile pair, [B, B] each."""
    a = tl.exp2(tl.where(seen, s, float("-inf")) - lse[:, None])
    da = dot(gradient, tl.trans(values))
    if table is not None:
        da += query_logits(position_gradient, table, count, first, value_width, B, X)
    return a, a * (da - delta[:, None])


@triton.jit
def backward_queries(
    q, k, v, tables, gain, content, position, dcontent, dposition, lse, delta, dq, dgain,
    rows, shape, reach, scale,
    HAS_GAIN: tl.constexpr, SEPARATE: tl.constexpr, B: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Program (line, m): dq of tile m; writes delta = dy.y for the other passes. dgain: [3, programs],
    of which this pass writes the first two."""
    length, width, value_width = shape[3], shape[4], shape[5]
    tiles = tl.cdiv(length, B)
    program = tl.program_id(0).to(tl.int64)
    line = program // tiles
    m = tl.program_id(0) % tiles
    q = line_of(q, line, shape)
    k = line_of(k, line, shape)
    v = line_of(v, line, shape)
    content = line_of(content, line, shape)
    dcontent = line_of(dcontent, line, shape)
    gains = _gains(gain, line % shape[2], shape[2], scale, HAS_GAIN)
    queries = load_tile(q, m * B, length, width, B, W)
    gradient = load_tile(dcontent, m * B, length, value_width, B, X)
    output = load_tile(content, m * B, length, value_width, B, X)
    inner = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    position_gradient = gradient
    if SEPARATE:
        position = line_of(position, line, shape)
        dposition = line_of(dposition, line, shape)
        position_gradient = load_tile(dposition, m * B, length, value_width, B, X)
        output = load_tile(position, m * B, length, value_width, B, X)
        inner += tl.sum(position_gradient.to(tl.float32) * output.to(tl.float32), 1)
    i = m * B + tl.arange(0, B)
    tl.store(delta + line * length + i, inner, mask=i < length)
    norm = tl.load(lse + line * length + i, mask=i < length, other=0.0)
    by_key = tl.zeros([B, W], tl.float32)
    by_row = tl.zeros([B, W], tl.float32)
    start, end = _neighbours(m, length, reach, B)
    for n in tl.range(start, end, disable_licm=True):
        first = (n - m) * B - (B - 1)
        keys = load_tile(k, n * B, length, width, B, W)
        values = load_tile(v, n * B, length, value_width, B, X)
        s = _logits(queries, keys, tables, rows, first, width, gains, B, W)
        seen = _seen(m, n, length, reach, B)
        _, ds = _gradients(
            s,
            norm,
            inner,
            values,
            gradient,
            position_gradient,
            tables[2],
            rows[2],
            first,
            value_width,
            seen,
            B,
            X,
        )
        by_key += dot(ds.to(keys.dtype), keys)
        if tables[0] is not None:
            by_row += query_sums(ds, tables[0], rows[0], first, width, B, W)
    dq = line_of(dq, line, shape)
    store_tile(dq, gains[0] * by_key + gains[1] * by_row, m * B, length, width, B, W)
    if HAS_GAIN:
        programs = tl.num_programs(0).to(tl.int64)
        tl.store(dgain + program, scale * tl.sum(queries.to(tl.float32) * by_key))
        tl.store(dgain + programs + program, scale * tl.sum(queries.to(tl.float32) * by_row))


@triton.jit
def backward_keys(
    q, k, v, tables, gain, dcontent, dposition, lse, delta, dk, dv, dgain,
    rows, shape, reach, scale,
    HAS_GAIN: tl.constexpr, SEPARATE: tl.constexpr, B: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Program (line, n): dk and dv of tile n, and the last part of dgain."""
    length, width, value_width = shape[3], shape[4], shape[5]
    tiles = tl.cdiv(length, B)
    program = tl.program_id(0).to(tl.int64)
    line = program // tiles
    n = tl.program_id(0) % tiles
    q = line_of(q, line, shape)
    k = line_of(k, line, shape)
    v = line_of(v, line, shape)
    dcontent = line_of(dcontent, line, shape)
    if SEPARATE:
        dposition = line_of(dposition, line, shape)
    gains = _gains(gain, line % shape[2], shape[2], scale, HAS_GAIN)
    keys = load_tile(k, n * B, length, width, B, W)
    values = load_tile(v, n * B, length, value_width, B, X)
    by_query = tl.zeros([B, W], tl.float32)
    by_row = tl.zeros([B, W], tl.float32)
    dvalues = tl.zeros([B, X], tl.float32)
    start, end = _neighbours(n, length, reach, B)
    for m in tl.range(start, end, disable_licm=True):
        first = (n - m) * B - (B - 1)
        i = m * B + tl.arange(0, B)
        queries = load_tile(q, m * B, length, width, B, W)
        gradient = load_tile(dcontent, m * B, length, value_width, B, X)
        position_gradient = gradient
        if SEPARATE:
            position_gradient = load_tile(dposition, m * B, length, value_width, B, X)
        norm = tl.load(lse + line * length + i, mask=i < length, other=0.0)
        inner = tl.load(delta + line * length + i, mask=i < length, other=0.0)
        s = _logits(queries, keys, tables, rows, first, width, gains, B, W)
        seen = _seen(m, n, length, reach, B)
        a, ds = _gradients(
            s,
            norm,
            inner,
            values,
            gradient,
            position_gradient,
            tables[2],
            rows[2],
            first,
            value_width,
            seen,
            B,
            X,
        )
        dvalues += dot(tl.trans(a).to(gradient.dtype), gradient)
        by_query += dot(tl.trans(ds).to(queries.dtype), queries)
        if tables[1] is not None:
            by_row += key_sums(ds, tables[1], rows[1], first, width, B, W)
    dk = line_of(dk, line, shape)
    dv = line_of(dv, line, shape)
    store_tile(dk, gains[0] * by_query + gains[2] * by_row, n * B, length, width, B, W)
    store_tile(dv, dvalues, n * B, length, value_width, B, X)
    if HAS_GAIN:
        programs = tl.num_programs(0).to(tl.int64)
        tl.store(dgain + 2 * programs + program, scale * tl.sum(keys.to(tl.float32) * by_row))


@triton.jit
def backward_tables(
    q, k, v, tables, gain, dcontent, dposition, lse, delta, sums, lines, diagonals,
    rows, shape, reach, scale,
    HAS_GAIN: tl.constexpr, SEPARATE: tl.constexpr, B: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Program (part, diagonal): table gradients by offset over the tile pairs n - m = diagonal of some lines.

    sums: float32 [parts, diagonals, 2 B, W] for rel_q and rel_k and [.., X] for rel_v, or None. The lines of
    a part and their tiles are walked in a fixed order, so the result does not depend on timing.
    """
    length, width, value_width = shape[3], shape[4], shape[5]
    part = tl.program_id(0).to(tl.int64)
    parts = tl.num_programs(0)
    step = tl.program_id(1) - diagonals // 2
    first = step * B - (B - 1)
    tiles = tl.cdiv(length, B)
    early_q = tl.zeros([B, W], tl.float32)
    late_q = tl.zeros([B, W], tl.float32)
    early_k = tl.zeros([B, W], tl.float32)
    late_k = tl.zeros([B, W], tl.float32)
    early_v = tl.zeros([B, X], tl.float32)
    late_v = tl.zeros([B, X], tl.float32)
    for line in tl.range(part, lines, parts, disable_licm=True):
        gains = _gains(gain, line % shape[2], shape[2], scale, HAS_GAIN)
        q_line = line_of(q, line, shape)
        k_line = line_of(k, line, shape)
        v_line = line_of(v, line, shape)
        gradient_line = line_of(dcontent, line, shape)
        if SEPARATE:
            position_line = line_of(dposition, line, shape)
        for m in tl.range(tl.maximum(0, -step), tl.minimum(tiles, tiles - step), disable_licm=True):
            n = m + step
            i = m * B + tl.arange(0, B)
            queries = load_tile(q_line, m * B, length, width, B, W)
            keys = load_tile(k_line, n * B, length, width, B, W)
            values = load_tile(v_line, n * B, length, value_width, B, X)
            gradient = load_tile(gradient_line, m * B, length, value_width, B, X)
            position_gradient = gradient
            if SEPARATE:
                position_gradient = load_tile(position_line, m * B, length, value_width, B, X)
            norm = tl.load(lse + line * length + i, mask=i < length, other=0.0)
            inner = tl.load(delta + line * length + i, mask=i < length, other=0.0)
            s = _logits(queries, keys, tables, rows, first, width, gains, B, W)
            seen = _seen(m, n, length, reach, B)
            a, ds = _gradients(
                s, norm, inner, values, gradient, position_gradient, tables[2], rows[2], first, value_width,
                seen, B, X,
            )  # fmt: skip
            if tables[0] is not None:
                early, late = split_by_query(gains[1] * ds, queries.dtype, B)
                early_q += dot(tl.trans(early), queries)
                late_q += dot(tl.trans(late), queries)
            if tables[1] is not None:
                early, late = split_by_key(gains[2] * ds, keys.dtype, B)
                early_k += dot(early, keys)
                late_k += dot(late, keys)
            if tables[2] is not None:
                early, late = split_by_query(a, position_gradient.dtype, B)
                early_v += dot(tl.trans(early), position_gradient)
                late_v += dot(tl.trans(late), position_gradient)
    row = (part * diagonals + tl.program_id(1)) * 2 * B
    if tables[0] is not None:
        _store_sums(sums[0], row, early_q, late_q, B, W)
    if tables[1] is not None:
        _store_sums(sums[1], row, early_k, late_k, B, W)
    if tables[2] is not None:
        _store_sums(sums[2], row, early_v, late_v, B, X)


@triton.jit
def _store_sums(sums, row, early, late, B: tl.constexpr, W: tl.constexpr):
    places = sums + (row + tl.arange(0, B))[:, None] * W + tl.arange(0, W)[None, :]
    tl.store(places, early)
    tl.store(places + B * W, late)
