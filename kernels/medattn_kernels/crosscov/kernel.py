"""Cross-covariance attention in Triton: two passes over the positions in each direction.

How tensors and matrices are passed is told in `tiles`. T is the number of positions in a tile, W the padded
number of columns, G the heads among them, D the channels of a head. A program that walks over positions takes
every parts-th tile, so that neighbours read neighbouring memory; its sums are its own, and the kernels with a
program per row add them up in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medattn_kernels._device import dot
from medattn_kernels.crosscov.tiles import (
    add_parts,
    attention_of,
    columns_of,
    exp,
    item,
    load,
    load_gain,
    load_norm,
    load_pairs,
    store,
    store_squares,
    store_sums,
)


@triton.jit
def forward_products(
    q, k, sums, count, inner, heads, parts,
    D: tl.constexpr, G: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (batch, part, heads): sums of q_c k_d, q_c^2 and k_d^2 over a part; [B, H, parts, D + 2, D]."""
    part, group, batch = item(heads, parts, G)
    columns = columns_of(group, heads, D, G, W)
    products = tl.zeros([W, W], tl.float32)
    of_queries = tl.zeros([T, W], tl.float32)
    of_keys = tl.zeros([T, W], tl.float32)
    for start in tl.range(part * T, count, parts * T):
        n = start + tl.arange(0, T)
        queries = load(q, batch, n, count, inner, columns)
        keys = load(k, batch, n, count, inner, columns)
        products += dot(tl.trans(queries), keys)
        of_queries += queries.to(tl.float32) * queries.to(tl.float32)
        of_keys += keys.to(tl.float32) * keys.to(tl.float32)
    rows = D + 2
    store_sums(sums, products, 0, batch, heads, part, parts, rows, columns, D)
    store_squares(sums, tl.sum(of_queries, 0), D, batch, heads, part, parts, rows, columns, D)
    store_squares(sums, tl.sum(of_keys, 0), D + 1, batch, heads, part, parts, rows, columns, D)


