"""Criss-cross attention (CCNet: Huang et al., ICCV 2019): every position on the lines that cross in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medattn.layers.companions.rank import convolution
from medattn_kernels import axial_attention


def criss_cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One softmax over the union of a position's lines along all axes, the position itself counted once.

    q, k [B, *size, H, D], v [B, *size, H, E] -> [B, *size, H, E]; logits q_i.k_j without a scale.

    Exactly from attention along one axis at a time. With s_ij the logits and L_a(i) the line along axis a,
    the operator gives y_a = sum_(j in L_a) exp(s_ij) v_j / Z_a with Z_a = sum_(j in L_a) exp(s_ij). A table
    of values that is one at offset 0 and zero elsewhere makes it return the weight of the position itself
    too, p_a = exp(s_ii) / Z_a. So Z_a = exp(s_ii) / p_a on every axis, with the same s_ii. The union of d
    lines counts i d times, d - 1 too many:

        y = (sum_a Z_a y_a - (d - 1) exp(s_ii) v_i) / (sum_a Z_a - (d - 1) exp(s_ii))
          = (sum_a y_a / p_a - (d - 1) v_i)         / (sum_a 1 / p_a - (d - 1))

    computed with all terms divided by the largest 1/p_a, which leaves the divisor at 1 or more. Where s_ii is
    more than 87 below the largest logit of two lines (in float16, 16), p_a is smaller than the dtype holds,
    and these lines get equal shares.
    """
    extra = q.ndim - 4  # times too often that the union counts the position itself
    own = v.new_zeros(3, v.shape[-1])
    own[1] = 1
    parts = [
        axial_attention(q, k, v, axis=axis, rel_v=own, scale=1.0, separate=True) for axis in range(extra + 1)
    ]
    precise = torch.promote_types(v.dtype, torch.float32)
    lines = torch.stack([part[0] for part in parts])
    shares = torch.stack([part[1][..., :1] for part in parts]).to(precise)
    log_sums = -shares.clamp_min(torch.finfo(precise).tiny).log()  # of exp(s_ij - s_ii), per axis
    top = log_sums.detach().amax(0)
    weights, itself = (log_sums - top).exp(), extra * (-top).exp()
    return (((weights * lines).sum(0) - itself * v) / (weights.sum(0) - itself)).to(v.dtype)


class CrissCrossAttention(nn.Module):
    """x <- gamma criss_cross(q, k, v) + x, `recurrence` times with shared weights; [B, C, *size] to the same.

    Queries and keys are 1x1 convolutions C -> C/8, values C -> C, all with bias (names as in
    speedinghzl/CCNet). gamma starts at 0: the module starts as the identity, and in the first step only gamma
    learns. The bias of the keys has no effect on a softmax over keys.

    3D: the lines along all three axes, H + W + D - 2 positions. One pass changes one coordinate, so R passes
    reach the positions that differ in at most R of them: everything needs two passes in 2D, as published, and
    three in 3D, the default. CCNet's own 3D sketch leaves the position itself out on one axis only and so
    counts it twice; here it counts once, as in 2D.

    Work per pass: N (sum of sides) (C/8 + C) multiply-adds. Memory: d maps of [B, C, N] and what
    `axial_attention` holds, a few lines' logits.

    Parameters, with m = max(1, C // 8): 2 (C m + m) + C^2 + C + 1, for any recurrence.
    """

    def __init__(self, channels: int, spatial_dims: int, *, recurrence: int | None = None) -> None:
        super().__init__()
        conv, inner = convolution(spatial_dims), max(1, channels // 8)
        self.recurrence = spatial_dims if recurrence is None else recurrence
        if self.recurrence < 1:
            raise ValueError(f"recurrence must be at least 1, got {recurrence=}")
        self.query_conv = conv(channels, inner, 1)
        self.key_conv = conv(channels, inner, 1)
        self.value_conv = conv(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C, *size]."""
        for _ in range(self.recurrence):
            q, k, v = (
                project(x).movedim(1, -1).unsqueeze(-2)
                for project in (self.query_conv, self.key_conv, self.value_conv)
            )
            x = self.gamma.to(x) * criss_cross(q, k, v).squeeze(-2).movedim(-1, 1) + x
        return x

    def extra_repr(self) -> str:
        """The number that the submodules do not tell."""
        return f"recurrence={self.recurrence}"


def crisscross_layers(
    channels: int, spatial_dims: int, *, recurrence: int | None = None
) -> CrissCrossAttention:
    """Criss-cross attention as a U-Net takes it. recurrence: passes; as many as axes if None."""
    return CrissCrossAttention(channels, spatial_dims, recurrence=recurrence)
