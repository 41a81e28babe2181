"""Mean and variance of the logit terms of axial attention, in closed form: no map of logits is stored.

With them a batch norm over the logits (Axial-DeepLab) becomes a gain per term and head: its shift is the same
for all keys of a query and cancels in the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medattn_kernels._check import check_axis, check_qkv, check_span, check_table
from medattn_kernels._chunk import chunk_size
from medattn_kernels.axial.eager import offsets


def pairs_seen(length: int, span: int | None) -> int:
    """Pairs of a query and a key that it sees on one line."""
    reach = length - 1 if span is None else min(span // 2, length - 1)
    return length + reach * (2 * length - 1 - reach)


def logit_moments(
    q: Tensor,
    k: Tensor,
    *,
    axis: int,
    rel_q: Tensor | None = None,
    rel_k: Tensor | None = None,
    span: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Moments of the three terms of `axial_attention`'s logits, without scale and gain, per head.

    q, k, axis, rel_q, rel_k, span: as in `axial_attention`. Returns mean and biased variance, [3, H] each,
    over all lines and all pairs seen, for q.k, q.rel_q and k.rel_k; zeros for a table that is not there.
    They are differentiable and have q's dtype, float32 at least. Sums are formed in float64, since a term's
    mean may be many standard deviations.

    The second moments come from Gram matrices: sum_ij (q_i.k_j)^2 = <sum_i q_i q_i', sum_j k_j k_j'> on each
    line, and sum_j (q_i.r_(j-i))^2 = q_i' (sum_j r_(j-i) r_(j-i)') q_i, with a matrix that all lines share.
    The first takes the map of a few lines at a time instead where that is smaller (an axis no longer than D)
    or where a `span` leaves pairs out.

    Raises ValueError or TypeError for arguments that do not fit.
    """
    check_qkv(q, k, k)
    axis = check_axis(axis, q)
    check_span(span)
    for name, table in (("rel_q", rel_q), ("rel_k", rel_k)):
        if table is not None:
            check_table(name, table, q.shape[-1], q)
    if not len(q):
        raise ValueError("moments need at least one entry in the batch, got none")
    if span is not None and span // 2 >= q.shape[1 + axis] - 1:
        span = None  # it leaves no pair out
    offset = offsets(q.shape[1 + axis], q.device)
    seen = torch.ones_like(offset, dtype=torch.bool) if span is None else offset.abs() <= span // 2
    by_query = None if rel_q is None else _rows_met(rel_q, offset, seen)
    by_key = None if rel_k is None else _rows_met(rel_k, offset.mT, seen.mT)

    lines = [x.movedim(1 + axis, -2).flatten(0, -4) for x in (q, k)]  # [lines, H, L, D]
    count, heads, length, width = lines[0].shape
    mapped = span is not None or length <= width
    step = max(1, chunk_size(q) // (heads * length * (length if mapped else width)))

    def sums(q: Tensor, k: Tensor) -> Tensor:
        q, k = q.double(), k.double()
        content = _map_sums(q, k, seen) if mapped else _gram_sums(q, k)
        return torch.stack([content, _table_sums(q, by_query), _table_sums(k, by_key)], 1)

    parts = [
        checkpoint(sums, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(*(torch.split(x, step) for x in lines), strict=True)
    ]
    pairs = count * pairs_seen(length, span)
    mean, square = torch.stack(parts).sum(0) / pairs  # each [3, H]
    variance = (square - mean**2).clamp_min(0)
    dtype = torch.promote_types(q.dtype, torch.float32)
    return mean.to(dtype), variance.to(dtype)


def _map_sums(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Sum and sum of squares of q_i.k_j over the pairs seen, [2, H]."""
    logits = q @ k.mT * seen
    return torch.stack([logits.sum((0, 2, 3)), logits.square().sum((0, 2, 3))])


def _gram_sums(q: Tensor, k: Tensor) -> Tensor:
    """The same over all pairs, from sums over queries and over keys, [2, H]."""
    total = (q.sum(2) * k.sum(2)).sum((0, 2))
    return torch.stack([total, ((q.mT @ q) * (k.mT @ k)).sum((0, 2, 3))])


def _table_sums(x: Tensor, rows: tuple[Tensor, Tensor] | None) -> Tensor:
    """Sum and sum of squares of x_i.r over the rows r that place i meets, [2, H]; zeros without a table."""
    if rows is None:
        return x.new_zeros(2, x.shape[1])
    total, square = rows  # [L, D], [L, D, D]
    places = x.permute(2, 0, 1, 3)  # [L, lines, H, D]
    weighted = torch.unflatten(places.flatten(1, 2) @ square, 1, places.shape[1:3])
    return torch.stack([(x * total).sum((0, 2, 3)), (places * weighted).sum((0, 1, 3))])


def _rows_met(table: Tensor, offset: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Per place, the sum of the table rows that it meets [L, D] and of their outer products [L, D, D].

    offset, seen: [L, L], of each place to all others.
    """
    last = table.shape[0] - 1
    row = (offset + last // 2).clamp(0, last)
    times = table.new_zeros(len(offset), 1 + last, dtype=torch.float64).scatter_add_(1, row, seen.double())
    table = table.double()
    outer = (table[:, :, None] * table[:, None, :]).flatten(1)
    return times @ table, torch.unflatten(times @ outer, 1, (table.shape[1], -1))
