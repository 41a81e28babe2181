"""Axial attention as one would write it without this package: all lines as a batch, every map formed.

Legend: n lines, h heads, i and j places of a line, d and e head sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from shapes import Entry
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention


def dense(
    entry: Entry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_q: Tensor | None = None,
    rel_k: Tensor | None = None,
    rel_v: Tensor | None = None,
) -> Tensor:
    """One logits map over all lines, table rows gathered per pair of places."""
    q, k, v = (_lines(x, entry.axis) for x in (q, k, v))
    bias = _bias(q, k, rel_q, rel_k)
    logits = q @ k.mT if bias is None else q @ k.mT + bias
    attention = (q.shape[-1] ** -0.5 * logits).softmax(-1)
    out = attention @ v
    if rel_v is not None:
        out = out + torch.einsum("nhij,ije->nhie", attention, _rows(rel_v, q.shape[-2]))
    return _volume(out, entry)


def sdpa(
    entry: Entry, q: Tensor, k: Tensor, v: Tensor, rel_q: Tensor | None = None, rel_k: Tensor | None = None
) -> Tensor:
    """PyTorch's fused attention with the position logits as its bias; it has no room for rel_v."""
    q, k, v = (_lines(x, entry.axis) for x in (q, k, v))
    bias = _bias(q, k, rel_q, rel_k)
    bias = None if bias is None else q.shape[-1] ** -0.5 * bias
    return _volume(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), entry)


def flex(
    entry: Entry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_q: Tensor | None = None,
    rel_k: Tensor | None = None,
    attend: Callable[..., Tensor] = flex_attention,
) -> Tensor:
    """FlexAttention whose `score_mod` looks the position logits up by offset; it has no room for rel_v."""
    q, k, v = (_lines(x, entry.axis) for x in (q, k, v))
    scale, centre = q.shape[-1] ** -0.5, q.shape[-2] - 1
    by_query = None if rel_q is None else scale * q @ rel_q.mT  # [n, h, i, offset]
    by_key = None if rel_k is None else scale * k @ rel_k.mT  # [n, h, j, offset]

    def position(score: Tensor, n: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if by_query is not None:
            score = score + by_query[n, h, i, j - i + centre]
        if by_key is not None:
            score = score + by_key[n, h, j, j - i + centre]
        return score

    return _volume(attend(q, k, v, score_mod=position), entry)


def _lines(x: Tensor, axis: int) -> Tensor:
    """[B, *size, H, D] -> [n, H, L, D]."""
    return x.movedim(1 + axis, -2).flatten(0, -4)


def _volume(x: Tensor, entry: Entry) -> Tensor:
    """[n, H, L, E] -> [B, *size, H, E]."""
    others = [n for axis, n in enumerate(entry.size) if axis != entry.axis]
    return x.reshape(entry.batch, *others, *x.shape[1:]).movedim(-2, 1 + entry.axis)


def _bias(q: Tensor, k: Tensor, rel_q: Tensor | None, rel_k: Tensor | None) -> Tensor | None:
    """The position terms of the logits, [n, h, i, j]."""
    length, terms = q.shape[-2], []
    if rel_q is not None:
        terms.append(torch.einsum("nhid,ijd->nhij", q, _rows(rel_q, length)))
    if rel_k is not None:
        terms.append(torch.einsum("nhjd,ijd->nhij", k, _rows(rel_k, length)))
    return sum(terms[1:], terms[0]) if terms else None


def _rows(table: Tensor, length: int) -> Tensor:
    """Rows of a table [2 length - 1, D] by offset j - i, [i, j, D]."""
    place = torch.arange(length, device=table.device)
    return table[place[None, :] - place[:, None] + length - 1]
