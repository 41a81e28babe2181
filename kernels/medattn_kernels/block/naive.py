"""The specification of block attention: one query block after the other, keys listed one by one."""

from __future__ import annotations

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
) -> Tensor:
    """`medattn_kernels.block_attention` with masked (True) or zero padding; any floating dtype."""
    size = q.shape[1:-2]
    out = v.new_zeros(v.shape)
    for start in product(*(range(0, n, b) for n, b in zip(size, block, strict=True))):
        queries = _grid(
            [range(s, min(s + b, n), t) for s, b, n, t in zip(start, block, size, stride, strict=True)]
        )
        keys = _grid([range(s - h[0], s + b + h[1]) for s, b, h in zip(start, block, halo, strict=True)])
        inside = ((keys >= 0) & (keys < torch.tensor(size))).all(-1)
        if masked:
            keys, inside = keys[inside], inside[inside]
        offset = keys[None] - queries[:, None]  # [n, m, axes]

        q_n = q[:, *queries.unbind(-1)]  # [B, n, H, D]
        safe = keys.where(inside[:, None], 0).unbind(-1)
        k_m, v_m = (x[:, *safe] * inside[:, None, None] for x in (k, v))  # zeros outside the volume
        logits = scale * torch.einsum("bnhd,bmhd->bhnm", q_n, k_m)
        for axis, table in enumerate(rel or ()):
            rows = table.to(q.dtype)[_clip(offset[..., axis], table.shape[0])]
            logits = logits + torch.einsum("bnhd,nmd->bhnm", q_n, rows)
        if bias is not None:
            places = [_clip(offset[..., axis], rows) for axis, rows in enumerate(bias.shape[1:])]
            logits = logits + bias.to(q.dtype)[:, *places]
        y_n = torch.einsum("bhnm,bmhe->bnhe", logits.softmax(-1), v_m)
        out = out.index_put((torch.arange(len(q))[:, None], *queries.unbind(-1)), y_n)
    return out[:, *(slice(None, None, step) for step in stride)]


def _grid(ranges: list[range]) -> Tensor:
    """All index tuples of a box, [count, axes], last axis fastest."""
    return torch.cartesian_prod(*(torch.tensor(r) for r in ranges)).view(-1, len(ranges))


def _clip(offset: Tensor, rows: int) -> Tensor:
    """Row of an offset in a table of `rows` rows."""
    return (offset + (rows - 1) // 2).clamp(0, rows - 1)
