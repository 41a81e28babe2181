"""Lambda layers in the place of a 3x3 convolution (LambdaNetworks, Bello 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medattn_kernels import lambda_attention


class LambdaConvolution(nn.Module):
    """[B, C, h, w] -> [B, C, h, w], or what `pool` makes of it.

    heads: H, dividing C. key_size: K. depth: U, the intra-depth. rows: odd, positions per axis that the local
    lambdas see; 2 side - 1 is the global form for maps up to that side. bias: a number per key channel, added
    to all values of the position lambda: the bias that public code gives to the convolution that computes it
    (the paper has none). Queries and values are batch-normalised; nothing is scaled, no projection follows.

    Parameters, with V = C / H: C (H K + U K + U V) + 2 H K + 2 U V + U K rows^2, and K if `bias`.
    """

    def __init__(
        self,
        channels: int,
        *,
        rows: int,
        heads: int = 4,
        key_size: int = 16,
        depth: int = 1,
        bias: bool = True,
        pool: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads must divide the channels, got {heads=} and {channels=}")
        if rows < 1 or rows % 2 == 0:
            raise ValueError(f"rows must be odd and positive, got {rows=}")
        self.heads, self.depth = heads, depth
        self.widths = [heads * key_size, depth * key_size, depth * channels // heads]
        self.qkv = nn.Conv2d(channels, sum(self.widths), 1, bias=False)
        self.norm_q, self.norm_v = nn.BatchNorm2d(self.widths[0]), nn.BatchNorm2d(self.widths[2])
        self.table = nn.Parameter(torch.empty(rows, rows, depth, key_size))
        self.bias = nn.Parameter(torch.zeros(key_size)) if bias else None
        self.pool = nn.Identity() if pool is None else pool
        nn.init.trunc_normal_(self.qkv.weight, std=channels**-0.5)
        nn.init.trunc_normal_(self.table, std=key_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, h, w], pooled."""
        q, k, v = self.qkv(x).split(self.widths, 1)
        q = _by_head(self.norm_q(q), self.heads)
        k, v = _by_head(k, self.depth), _by_head(self.norm_v(v), self.depth)
        out = lambda_attention(q, k, v, table=self.table)
        if self.bias is not None:  # the same for all values of a head: no second sum over positions
            out = out + (q * self.bias.to(q.dtype)).sum(-1, keepdim=True)
        pooled: Tensor = self.pool(out.flatten(-2).movedim(-1, 1))
        return pooled

    def extra_repr(self) -> str:
        """The numbers that the modules inside do not tell."""
        return f"heads={self.heads}, depth={self.depth}, table={tuple(self.table.shape)}"


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, H D, h, w] -> [B, h, w, H, D], a view."""
    return torch.unflatten(x, 1, (heads, -1)).permute(0, 3, 4, 1, 2)
