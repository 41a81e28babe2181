"""Focal self-attention (Yang et al., NeurIPS 2021, arXiv 2107.00641): near keys fine, far keys pooled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.layers.companions.pieces import by_pieces
from medattn.layers.companions.rank import check_rank
from medattn.layers.drop_path import DropPath

INIT_STD = 0.02  # of linear layers and of the tables for neighbours and pooled windows


def neighbour_offsets(spatial_dims: int, window: int, expand: int, *, distinct: bool = False) -> Tensor:
    """Places of the fine neighbours, relative to the window's first position, [2^d (w^d - (w - e)^d), d].

    The published map is rolled by `expand` in every diagonal direction, and what a roll leaves inside the
    window is dropped. In 2D with w = 7, e = 3: 132 places, 120 of them distinct; with w = 2 e all differ.
    distinct: each place once, where it first stands.
    """
    places = [
        [p + s for p, s in zip(place, shift, strict=True)]
        for shift in itertools.product((expand, -expand), repeat=spatial_dims)
        for place in itertools.product(range(window), repeat=spatial_dims)
    ]
    kept = [tuple(place) for place in places if any(not 0 <= p < window for p in place)]
    if distinct:
        kept = list(dict.fromkeys(kept))
    return torch.tensor(kept, dtype=torch.long).view(-1, spatial_dims)


def _grid(size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """All positions of a grid, [N, d]."""
    axes = (torch.arange(n, device=device) for n in size)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def _flat(place: Tensor, size: Sequence[int]) -> Tensor:
    """[..., d] -> index into the flattened grid."""
    index = torch.zeros_like(place[..., 0])
    for axis, side in enumerate(size):
        index = index * side + place[..., axis]
    return index


class WindowAttention(nn.Module):
    """Windows of queries on themselves, on a ring around them and on pooled windows; channels last.

    logits = D^-1/2 q.k + bias, one softmax over all keys. Tables as published: own window
    [(2 w - 1)^d, heads] (zeros at the start), neighbours [1, heads, w^d, keys], with one more 1 in front in
    3D, pooled [heads, (w + f - 1)^d]. Names as in microsoft/Focal-Transformer.
    """

    CONSTANTS = ("relative_position_index", "valid_ind_rolled", "relative_position_index_0")
    ring: Tensor

    def __init__(
        self,
        channels: int,
        spatial_dims: int,
        *,
        heads: int,
        window: int,
        expand: int,
        focal_window: int,
        published: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.window, self.focal_window, self.axes = heads, window, focal_window, spatial_dims
        self.expand, self.published = expand, published
        area = window**spatial_dims
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** spatial_dims, heads))
        ring = neighbour_offsets(spatial_dims, window, expand, distinct=not published)
        self.register_buffer("ring", ring, persistent=False)
        if expand:
            # torch brings every parameter of four axes into channels_last and fails where five are asked for
            ones = [1] * (spatial_dims - 1)
            table = torch.empty(*ones, heads, area, len(self.ring))
            self.relative_position_bias_table_to_neighbors = nn.Parameter(
                nn.init.trunc_normal_(table, std=INIT_STD)
            )
        if focal_window:
            table = torch.empty(heads, (window + focal_window - 1) ** spatial_dims)
            self.relative_position_bias_table_to_windows = nn.ParameterList(
                [nn.init.trunc_normal_(table, std=INIT_STD)]
            )
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, pooled: Tensor | None, shown: Sequence[int] | None = None) -> Tensor:
        """x [B, *size, C], sizes multiples of the window; pooled [B, *size / window, C] or None.

        shown: hide fine keys beyond these sizes and across the border; None hides none.
        """
        size, area = x.shape[1:-1], self.window**self.axes
        tokens = x.flatten(1, -2)
        if pooled is not None:
            tokens = torch.cat([tokens, pooled.flatten(1, -2)], 1)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # [B, tokens, H, D]
        keys, hidden = self._keys(size, pooled is not None, shown)
        own, bias, scale = keys[:, :area], self._bias(pooled is not None), q.shape[-1] ** -0.5

        def windows(part: slice) -> Tensor:
            near_q = (scale * q[:, own[part]]).transpose(2, 3)  # [B, n, H, w^d, D]
            near_k, near_v = (y[:, keys[part]].transpose(2, 3) for y in (k, v))
            logits = (near_q @ near_k.mT + bias).masked_fill(hidden[part, None, None], float("-inf"))
            out: Tensor = logits.softmax(-1) @ near_v
            return out.transpose(2, 3).flatten(3)

        out = by_pieces(windows, own.shape[0], x.shape[0] * bias.numel(), 1).flatten(1, 2)
        attended: Tensor = self.proj(out[:, own.flatten().argsort()])
        return attended.view(x.shape)

    def _keys(self, size: Sequence[int], pooled: bool, shown: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """Token of every key of every window and whether it is hidden, [windows, keys] each."""
        device, counts = self.ring.device, [n // self.window for n in size]
        first = _grid(counts, device)[:, None]  # [windows, 1, d]
        places = torch.cat([_grid([self.window] * self.axes, device), self.ring])
        fine = self.window * first + places
        keys = _flat(fine % torch.tensor(size, device=device), size)
        hidden = torch.zeros_like(keys, dtype=torch.bool)
        if shown is not None:
            hidden = ((fine < 0) | (fine >= torch.tensor(shown, device=device))).any(-1)
        if pooled:
            around = first + _grid([self.focal_window] * self.axes, device) - self.focal_window // 2
            inside = around.clamp(torch.zeros_like(first[0]), torch.tensor(counts, device=device) - 1)
            keys = torch.cat([keys, math.prod(size) + _flat(inside, counts)], 1)
            hidden = torch.cat([hidden, (inside != around).any(-1)], 1)
        return keys, hidden

    def _bias(self, pooled: bool) -> Tensor:
        """[H, w^d, keys], by the offset query - key in the window and to pooled windows."""
        device, w, f = self.ring.device, self.window, self.focal_window
        queries = _grid([w] * self.axes, device)[:, None]
        own = _flat(queries - queries.transpose(0, 1) + w - 1, [2 * w - 1] * self.axes)
        parts = [self.relative_position_bias_table[own].movedim(-1, 0)]
        if len(self.ring):
            parts.append(self.relative_position_bias_table_to_neighbors.flatten(0, -3))
        if pooled:
            around = _grid([f] * self.axes, device)
            far = _flat(queries - around + f - 1, [w + f - 1] * self.axes)
            parts.append(self.relative_position_bias_table_to_windows[0][:, far])
        return torch.cat(parts, -1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.CONSTANTS:  # the authors store the indices that here follow from the sizes
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FocalBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)): a published focal block; [B, C, *size] in and out.

    A query sees, in one softmax: the w^d positions of its window; the ring of `expand` positions around the
    window (`neighbour_offsets`); and f^d pooled windows around it, each a learned average of one window's
    positions. f = `focal_window`, 0 for none. Sizes are brought to multiples of w by zeros at the far end.

    As published, and therefore here: of the 132 neighbours in 2D (w = 7, e = 3) 12 are seen twice, with a
    bias each; the ring wraps around the map's border; the zeros at the far end, whose keys are the bias of
    qkv, are seen like other positions. Pooled windows outside the map are hidden; the published code gives
    them logits near -100. One pooled level, as in all published variants; no shift, no layer scale.
    published=False leaves the first three out: each neighbour once, and no fine keys outside the map.

    Where a map is no larger than a window, the published block is built without a ring and with a window of
    the map's side; this one is not made for one map, so give those numbers.

    3D: a window of w^3, the map rolled in eight diagonal directions, f^3 pooled windows. With w = 7 that
    would be 343 + 2,232 + f^3 keys; w = 4 and e = 2 give 64 + 448 + f^3, none twice.

    Memory: the logits of a few windows at a time. Work: N (w^d + ring + f^d) 2 C multiply-adds.

    mlp_ratio: hidden width of the MLP over C; 0 leaves it and norm2 out. drop_path: of both branches. Linear
    layers start as in the published model, the pooling at the mean.

    Parameters, with d axes, n = 2^d (w^d - (w - e)^d): 4 C^2 + 6 C + heads ((2 w - 1)^d + w^d n), with f
    heads (w + f - 1)^d + w^d + 1, with an MLP 2 r C^2 + (r + 3) C.
    Raises ValueError unless heads divides the channels, f is odd or 0 and expand below the window.
    """

    def __init__(
        self,
        channels: int,
        spatial_dims: int,
        *,
        heads: int,
        window: int = 7,
        expand: int = 3,
        focal_window: int = 7,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
        published: bool = True,
    ) -> None:
        super().__init__()
        check_rank(spatial_dims)
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads, got {channels=} and {heads=}")
        if focal_window and focal_window % 2 == 0:
            raise ValueError(f"focal_window must be odd, or 0 for none, got {focal_window=}")
        if not 0 <= expand < window:
            raise ValueError(f"expand must be at least 0 and below the window, got {expand=} and {window=}")
        area = window**spatial_dims
        self.norm1 = nn.LayerNorm(channels)
        self.pool_layers = nn.ModuleList([nn.Linear(area, 1)] if focal_window else [])
        for pool in self.pool_layers:
            assert isinstance(pool, nn.Linear)
            nn.init.constant_(pool.weight, 1 / area)
            nn.init.zeros_(pool.bias)
        self.published, self.drop_path = published, DropPath(drop_path)
        self.attn = WindowAttention(
            channels,
            spatial_dims,
            heads=heads,
            window=window,
            expand=expand,
            focal_window=focal_window,
            published=published,
        )
        self.mlp = None
        if hidden := int(mlp_ratio * channels):
            self.norm2 = nn.LayerNorm(channels)
            self.mlp = nn.Sequential()
            self.mlp.add_module("fc1", nn.Linear(channels, hidden))
            self.mlp.add_module("act", nn.GELU())
            self.mlp.add_module("fc2", nn.Linear(hidden, channels))
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear) and not name.startswith("pool_layers"):
                nn.init.trunc_normal_(layer.weight, std=INIT_STD)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C, *size]."""
        x = x.movedim(1, -1)
        x = x + self.drop_path(self._attended(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.movedim(-1, 1)

    def _attended(self, x: Tensor) -> Tensor:
        """x [B, *size, C] -> [B, *size, C]."""
        size, w = x.shape[1:-1], self.attn.window
        x = F.pad(x, [0, 0, *(pad for n in reversed(size) for pad in (0, -n % w))])
        pooled = None
        for pool in self.pool_layers:
            pooled = pool(_windows(x, w)).squeeze(-1)
        out: Tensor = self.attn(x, pooled, None if self.published else size)
        return out[(slice(None), *(slice(n) for n in size))]


def _windows(x: Tensor, window: int) -> Tensor:
    """[B, *size, C] -> [B, *size / window, C, window^d]."""
    axes = x.ndim - 2
    for axis in range(axes):
        x = torch.unflatten(x, 1 + 2 * axis, (-1, window))
    inner = [2 + 2 * axis for axis in range(axes)]
    return x.movedim(inner, tuple(range(-axes, 0))).flatten(-axes)


def focal_layers(
    channels: int,
    spatial_dims: int,
    *,
    heads: int = 2,
    window: int | None = None,
    expand: int | None = None,
    focal_window: int | None = None,
    mlp_ratio: float = 0,
) -> FocalBlock:
    """Focal self-attention as a U-Net takes it, without the MLP unless `mlp_ratio` is given.

    window: 7 in 2D, as published, and 4 in 3D if None. expand: window // 2 if None. focal_window: 7 in 2D
    and 3 in 3D if None.
    """
    flat = spatial_dims == 2
    side = (7 if flat else 4) if window is None else window
    return FocalBlock(
        channels,
        spatial_dims,
        heads=heads,
        window=side,
        expand=side // 2 if expand is None else expand,
        focal_window=(7 if flat else 3) if focal_window is None else focal_window,
        mlp_ratio=mlp_ratio,
    )
