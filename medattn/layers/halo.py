"""Blocked local attention in the place of a 3x3 convolution (HaloNet, Vaswani et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn_kernels import block_attention


class HaloAttention(nn.Module):
    """[B, C, h, w] -> [B, values, h / stride, w / stride], rounded up; any size, last blocks may be ragged.

    heads: H, dividing C and `values`. head_size: D of queries and keys, C / H if None. values: channels out,
    C if None. stride: keeps every stride-th query of a block; where it does not divide the block, all queries
    are kept and their outputs averaged, as timm does. padding, offsets: as in `block_attention`; weights of
    timm need "zero" and "queries".

    The two tables of positions have the published 2 n - 1 rows for a window of n = block + 2 halo, of which
    the first and the last `halo` are beyond every offset. No projection follows, and no norm.

    Parameters: C (2 H D + values) + 2 D (2 n - 1).
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        block: int,
        halo: int,
        stride: int = 1,
        values: int | None = None,
        head_size: int | None = None,
        padding: str = "masked",
        offsets: str = "voxels",
    ) -> None:
        super().__init__()
        values = channels if values is None else values
        if values % heads or (head_size is None and channels % heads):
            raise ValueError(f"heads must divide the channels, got {heads=}, {channels=} and {values=}")
        size = channels // heads if head_size is None else head_size
        self.heads, self.widths = heads, [size, values // heads]
        self.block, self.halo, self.padding, self.offsets = block, halo, padding, offsets
        self.stride = stride if block % stride == 0 else 1
        self.q = nn.Conv2d(channels, heads * size, 1, self.stride, bias=False)
        self.kv = nn.Conv2d(channels, heads * size + values, 1, bias=False)
        rows = 2 * (block + 2 * halo) - 1
        self.rel = nn.ParameterList(nn.Parameter(torch.empty(rows, size)) for _ in range(2))
        self.pool: nn.Module = nn.Identity()
        if stride != self.stride:
            self.pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        for weight, fan_in in (
            (self.q.weight, channels),
            (self.kv.weight, channels),
            *((t, size) for t in self.rel),
        ):
            nn.init.trunc_normal_(weight, std=fan_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, values, h / stride, w / stride]."""
        q = self._spread(self._by_head(self.q(x)), x.shape[2:])
        k, v = torch.split(self._by_head(self.kv(x)), self.widths, -1)
        out = block_attention(
            q,
            k,
            v,
            block=self.block,
            halo=self.halo,
            rel=list(self.rel),
            stride=self.stride,
            padding=self.padding,
            offsets=self.offsets,
        )
        pooled: Tensor = self.pool(out.flatten(-2).movedim(-1, 1))
        return pooled

    def extra_repr(self) -> str:
        """The numbers that the modules inside do not tell."""
        return (
            f"heads={self.heads}, block={self.block}, halo={self.halo}, stride={self.stride}, "
            f"padding={self.padding!r}, offsets={self.offsets!r}"
        )

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, H D, h, w] -> [B, h, w, H, D], a view."""
        return torch.unflatten(x, 1, (self.heads, -1)).permute(0, 3, 4, 1, 2)

    def _spread(self, q: Tensor, size: torch.Size) -> Tensor:
        """Strided queries [B, h, w, H, D] at their places in the map, zeros between them."""
        # projected only where they are is a fourth of the work; the operator takes them on the map's grid
        gap = self.stride - 1
        if gap:
            q = F.pad(q[:, :, None, :, None], (0, 0, 0, 0, 0, gap, 0, 0, 0, gap)).flatten(3, 4).flatten(1, 2)
        return q[:, : size[0], : size[1]]
