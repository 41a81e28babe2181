"""The specification of axial attention: dense logits, one einsum per term."""

from __future__ import annotations

import torch
from torch import Tensor


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axis: int,
    rel_q: Tensor | None,
    rel_k: Tensor | None,
    rel_v: Tensor | None,
    gain: Tensor | None,
    span: int | None,
    scale: float,
    separate: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`medattn_kernels.axial_attention` with every L x L map formed; any floating dtype."""
    q, k, v = (x.movedim(1 + axis, -3) for x in (q, k, v))  # [B, *lines, L, H, D]
    place = torch.arange(q.shape[-3], device=q.device)
    offset = place[None, :] - place[:, None]  # [i, j] = j - i
    weight = q.new_ones(3, q.shape[-2]) if gain is None else gain.to(q.dtype)

    logits = torch.einsum("h,...ihd,...jhd->...hij", weight[0], q, k)
    if rel_q is not None:
        logits = logits + torch.einsum("h,...ihd,ijd->...hij", weight[1], q, _rows(rel_q, offset, q))
    if rel_k is not None:
        logits = logits + torch.einsum("h,...jhd,ijd->...hij", weight[2], k, _rows(rel_k, offset, q))
    if span is not None:
        logits = logits.masked_fill(offset.abs() > span // 2, float("-inf"))
    attention = (scale * logits).softmax(-1)

    content = torch.einsum("...hij,...jhe->...ihe", attention, v).movedim(-3, 1 + axis)
    if rel_v is None:
        return content
    position = torch.einsum("...hij,ije->...ihe", attention, _rows(rel_v, offset, q)).movedim(-3, 1 + axis)
    return (content, position) if separate else content + position


def _rows(table: Tensor, offset: Tensor, like: Tensor) -> Tensor:
    """Table rows by offset, [*offset.shape, width]; offsets outside the table take its ends."""
    last = table.shape[0] - 1
    return table.to(like.dtype)[(offset + last // 2).clamp(0, last)]
