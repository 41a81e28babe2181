"""Lambda layers: position-aware linear functions of the whole context, no attention map (Bello 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medattn.layers.attention import OUT_STD, SpatialAttention
from medattn_kernels import lambda_attention

TABLE_STD = 0.02


class LambdaLayer(nn.Module):
    """[B, *size, C] -> [B, *size, C]: H queries of size K per position share keys and values (multi-query).

    heads: H, dividing C. key_size: K. depth: U, the intra-depth over which keys and values are summed. scope:
    odd, positions per axis that the local lambdas see; the content lambda sees everything.
    Queries and values are batch-normalised and nothing is scaled, as in the paper.

    Parameters, with V = C / H: C (H K + U K + U V) + 2 H K + 2 U V + U K scope^spatial_dims.
    """

    def __init__(
        self, channels: int, spatial_dims: int, *, heads: int, key_size: int, depth: int, scope: int
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads, got {channels=} and {heads=}")
        if scope < 1 or scope % 2 == 0:
            raise ValueError(f"scope must be odd and positive, got {scope=}")
        self.heads, self.depth = heads, depth
        self.widths = [heads * key_size, depth * key_size, depth * channels // heads]
        self.qkv = nn.Linear(channels, sum(self.widths), bias=False)
        self.norm_q, self.norm_v = (nn.BatchNorm1d(self.widths[part]) for part in (0, 2))
        self.table = nn.Parameter(torch.randn(*[scope] * spatial_dims, depth, key_size) * TABLE_STD)
        nn.init.trunc_normal_(self.qkv.weight, std=channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, *size, C] -> [B, *size, C]."""
        q, k, v = self.qkv(x).split(self.widths, -1)
        q, v = _per_channel(self.norm_q, q), _per_channel(self.norm_v, v)
        out = lambda_attention(
            torch.unflatten(q, -1, (self.heads, -1)),
            torch.unflatten(k, -1, (self.depth, -1)),
            torch.unflatten(v, -1, (self.depth, -1)),
            table=self.table,
        )
        return out.flatten(-2)


class _Residual(nn.Module):
    """x + project(lambdas(norm(x))) on [B, *size, C]."""

    def __init__(self, channels: int, layer: LambdaLayer) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.layer = layer
        self.out = nn.Linear(channels, channels, bias=False)
        nn.init.trunc_normal_(self.out.weight, std=OUT_STD)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.layer(self.norm(x)))
        return x + out


def lambda_layers(
    channels: int,
    spatial_dims: int,
    *,
    layers: int = 1,
    heads: int = 4,
    key_size: int = 16,
    depth: int = 1,
    scope: int | None = None,
) -> SpatialAttention:
    """Lambda layers with local positions, `layers` times with separate weights; see `LambdaLayer`.

    scope: 9 in 2D (timm's) and 5 in 3D if None; the paper's 23 costs as much as 23^spatial_dims says.

    Parameters per layer: those of `LambdaLayer`, 2 C (norm) and C^2 (output).
    """
    reach = (9 if spatial_dims == 2 else 5) if scope is None else scope
    return SpatialAttention(
        _Residual(
            channels,
            LambdaLayer(channels, spatial_dims, heads=heads, key_size=key_size, depth=depth, scope=reach),
        )
        for _ in range(layers)
    )


def _per_channel(norm: nn.Module, x: Tensor) -> Tensor:
    """A batch norm over all positions of [B, *size, C]."""
    out: Tensor = norm(x.flatten(0, -2)).view_as(x)
    return out
