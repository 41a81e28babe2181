"""The specification of block attention: one query block after the other, its keys listed one by one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: tuple[int, ...],
    halo: tuple[tuple[int, int], ...],
    rel: tuple[Tensor, ...] | None,
    bias: Tensor | None,
    stride: tuple[int, ...],
    scale: float,
    masked: bool,
    step: tuple[int, ...] | None = None,
) -> Tensor:
    """`medattn_kernels.block_attention` with masked (True) or zero padding; any floating dtype.

    step: between neighbouring queries as offsets count them, the stride if None.
    """
    size = tuple(q.shape[1:-2])
    stretch = torch.tensor([stride, step or stride], device=q.device)
    out = torch.zeros_like(v)
    for start in product(*(range(0, n, b) for n, b in zip(size, block, strict=True))):
        spaces = list(zip(start, block, size, halo, stride, strict=True))
        queries = _grid([range(s, min(s + b, n), step) for s, b, n, _, step in spaces], q.device)
        keys = _grid([range(s - before, s + b + after) for s, b, _, (before, after), _ in spaces], q.device)
        inside = ((keys >= 0) & (keys < torch.tensor(size, device=q.device))).all(-1)
        if masked:
            keys, inside = keys[inside], inside[inside]
        origin = torch.tensor(start, device=q.device)
        counted = origin + (queries - origin) // stretch[0] * stretch[1]
        offset = keys[None] - counted[:, None]  # [n, m, axes]

        q_n = _at(q, queries)  # [B, n, H, D]
        k_m, v_m = (_at(x, keys * inside[:, None]) * inside[:, None, None] for x in (k, v))  # zeros outside
        logits = scale * torch.einsum("bnhd,bmhd->bhnm", q_n, k_m)
        for axis, table in enumerate(rel or ()):
            rows = table.to(q.dtype)[_row(offset[..., axis], table.shape[0])]
            logits = logits + torch.einsum("bnhd,nmd->bhnm", q_n, rows)
        if bias is not None:
            rows = torch.stack(
                [_row(offset[..., a], n) for a, n in enumerate(bias.shape[1:])], -1
            )  # [n, m, axes]
            logits = logits + _at(bias.to(q.dtype), rows)
        y_n = torch.einsum("bhnm,bmhe->bnhe", logits.softmax(-1), v_m)
        batch = torch.arange(len(q), device=q.device)[:, None]
        out = out.index_put((batch, *queries.unbind(-1)), y_n)
    return out[(slice(None), *(slice(None, None, step) for step in stride))]


def _grid(ranges: Sequence[range], device: torch.device) -> Tensor:
    """All index tuples of a box, [count, axes], last axis fastest."""
    return torch.tensor(list(product(*ranges)), device=device)


def _at(x: Tensor, places: Tensor) -> Tensor:
    """[first, *size, *rest] at places [*count, axes] -> [first, *count, *rest]."""
    index: tuple[slice | Tensor, ...] = (slice(None), *places.unbind(-1))
    return x[index]


def _row(offset: Tensor, rows: int) -> Tensor:
    """Table row of an offset; offsets outside the table take its first or last row."""
    return (offset + (rows - 1) // 2).clamp(0, rows - 1)
