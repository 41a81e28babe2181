"""Cross-covariance attention: channels attend to channels, at a cost linear in the positions (XCiT, 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.layers.attention import OUT_STD, AttentionLayer, SpatialAttention
from medattn_kernels import cross_covariance_attention


class CrossCovariance(nn.Module):
    """`cross_covariance_attention` with its learned temperature, one number per head, 1 at the start."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, *size, H, D] -> [B, *size, H, D]."""
        return cross_covariance_attention(q, k, v, temperature=self.temperature)


class LocalPatchInteraction(nn.Module):
    """x + depthwise convolution, GELU, batch norm, depthwise convolution, of the normalised x [B, *size, C].

    Channels that attend to channels do not see where they are; in XCiT these convolutions mix neighbours.
    Parameters: 2 C (norm) + 2 (3^n + 1) C + 2 C (batch norm), n spatial axes.
    """

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        batch_norm = nn.BatchNorm3d if spatial_dims == 3 else nn.BatchNorm2d
        self.norm = nn.LayerNorm(channels)
        self.first = conv(channels, channels, 3, padding=1, groups=channels)
        self.batch_norm = batch_norm(channels)
        self.second = conv(channels, channels, 3, padding=1, groups=channels)
        nn.init.trunc_normal_(self.second.weight, std=OUT_STD)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, *size, C] -> [B, *size, C]."""
        near = self.norm(x).movedim(-1, 1)
        near = self.second(self.batch_norm(F.gelu(self.first(near))))
        out: Tensor = x + near.movedim(1, -1)
        return out


def crosscov_layers(
    channels: int,
    spatial_dims: int,
    *,
    layers: int = 1,
    heads: int = 2,
    local: bool = True,
) -> SpatialAttention:
    """Cross-covariance attention and local patch interaction in turn, `layers` times with separate weights.

    heads: dividing C, each of C / heads channels. local: with the patch interaction. XCiT's third part, a
    perceptron per position, is left to the network's convolutions.

    Parameters per layer: 2 C + 4 C^2 + heads, and if `local` those of `LocalPatchInteraction`.
    """
    if channels % heads:
        raise ValueError(f"channels must be a multiple of heads, got {channels=} and {heads=}")
    size = channels // heads
    parts: list[nn.Module] = []
    for _ in range(layers):
        operator = CrossCovariance(heads)
        parts.append(AttentionLayer(channels, operator, heads=heads, head_size=size, value_size=size))
        if local:
            parts.append(LocalPatchInteraction(channels, spatial_dims))
    return SpatialAttention(parts)
