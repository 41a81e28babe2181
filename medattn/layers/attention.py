"""The seam between operators and networks: features [B, C, *size] in and out, in two or three dimensions.

A network calls one of the factories (`block_layers`, `axial_layers`) with the channels of the place where
attention goes and the number of spatial axes; what comes back is a module that keeps the shape. Legend:
C channels, H heads, D query and key size of a head, E value size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from medattn.layers.position import AxialAttention, BlockAttention
from medattn_kernels import block_attention

MakeAttention = Callable[[int, int], nn.Module]  # from channels and the number of spatial axes

AT_LEAST_ONE = "layers must be at least 1; a network without attention is the plain one"
OUT_STD = 0.02  # of the last projection's weights: a layer starts near the identity, yet all of it trains


class AttentionLayer(nn.Module):
    """x + project(operator(q, k, v)), q, k and v from the normalised x; any operator of the common layout.

    operator: maps q, k [B, *size, H, D] and v [B, *size, H, E] to [B, *size, H, E].

    Parameters, the operator's aside: 2 C (norm) + C H (2 D + E) (queries, keys, values) + H E C (output).
    """

    def __init__(
        self, channels: int, operator: nn.Module, *, heads: int, head_size: int, value_size: int
    ) -> None:
        super().__init__()
        self.heads = heads
        self.widths = [heads * head_size, heads * head_size, heads * value_size]
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, sum(self.widths), bias=False)
        self.operator = operator
        self.out = nn.Linear(heads * value_size, channels, bias=False)
        nn.init.trunc_normal_(self.qkv.weight, std=channels**-0.5)
        nn.init.trunc_normal_(self.out.weight, std=OUT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, *size, C] -> [B, *size, C]."""
        parts = self.qkv(self.norm(x)).split(self.widths, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        attended: Tensor = self.out(self.operator(q, k, v).flatten(-2))
        return x + attended


class SpatialAttention(nn.Module):
    """Layers on [B, *size, C] in sequence, for features [B, C, *size]: channels go last once, around all.

    Raises ValueError if there are none.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        if not len(self.layers):
            raise ValueError(AT_LEAST_ONE)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C, *size]."""
        out: Tensor = self.layers(x.movedim(1, -1).contiguous())
        return out.movedim(-1, 1)


def repeated(make: MakeAttention, layers: int) -> MakeAttention:
    """What builds a module for features [B, C, *size], `layers` times in sequence with separate weights.

    A single one keeps its own parameter names. Raises ValueError, when it builds, for fewer than one.
    """

    def build(channels: int, spatial_dims: int) -> nn.Module:
        parts = [make(channels, spatial_dims) for _ in range(layers)]
        if not parts:
            raise ValueError(AT_LEAST_ONE)
        return parts[0] if layers == 1 else nn.Sequential(*parts)

    return build


class RasterBlockAttention(nn.Module):
    """x + attention of the published head-and-neck U-Net (Jiang et al. 2019) on [B, C, h, w].

    Its scan of overlapping windows in raster order, later ones over earlier ones, equals query blocks with a
    halo after them only. One head, no scale, no positions, projections with bias and as wide as x.
    Parameters as published, 3 (C^2 + C) + 1: gamma is there and has no effect.
    """

    def __init__(self, channels: int, *, block: int = 24, halo: int = 12) -> None:
        super().__init__()
        self.block, self.halo = block, (0, halo)
        self.query, self.key, self.value = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, h, w]."""
        # used this way, gamma's gradient is zero instead of missing
        q, k, v = (part(x).movedim(1, -1)[..., None, :] for part in (self.query, self.key, self.value))
        out = block_attention(q, k, v, block=self.block, halo=[self.halo] * 2, scale=1.0)
        return x + out[..., 0, :].movedim(-1, 1) + 0 * self.gamma


def block_layers(
    channels: int,
    spatial_dims: int,
    *,
    layers: int = 1,
    heads: int = 2,
    head_size: int | None = None,
    block: int | None = None,
    halo: int | None = None,
    relative: bool = True,
) -> SpatialAttention:
    """Block attention with a halo, `layers` times with separate weights.

    head_size: of queries, keys and values; channels / (4 heads), at least 4, if None. block: voxels along an
    axis; 8 in 2D and 4 in 3D if None. halo: voxels; block / 2 if None. relative: with tables of positions.

    One layer sees the halo on every side of its block. Of several layers the first sees the halo after its
    block only, the second the halo before it only, and so on in turn. The published head-and-neck network
    (Jiang et al. 2019) stacks two layers with the halo after the block, which passes context one way; turned
    around in every second layer it passes both ways, and in 3D the two windows of (3b/2)^3 keys are together
    smaller than one of (2b)^3.

    Parameters per layer, with W = H D: 2 C + 4 C W, and if `relative` spatial_dims D (2 (block + halo) - 1).
    """
    size = max(4, channels // (4 * heads)) if head_size is None else head_size
    side = (8 if spatial_dims == 2 else 4) if block is None else block
    reach = side // 2 if halo is None else halo
    halos = [(reach, reach)] if layers == 1 else [((0, reach), (reach, 0))[i % 2] for i in range(layers)]
    return SpatialAttention(
        AttentionLayer(
            channels,
            BlockAttention(size, spatial_dims, block=side, halo=before_and_after, relative=relative),
            heads=heads,
            head_size=size,
            value_size=size,
        )
        for before_and_after in halos
    )


def axial_layers(
    channels: int,
    spatial_dims: int,
    *,
    layers: int = 1,
    heads: int = 2,
    head_size: int | None = None,
    span: int | None = None,
    rows: int = 63,
    relative: bool = True,
) -> SpatialAttention:
    """Position-sensitive axial attention along every axis in turn, `layers` times with separate weights.

    head_size: of queries and keys; channels / (8 heads), at least 4, if None. Values are twice as wide, as in
    Axial-DeepLab. span: keys per query along the axis (odd); all if None. rows: of each table of positions
    (odd). relative: with these tables.

    There is no batch norm over the logits as in the published layer; the scale D^-1/2 stands in for it.

    Parameters per axis and layer, with W = H D: 2 C + 6 C W, and if `relative` 4 D rows.
    """
    size = max(4, channels // (8 * heads)) if head_size is None else head_size
    return SpatialAttention(
        AttentionLayer(
            channels,
            AxialAttention(size, 2 * size, axis, rows=rows, span=span, relative=relative),
            heads=heads,
            head_size=size,
            value_size=2 * size,
        )
        for _ in range(layers)
        for axis in range(spatial_dims)
    )
