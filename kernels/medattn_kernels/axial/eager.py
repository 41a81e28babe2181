"""Axial attention in plain torch: PyTorch's fused attention without tables, with them line by line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medattn_kernels._chunk import chunk_size


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
    """`medattn_kernels.axial_attention` on any device, differentiable by autograd.

    With tables, the logits of as many lines as a cache holds are formed at a time, and once more in the
    backward pass. A table term is a product batched over the place in the line: nothing of size L x L x D
    exists per line.
    """
    factors = (
        [scale] * 3 if gain is None else (scale * gain.to(q.dtype))[..., None, None].unbind()
    )  # each [H, 1, 1]
    offset = offsets(q.shape[1 + axis], q.device)
    seen = None if span is None else offset.abs() <= span // 2
    by_query, by_key, by_value = (_rows(table, offset, q) for table in (rel_q, rel_k, rel_v))

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q * factors[0]) @ k.mT  # [lines, H, i, j]
        if by_query is not None:
            logits = logits + _by_place(q * factors[1], by_query.mT)
        if by_key is not None:
            logits = logits + _by_place(k * factors[2], by_key.transpose(0, 1).mT).mT
        if seen is not None:
            logits = logits.masked_fill(~seen, float("-inf"))
        attention = logits.softmax(-1)
        content = attention @ v
        if by_value is None:
            return content
        position = _by_place(attention, by_value)
        return torch.cat([content, position], -1) if separate else content + position

    lines = [x.movedim(1 + axis, -2).flatten(0, -4) for x in (q, k, v)]  # [lines, H, L, D]
    if rel_q is None and rel_k is None and rel_v is None:
        out = _fused(lines[0] * factors[0], lines[1], lines[2], seen)
    else:
        out = _some_lines_at_a_time(dense, lines)
    out = torch.unflatten(out, 0, q.movedim(1 + axis, -2).shape[:-3]).movedim(-2, 1 + axis)
    if not separate:
        return out
    content, position = out.chunk(2, -1)
    return content, position


def _fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """PyTorch's fused attention. Its kernels want one head size; zeros at a head's end change nothing."""
    width = max(q.shape[-1], v.shape[-1])
    q, k, padded = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, padded, attn_mask=seen, scale=1.0)[..., : v.shape[-1]]


def _some_lines_at_a_time(dense: Callable[..., Tensor], lines: Sequence[Tensor]) -> Tensor:
    """dense(*lines) in pieces of bounded logits, each formed once more when its gradient is."""
    count, heads, length = lines[0].shape[:3]
    step = max(1, chunk_size(lines[0]) // (heads * length**2))
    if count <= step:
        return dense(*lines)
    sizes = [step] * (count // step) + [count % step] * (count % step > 0)
    parts = zip(*(torch.split_with_sizes(x, sizes) for x in lines), strict=True)
    return torch.cat([checkpoint(dense, *x, use_reentrant=False, preserve_rng_state=False) for x in parts])


def _by_place(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply row i of every line by its own matrix: [lines, H, i, a] with [i, a, b] -> [lines, H, i, b]."""
    product = x.flatten(0, 1).transpose(0, 1) @ matrices  # [i, lines * H, b]
    return torch.unflatten(product.transpose(0, 1), 0, x.shape[:2])


def offsets(length: int, device: torch.device) -> Tensor:
    """Key place minus query place, [i, j]."""
    place = torch.arange(length, device=device)
    return place[None, :] - place[:, None]


def _rows(table: Tensor | None, offset: Tensor, like: Tensor) -> Tensor | None:
    """Table rows by offset, [i, j, width]; offsets outside the table take its first or last row."""
    if table is None:
        return None
    last = table.shape[0] - 1
    return table.to(like.dtype)[(offset + last // 2).clamp(0, last)]
