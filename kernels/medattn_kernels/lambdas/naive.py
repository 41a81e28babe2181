"""The specification of lambda attention: both lambdas of every position, then the queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lambda_attention(q: Tensor, k: Tensor, v: Tensor, *, table: Tensor | None) -> Tensor:
    """`medattn_kernels.lambda_attention` in any floating dtype; b, n, u, k, v as there, t for offsets."""
    axes = q.ndim - 3
    queries, keys, values = (x.flatten(1, axes) for x in (q, k, v))
    lambdas = torch.einsum("bmuk,bmuv->bkv", keys.softmax(1), values)[:, None]
    if table is not None:
        margins = [(rows - 1) // 2 for rows in table.shape[:axes] for _ in range(2)]
        windows = F.pad(v, (0, 0, 0, 0, *reversed(margins)))  # zeros around the volume
        for axis in range(axes):
            windows = windows.unfold(1 + axis, table.shape[axis], 1)
        windows = windows.flatten(-axes).flatten(1, axes)
        rows = table.to(q.dtype).flatten(0, axes - 1)
        lambdas = lambdas + torch.einsum("bnuvt,tuk->bnkv", windows, rows)
    return (queries @ lambdas).view(*q.shape[:-1], v.shape[-1])
