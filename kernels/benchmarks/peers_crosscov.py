"""Cross-covariance attention as its authors wrote it: normalised copies of q and k, a matrix per head."""

from __future__ import annotations

import torch.nn.functional as F
from shapes import Entry
from torch import Tensor


def dense(entry: Entry, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """The lines of `XCA.forward` in XCiT's code between its projections, on channels [B, H, D, N]."""
    q, k, v = (x.flatten(1, -3).permute(0, 2, 3, 1) for x in (q, k, v))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    attention = ((q @ k.mT) * temperature[:, None, None]).softmax(-1)
    out = (attention.to(v.dtype) @ v).permute(0, 3, 1, 2)
    return out.reshape(entry.batch, *entry.size, entry.heads, entry.width)
