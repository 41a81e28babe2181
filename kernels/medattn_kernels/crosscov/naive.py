"""The specification of cross-covariance attention, with normalised copies of q and k."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_covariance_attention(q: Tensor, k: Tensor, v: Tensor, *, temperature: Tensor) -> Tensor:
    """`medattn_kernels.cross_covariance_attention` in any floating dtype."""
    queries, keys, values = (x.flatten(1, -3) for x in (q, k, v))  # [B, N, H, D]
    cosine = torch.einsum("bnhc,bnhd->bhcd", _normalised(queries), _normalised(keys))
    attention = (temperature[:, None, None] * cosine).softmax(-1)
    return torch.einsum("bhcd,bnhd->bnhc", attention.to(v.dtype), values).reshape(v.shape)


def _normalised(x: Tensor) -> Tensor:
    """Channels [B, N, H, D] divided by their norm over N, found in float32 at least: float16 has no eps."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1, eps=1e-12).to(x.dtype)
