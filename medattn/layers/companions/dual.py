"""Dual attention (DANet: Fu et al., CVPR 2019): of positions and of channels, side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medattn.layers.companions.full import full_attention, single_head
from medattn.layers.companions.rank import convolution
from medattn_kernels._select import without_autocast


class PositionAttention(nn.Module):
    """gamma sum_j softmax_j(q_i.k_j) v_j + x_i; [B, C, *size] in and out (DANet's `PAM_Module`).

    Queries and keys are 1x1 convolutions C -> C/8, values C -> C, all with bias; no scale. gamma starts at 0:
    the module starts as the identity, and in the first step only gamma learns. The bias of the keys has no
    effect on a softmax over keys.

    3D: as for the non-local block, only the convolutions change. Memory: no N x N map.

    Parameters, with m = max(1, C // 8): 2 (C m + m) + C^2 + C + 1.
    """

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        conv, inner = convolution(spatial_dims), max(1, channels // 8)
        self.query_conv = conv(channels, inner, 1)
        self.key_conv = conv(channels, inner, 1)
        self.value_conv = conv(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C, *size]."""
        q, k, v = (single_head(project(x)) for project in (self.query_conv, self.key_conv, self.value_conv))
        out = full_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        return self.gamma.to(x) * out + x


class ChannelAttention(nn.Module):
    """gamma sum_d softmax_d(-x_c.x_d) x_d + x_c over channels; [B, C, *size] (DANet's `CAM_Module`).

    The published max_d(E) - E inside the softmax is -E but for a shift: channels that are alike get the
    *smallest* weights. E = X X^T is a sum over all positions without a scale, so on large volumes the softmax
    is nearly an argmin; E is formed in float32, since in bf16 it would not resolve its own differences.

    Any number of axes alike. Parameters: 1 (gamma, 0 at the start).
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C, *size]."""
        with without_autocast(x):
            rows = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
            out = (-rows @ rows.mT).softmax(-1) @ rows
        return self.gamma.to(x) * out.view(x.shape).to(x) + x


class DualAttention(nn.Module):
    """Both modules on one input, x counted once: gamma_p P(x) + gamma_c Q(x) + x.

    DANet puts 3x3 convolutions around each module and adds the results; in a U-Net the convolutions before
    and after are already there.

    Parameters: those of `PositionAttention`, and 1.
    """

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.position = PositionAttention(channels, spatial_dims)
        self.channel = ChannelAttention()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C, *size]."""
        out: Tensor = self.position(x) + self.channel(x) - x
        return out


def dual_layers(channels: int, spatial_dims: int) -> DualAttention:
    """Dual attention as a U-Net takes it."""
    return DualAttention(channels, spatial_dims)
