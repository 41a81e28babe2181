"""Block attention in Triton: tiles of one block's queries on tiles of their window; no window is unfolded.

How tensors and cuts are passed and what becomes of position terms is told in `tiles`. Q and K are the sides
of a tile of queries and of keys, W and X the padded widths of keys and values, P and R the padded numbers of
places and of offsets along an axis. `rel` holds one table per axis or None, with a row for every offset that
occurs, `bias` the same for all axes jointly. MASKED: what lies outside the volume does not exist; if not, it
is zeros. `norm` holds what `tiles.store_norm` says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medattn_kernels._device import add, dot, exp, load, store, unravel, volume, within
from medattn_kernels.block.tiles import (
    bias_of,
    by_offset,
    column_of_box,
    hide,
    hot,
    hot_of_box,
    load_norm,
    load_number,
    load_terms,
    logits,
    offsets,
    position_terms,
    queries_of,
    quick_unravel,
    row_of_first,
    rows_of,
    store_norm,
    store_number,
    store_terms,
    window_start,
)


@triton.jit
def _item(program, tiles, heads, cut):
    """Tile, head, block and batch entry of a running number."""
    blocks = cut[1]
    tile = program % tiles
    head = (program // tiles) % heads
    block = unravel((program // tiles // heads) % volume(blocks), blocks)
    return tile, head, block, (program // tiles // heads // volume(blocks)).to(tl.int64)


@triton.jit
def _window_tile(n, start, cut, K: tl.constexpr, MASKED: tl.constexpr):
    """Keys n, n + 1, ... of a window: places in it and in the volume, which have a voxel, which are seen."""
    size, window = cut[0], cut[6]
    m = n + tl.arange(0, K)
    near = quick_unravel(m, window, cut[7][1])
    place = add(near, start)
    real = (m < volume(window)) & within(place, size)
    return near, place, real, (real if MASKED else m < volume(window))


@triton.jit
def _inside(start, cut, own, MASKED: tl.constexpr):
    """Whether all queries of a block see its whole window."""
    if own is not None:
        return False
    else:  # noqa: RET505 - Triton compiles what follows a return as well
        return _holds((0, 0, 0), cut[0], start, cut[6]) if MASKED else True


@triton.jit
def _holds(start, size, part, part_size):
    """Whether a box lies inside another; first places and sides of both."""
    holds = (part[0] >= start[0]) & (part[0] + part_size[0] <= start[0] + size[0])
    for axis in tl.static_range(1, 3):
        holds &= (part[axis] >= start[axis]) & (part[axis] + part_size[axis] <= start[axis] + size[axis])
    return holds


@triton.jit
def forward(
    q, k, v, rel, bias, out, norm, cut, own, heads, width, value_width, scale,
    MASKED: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Program (batch, block, head, tile): outputs of a tile of queries and the sums that normalise them."""
    tiles = tl.cdiv(volume(cut[3]), Q)
    tile, head, block, batch = _item(tl.program_id(0), tiles, heads, cut)
    number, place, exists = queries_of(block, tile, cut, Q)
    queries = load(q, batch, place, head, exists, width, W)
    start = window_start(block, cut)
    inside = _inside(start, cut, own, MASKED)
    terms = position_terms(queries, rel, place, start, cut, width, R, W, P)
    highest = tl.full([Q], float("-inf"), tl.float32)
    total = tl.zeros([Q], tl.float32)
    y = tl.zeros([Q, X], tl.float32)
    for n in tl.range(0, volume(cut[6]), K, disable_licm=True):
        near, key_place, real, seen = _window_tile(n, start, cut, K, MASKED)
        keys = load(k, batch, key_place, head, real, width, W)
        s = logits(queries, keys, rel, terms, near, scale, P)
        if bias is not None:
            s += bias_of(bias, head, place, start, near, exists, seen, cut)
        s = hide(s, inside & (n + K <= volume(cut[6])), seen, place, key_place, own)
        higher = tl.maximum(highest, tl.max(s, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # no key seen yet
        a = exp(s - shift[:, None])
        fade = exp(highest - shift)
        total = total * fade + tl.sum(a, 1)
        highest = higher
        values = load(v, batch, key_place, head, real, value_width, X)
        y = y * fade[:, None] + dot(a.to(values.dtype), values)
    total = tl.where(exists, total, 1.0)
    store(out, y / total[:, None], batch, number, head, exists, value_width, X)
    store_norm(norm, highest, total, batch, number, head, exists)


@triton.jit
def backward_queries(
    q, k, v, rel, bias, out, dout, norm, delta, saved, dq, sums, items,
    first_head, cut, own, heads, width, value_width, scale,
    MASKED: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Tiles of queries of some heads, a fixed share by each program: dq, gradients of rel, delta = dy.y.

    sums: float32 [programs, 3, R, W], to which a program adds the gradients of the tables by offset.
    saved: the position terms of these heads' queries, for `backward_keys`.
    """
    tiles = tl.cdiv(volume(cut[3]), Q)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        tile, near_head, block, batch = _item(item, tiles, heads, cut)
        head = first_head + near_head
        number, place, exists = queries_of(block, tile, cut, Q)
        queries = load(q, batch, place, head, exists, width, W)
        gradient = load(dout, batch, number, head, exists, value_width, X)
        output = load(out, batch, number, head, exists, value_width, X)
        inner = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
        store_number(delta, inner, batch, number, head, exists)
        highest, share = load_norm(norm, batch, number, head, exists)
        start = window_start(block, cut)
        inside = _inside(start, cut, own, MASKED)
        terms = position_terms(queries, rel, place, start, cut, width, R, W, P)
        if saved is not None:
            store_terms(saved, terms, rel, batch, number, near_head, exists, cut[6], P)
        by_key = tl.zeros([Q, W], tl.float32)
        first = tl.zeros([Q, P], tl.float32)
        second = tl.zeros([Q, P], tl.float32)
        third = tl.zeros([Q, P], tl.float32)
        for n in tl.range(0, volume(cut[6]), K, disable_licm=True):
            near, key_place, real, seen = _window_tile(n, start, cut, K, MASKED)
            keys = load(k, batch, key_place, head, real, width, W)
            values = load(v, batch, key_place, head, real, value_width, X)
            s = logits(queries, keys, rel, terms, near, scale, P)
            if bias is not None:
                s += bias_of(bias, head, place, start, near, exists, seen, cut)
            s = hide(s, inside & (n + K <= volume(cut[6])), seen, place, key_place, own)
            _, ds = _gradients(s, highest, share, inner, gradient, values)
            ds = ds.to(keys.dtype)
            by_key += dot(ds, keys)
            if rel[0] is not None:
                first += dot(ds, tl.trans(hot(near[0], keys.dtype, P)))
            if rel[1] is not None:
                second += dot(ds, tl.trans(hot(near[1], keys.dtype, P)))
            if rel[2] is not None:
                third += dot(ds, tl.trans(hot(near[2], keys.dtype, P)))
        by_key *= scale
        parts = (first, second, third)
        for axis in tl.static_range(3):
            if rel[axis] is not None:
                row = row_of_first(place, start, cut, axis)
                moved = by_offset(parts[axis], row, cut[6][axis], queries.dtype, R, P)
                by_key += dot(moved, rows_of(rel[axis], offsets(cut, axis), width, R, W))
                _add_to_sums(sums, axis, dot(tl.trans(moved), queries), R, W)
        store(dq, by_key, batch, place, head, exists, width, W)


@triton.jit
def _gradients(s, highest, share, inner, gradient, values):
    """Attention and the gradient of the logits of a tile pair, [queries, keys] each.

    Queries that do not exist were loaded as zeros, so was their dy: they give no gradients.
    """
    a = exp(s - highest[:, None]) * share[:, None]
    return a, a * (dot(gradient, tl.trans(values)) - inner[:, None])


@triton.jit
def _add_to_sums(sums, axis, value, R: tl.constexpr, W: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * 3 + axis) * R + tl.arange(0, R)
    places = sums + row[:, None] * W + tl.arange(0, W)[None, :]
    tl.store(places, tl.load(places) + value)
    tl.debug_barrier()  # another thread of the program may read it next


@triton.jit
def backward_keys(
    q, k, v, rel, bias, dout, norm, delta, saved, dk, dv, parts, box,
    first_head, cut, own, heads, width, value_width, scale,
    MASKED: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Program (batch, box of keys, head of some): dk and dv, from all blocks whose windows reach the box.

    Each axis of a block is cut into `parts` boxes of side `box`; P holds the places of all axes of a box.
    """
    _, blocks, _, queries_per_block, _, _, window, _, _ = cut
    boxes = (blocks[0] * parts[0], blocks[1] * parts[1], blocks[2] * parts[2])
    near_head = tl.program_id(0) % heads
    head = first_head + near_head
    batch = (tl.program_id(0) // heads // volume(boxes)).to(tl.int64)
    at = unravel((tl.program_id(0) // heads) % volume(boxes), boxes)
    start, near, place, real = _box_of_keys(at, parts, box, cut, K)
    full = tl.sum(real.to(tl.int32), 0) == K
    keys = load(k, batch, place, head, real, width, W)
    values = load(v, batch, place, head, real, value_width, X)
    dkeys = tl.zeros([K, W], tl.float32)
    dvalues = tl.zeros([K, X], tl.float32)
    lowest, count = _blocks_that_see(start, box, cut)
    tiles = tl.cdiv(volume(queries_per_block), Q)
    columns = column_of_box(box, rel, P)
    spread = hot_of_box(columns, near, keys.dtype)
    for n in tl.range(0, volume(count) * tiles, disable_licm=True):
        block = add(lowest, unravel(n // tiles, count))
        number, query_place, exists = queries_of(block, n % tiles, cut, Q)
        queries = load(q, batch, query_place, head, exists, width, W)
        gradient = load(dout, batch, number, head, exists, value_width, X)
        highest, share = load_norm(norm, batch, number, head, exists)
        inner = load_number(delta, batch, number, head, exists)
        first = window_start(block, cut)
        shift = (start[0] - first[0], start[1] - first[1], start[2] - first[2])  # box in the window
        seen = real & within(add(near, shift), window)
        whole = full & _holds(first, window, start, box) if own is None else False
        s = logits(queries, keys, (None, None, None), columns, near, scale, P)
        if bias is not None:
            s += bias_of(bias, head, query_place, start, near, exists, seen, cut)
        if saved is not None:
            terms = load_terms(saved, columns, rel, batch, number, near_head, exists, shift, window, P)
            s += dot(terms, spread)
        s = hide(s, whole, seen, query_place, place, own)
        a, ds = _gradients(s, highest, share, inner, gradient, values)
        dvalues += dot(tl.trans(a).to(gradient.dtype), gradient)
        dkeys += dot(tl.trans(ds).to(queries.dtype), queries)
    store(dk, scale * dkeys, batch, place, head, real, width, W)
    store(dv, dvalues, batch, place, head, real, value_width, X)


@triton.jit
def _box_of_keys(at, parts, box, cut, K: tl.constexpr):
    """First voxel of a box, places of its keys in it and in the volume, and which of them exist."""
    size, _, step, _, _, _, _, _, _ = cut
    m = tl.arange(0, K)
    near = unravel(m, box)
    part = (at[0] % parts[0] * box[0], at[1] % parts[1] * box[1], at[2] % parts[2] * box[2])
    start = (
        at[0] // parts[0] * step[0] + part[0],
        at[1] // parts[1] * step[1] + part[1],
        at[2] // parts[2] * step[2] + part[2],
    )
    place = add(near, start)
    real = (m < volume(box)) & within(place, size) & within(add(near, part), step)
    return start, near, place, real


@triton.jit
def _blocks_that_see(start, box, cut):
    """First block and number of blocks, per axis, whose windows reach a box of keys."""
    lowest = (_lowest(start, cut, 0), _lowest(start, cut, 1), _lowest(start, cut, 2))
    end = (_end(start, box, cut, 0), _end(start, box, cut, 1), _end(start, box, cut, 2))
    return lowest, (end[0] - lowest[0], end[1] - lowest[1], end[2] - lowest[2])


@triton.jit
def _lowest(start, cut, axis: tl.constexpr):
    _, _, step, _, _, before, window, _, _ = cut
    beyond = start[axis] + before[axis] - window[axis]  # the last window start that is too early
    return tl.where(beyond < 0, 0, beyond // step[axis] + 1)


@triton.jit
def _end(start, box, cut, axis: tl.constexpr):
    _, blocks, step, _, _, before, _, _, _ = cut
    return tl.minimum(tl.cdiv(start[axis] + box[axis] + before[axis], step[axis]), blocks[axis])


@triton.jit
def backward_bias(
    q, k, v, rel, bias, dout, norm, delta, sums, items, cut, own, heads, width, value_width, scale,
    MASKED: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Program (part, head, tile of queries, tile of keys): gradients of the logits, summed over some blocks.

    sums: float32 [parts, H, queries, keys]; items: blocks of the whole batch, of which a part takes every
    parts-th.
    """
    pairs_of_keys = volume(cut[6])
    pairs_of_queries = volume(cut[3])
    key_tiles = tl.cdiv(pairs_of_keys, K)
    tiles = tl.cdiv(pairs_of_queries, Q)
    n = tl.program_id(1) % key_tiles * K
    tile = tl.program_id(1) // key_tiles % tiles
    head = tl.program_id(1) // key_tiles // tiles
    total = tl.zeros([Q, K], tl.float32)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        _, _, block, batch = _item(item, 1, 1, cut)
        number, place, exists = queries_of(block, tile, cut, Q)
        queries = load(q, batch, place, head, exists, width, W)
        gradient = load(dout, batch, number, head, exists, value_width, X)
        highest, share = load_norm(norm, batch, number, head, exists)
        inner = load_number(delta, batch, number, head, exists)
        start = window_start(block, cut)
        near, key_place, real, seen = _window_tile(n, start, cut, K, MASKED)
        keys = load(k, batch, key_place, head, real, width, W)
        values = load(v, batch, key_place, head, real, value_width, X)
        terms = position_terms(queries, rel, place, start, cut, width, R, W, P)
        s = logits(queries, keys, rel, terms, near, scale, P)
        if bias is not None:
            s += bias_of(bias, head, place, start, near, exists, seen, cut)
        s = hide(s, False, seen, place, key_place, own)
        _, ds = _gradients(s, highest, share, inner, gradient, values)
        total += ds
    i = tile * Q + tl.arange(0, Q)
    j = n + tl.arange(0, K)
    row = (tl.program_id(0).to(tl.int64) * heads + head) * pairs_of_queries + i
    inside = (i < pairs_of_queries)[:, None] & (j < pairs_of_keys)[None, :]
    tl.store(sums + row[:, None] * pairs_of_keys + j[None, :], total, mask=inside)
