"""Attention of every position on every position, by PyTorch's fused operator: no N x N map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALIGNMENT = 8  # channels; what the fused CUDA kernels ask of a head


def full_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0) -> Tensor:
    """y_i = sum_j softmax_j(scale q_i.k_j) v_j, for q, k [B, H, N, D] and v [B, H, N, E] -> [B, H, N, E].

    On a CPU the fused operator takes contiguous heads of one width only, and for others falls back to a whole
    map. Channels of zeros bring all three to one width: they add nothing to a product and are cut off again.
    """
    width = -(-max(q.shape[-1], v.shape[-1]) // ALIGNMENT) * ALIGNMENT
    wide_q, wide_k, wide_v = (F.pad(x, (0, width - x.shape[-1])).contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=scale)[..., : v.shape[-1]]


def single_head(x: Tensor) -> Tensor:
    """[B, C, *size] -> [B, 1, N, C]."""
    return x.flatten(2).mT[:, None]


class FullAttention(nn.Module):
    """`full_attention` as an operator of `AttentionLayer`, scaled by D^-1/2; no parameters."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k [B, *size, H, D], v [B, *size, H, E] -> [B, *size, H, E]."""
        heads_first = (torch.movedim(x.flatten(1, -3), -2, 1) for x in (q, k, v))
        out = full_attention(*heads_first, scale=q.shape[-1] ** -0.5)
        return out.movedim(1, -2).reshape(v.shape)
