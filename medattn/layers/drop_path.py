"""Stochastic depth (Huang et al. 2016): residual branches that are left out at random in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Zero the branch of a sample with probability `rate` in training and scale the others by 1 / (1 - rate).

    [B, ...] -> [B, ...], no parameters. Raises ValueError unless 0 <= rate < 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate must be at least 0 and below 1, got {rate=}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> [B, ...]."""
        if not self.training or self.rate == 0:
            return x
        kept = torch.full((x.shape[0],) + (1,) * (x.ndim - 1), 1 - self.rate, dtype=x.dtype, device=x.device)
        return x * kept.bernoulli() / (1 - self.rate)

    def extra_repr(self) -> str:
        """The rate."""
        return f"rate={self.rate}"