@triton.jit
def forward_cosines(sums, cosine, norm, eps, heads, parts, D: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Program (batch, head, row): the row's cosines and norms from the sums of `forward_products`."""
    row = tl.program_id(0) % D
    head = (tl.program_id(0) // D).to(tl.int64)
    d = tl.arange(0, W)
    products = add_parts(sums, head, row, 0, D, parts, D + 2, D, W, P).to(tl.float32)
    of_keys = tl.sqrt(add_parts(sums, head, D + 1, 0, D, parts, D + 2, D, W, P).to(tl.float32))
    of_query = tl.sqrt(tl.sum(add_parts(sums, head, D, row, 1, parts, D + 2, D, 1, P), 0).to(tl.float32))
    size = tl.maximum(of_query, eps) * tl.maximum(of_keys, eps)
    tl.store(cosine + (head * D + row) * D + d, products / size, mask=d < D)
    tl.store(norm + head * 2 * D + row, of_query)
    tl.store(norm + (head * 2 + 1) * D + d, of_keys, mask=d == row)


@triton.jit
def forward_values(
    v, out, temperature, cosine, count, inner, heads, parts,
    D: tl.constexpr, G: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (batch, part, heads): y = v A' at a part of the positions."""
    part, group, batch = item(heads, parts, G)
    columns = columns_of(group, heads, D, G, W)
    attention = attention_of(cosine, temperature, batch, heads, columns, D).to(v[0].dtype.element_ty)
    weights = tl.trans(attention)
    for start in tl.range(part * T, count, parts * T):
        n = start + tl.arange(0, T)
        values = load(v, batch, n, count, inner, columns)
        store(out, dot(values, weights), batch, n, count, inner, columns)


@triton.jit
def backward_values(
    dout, v, dv, temperature, cosine, sums, count, inner, heads, parts,
    D: tl.constexpr, G: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (batch, part, heads): dv = dy A and the sums of dy_c v_d over a part; [B, H, parts, D, D]."""
    part, group, batch = item(heads, parts, G)
    columns = columns_of(group, heads, D, G, W)
    attention = attention_of(cosine, temperature, batch, heads, columns, D).to(v[0].dtype.element_ty)
    products = tl.zeros([W, W], tl.float32)
    for start in tl.range(part * T, count, parts * T):
        n = start + tl.arange(0, T)
        gradient = load(dout, batch, n, count, inner, columns)
        values = load(v, batch, n, count, inner, columns)
        products += dot(tl.trans(gradient), values)
        store(dv, dot(gradient, attention), batch, n, count, inner, columns)
    store_sums(sums, products, 0, batch, heads, part, parts, D, columns, D)


@triton.jit
def backward_logits(
    sums, cosine, temperature, dlogits, by_row, heads, parts,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Program (batch, head, row): the gradient of the row's logits, and its part of the temperature's."""
    row = tl.program_id(0) % D
    head = (tl.program_id(0) // D).to(tl.int64)
    d = tl.arange(0, W)
    place = (head * D + row) * D + d
    dattention = add_parts(sums, head, row, 0, D, parts, D, D, W, P).to(tl.float32)
    cosines = tl.load(cosine + place, mask=d < D, other=0.0)
    logits = tl.load(temperature + head % heads).to(tl.float32) * cosines
    logits = tl.where(d < D, logits, float("-inf"))
    a = exp(logits - tl.max(logits, 0))
    a /= tl.sum(a, 0)
    ds = a * (dattention - tl.sum(a * dattention, 0))
    tl.store(dlogits + place, ds, mask=d < D)
    tl.store(by_row + head * D + row, tl.sum(ds * cosines, 0))


@triton.jit
def backward_products(
    q, k, dq, dk, temperature, cosine, norm, dlogits, eps, count, inner, heads, parts,
    D: tl.constexpr, G: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (batch, part, heads): dq and dk at a part of the positions."""
    part, group, batch = item(heads, parts, G)
    columns = columns_of(group, heads, D, G, W)
    of_queries = load_norm(norm, 0, batch, heads, columns, D)
    of_keys = load_norm(norm, 1, batch, heads, columns, D)
    dcosine = load_gain(temperature, columns)[:, None] * load_pairs(dlogits, batch, heads, columns, D)
    along = dcosine * load_pairs(cosine, batch, heads, columns, D)
    own_query = _own_share(tl.sum(along, 1), of_queries, eps)
    own_key = _own_share(tl.sum(along, 0), of_keys, eps)
    size = tl.maximum(of_queries, eps)[:, None] * tl.maximum(of_keys, eps)[None, :]
    by_key, key_unit = _scaled(dcosine / size, of_keys[None, :], 1, q[0].dtype.element_ty)
    by_query, query_unit = _scaled(dcosine / size, of_queries[:, None], 0, q[0].dtype.element_ty)
    by_key = tl.trans(by_key)
    for start in tl.range(part * T, count, parts * T):
        n = start + tl.arange(0, T)
        queries = load(q, batch, n, count, inner, columns)
        keys = load(k, batch, n, count, inner, columns)
        gradient = dot(keys, by_key) * key_unit[None, :] - queries.to(tl.float32) * own_query[None, :]
        store(dq, gradient, batch, n, count, inner, columns)
        gradient = dot(queries, by_query) * query_unit[None, :] - keys.to(tl.float32) * own_key[None, :]
        store(dk, gradient, batch, n, count, inner, columns)


@triton.jit
def _own_share(along, norm, eps):
    """How much of itself a channel's gradient loses to its norm; none if it was divided by eps."""
    return tl.where(norm < eps, 0.0, along / tl.maximum(norm, eps) / tl.maximum(norm, eps))


@triton.jit
def _scaled(matrix, norm, axis: tl.constexpr, dtype: tl.constexpr):
    """A matrix for products with channels of these norms, in a dtype of little range, and its unit.

    The largest entry along the axis that is summed over becomes one. Entries that meet a channel of zeros are
    left out: they may be as large as 1 / eps and would drown the others.
    """
    matrix = tl.where(norm > 0.0, matrix, 0.0)
    unit = tl.max(tl.abs(matrix), axis)
    unit = tl.where(unit > 0.0, unit, 1.0)
    return (matrix / (unit[:, None] if axis == 1 else unit[None, :])).to(dtype), unit
