"""Operators with learned relative positions: what an attention layer calls on queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medattn_kernels import axial_attention, block_attention

Halo = tuple[int, int]  # voxels before and after a block


class BlockAttention(nn.Module):
    """`block_attention` with one table of relative positions per axis (HaloNet's form), or without any.

    A table has a row for every offset that a block and its halo can produce:
    2 (block + max(halo) - 1) + 1 rows of `head_size`, N(0, 1/head_size) at the start (timm's HaloNet).
    """

    def __init__(self, head_size: int, spatial_dims: int, *, block: int, halo: Halo, relative: bool) -> None:
        super().__init__()
        self.block, self.halo = block, (halo,) * spatial_dims
        rows = 2 * (block + max(halo) - 1) + 1
        tables = [
            torch.randn(rows, head_size) * head_size**-0.5 for _ in range(spatial_dims if relative else 0)
        ]
        self.rel = nn.ParameterList(tables)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k [B, *size, H, D], v [B, *size, H, E] -> [B, *size, H, E]."""
        return block_attention(q, k, v, block=self.block, halo=self.halo, rel=list(self.rel) or None)

    def extra_repr(self) -> str:
        """The numbers that the module's name does not tell."""
        return f"block={self.block}, halo={self.halo[0]}"


class AxialAttention(nn.Module):
    """`axial_attention` along one axis with tables for queries, keys and values (Axial-DeepLab), or without.

    The tables have `rows` rows (odd), N(0, 1/value_size) at the start; offsets beyond share the end rows.
    """

    def __init__(
        self, head_size: int, value_size: int, axis: int, *, rows: int, span: int | None, relative: bool
    ) -> None:
        super().__init__()
        self.axis, self.span = axis, span
        self.rel_q = self.rel_k = self.rel_v = None
        if relative:
            std = value_size**-0.5
            self.rel_q = nn.Parameter(torch.randn(rows, head_size) * std)
            self.rel_k = nn.Parameter(torch.randn(rows, head_size) * std)
            self.rel_v = nn.Parameter(torch.randn(rows, value_size) * std)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k [B, *size, H, D], v [B, *size, H, E] -> [B, *size, H, E]."""
        out = axial_attention(
            q, k, v, axis=self.axis, span=self.span, rel_q=self.rel_q, rel_k=self.rel_k, rel_v=self.rel_v
        )
        assert isinstance(out, Tensor)  # a pair only with separate=True
        return out

    def extra_repr(self) -> str:
        """The numbers that the module's name does not tell."""
        return f"axis={self.axis}, span={self.span}"
