"""The non-local block (Wang, Girshick, Gupta, He, CVPR 2018), embedded Gaussian form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medattn.layers.companions.full import full_attention, single_head
from medattn.layers.companions.rank import batch_norm, convolution


class NonLocalBlock(nn.Module):
    """z = W(y) + x with y_i = sum_j softmax_j(theta(x_i).phi(x_j)) g(x_j); [B, C, *size] in and out.

    theta, phi and g are 1x1 convolutions C -> C/2 with bias, W one back followed by a batch norm, whose
    weight starts at 0: the block starts as the identity, and in the first step only the batch norm learns.
    Without the norm, W starts at 0. There is no scale. phi's bias shifts all logits of a query alike, so it
    has no effect and its gradient is zero.

    3D: a sum over all positions knows nothing of the axes they came from; only the convolutions change.

    Work: 2 N^2 C/2 multiply-adds. Memory: a few maps of [B, C, N], through a fused attention.

    Parameters, with m = max(1, C // 2): 3 (C m + m) + m C + C, and 2 C with the norm. Names as in
    AlexHex7/Non-local_pytorch.
    """

    def __init__(self, channels: int, spatial_dims: int, *, norm: bool = True) -> None:
        super().__init__()
        conv, inner = convolution(spatial_dims), max(1, channels // 2)
        self.theta = conv(channels, inner, 1)
        self.phi = conv(channels, inner, 1)
        self.g = conv(channels, inner, 1)
        out = conv(inner, channels, 1)
        last = batch_norm(spatial_dims)(channels) if norm else out
        self.W = nn.Sequential(out, last) if norm else out
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C, *size]."""
        q, k, v = (single_head(project(x)) for project in (self.theta, self.phi, self.g))
        y = torch.unflatten(full_attention(q, k, v)[:, 0].mT, 2, x.shape[2:])
        z: Tensor = self.W(y) + x
        return z


def nonlocal_layers(channels: int, spatial_dims: int, *, norm: bool = True) -> NonLocalBlock:
    """A non-local block as a U-Net takes it. norm: batch norm after the last convolution, as published."""
    return NonLocalBlock(channels, spatial_dims, norm=norm)
