"""Point-wise spatial attention (PSANet: Zhao et al., ECCV 2018): a position predicts its attention map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.layers.companions.pieces import by_pieces
from medattn.layers.companions.rank import batch_norm, convolution

LARGEST_MAP = 2**24  # numbers of one over-complete map per volume: 64 MB in float32


def collect(x: Tensor, maps: Tensor, size: Sequence[int], mask: Sequence[int]) -> Tensor:
    """y_i = sum_j softmax_j(a_i[j - i + half]) x_j: position i weighs all others by its own map.

    x [B, c, N]; maps a [B, M, N], one of M = prod(mask) offsets per position; half = mask // 2 -> [B, c, N].
    Offsets outside the mask have logit 0 and take part in the softmax, as in the published code.
    """
    others, positions = _padded(maps), x.shape[-1]

    def rows(part: slice) -> Tensor:
        index = _entry(size, mask, part, 1, x.device)
        logits = others[:, part].gather(2, index.expand(x.shape[0], -1, -1))
        return x @ logits.softmax(2).mT

    return by_pieces(rows, positions, x.shape[0] * positions, 2)


def distribute(x: Tensor, maps: Tensor, size: Sequence[int], mask: Sequence[int]) -> Tensor:
    """y_i = sum_j softmax_j(a_j[i - j + half]) x_j: position j's map says how much of it each i receives.

    Arguments as of `collect`. The softmax is over the sources j, as in the published code.
    """
    others, positions = _padded(maps), x.shape[-1]

    def rows(part: slice) -> Tensor:
        index = _entry(size, mask, part, -1, x.device).mT
        logits = others.gather(2, index.expand(x.shape[0], -1, -1))
        return x @ logits.softmax(1)

    return by_pieces(rows, positions, x.shape[0] * positions, 2)


def _padded(maps: Tensor) -> Tensor:
    """[B, M, N] -> [B, N, M + 1]; the last entry is the logit of what lies outside the mask."""
    return F.pad(maps.mT, (0, 1))


def _entry(size: Sequence[int], mask: Sequence[int], part: slice, sign: int, device: torch.device) -> Tensor:
    """Entry of the map that belongs to sign (j - i), for i in part and every j; M outside: [part, N]."""
    grid = torch.meshgrid(*(torch.arange(n, device=device) for n in size), indexing="ij")
    entry, inside = torch.zeros((), dtype=torch.long, device=device), torch.ones((), device=device).bool()
    for axis, side in zip(grid, mask, strict=True):
        place = axis.flatten()
        place = sign * (place[None, :] - place[part, None]) + side // 2
        entry = entry * side + place
        inside = inside & (place >= 0) & (place < side)
    return torch.where(inside, entry, math.prod(mask))


class PointwiseSpatialAttention(nn.Module):
    """Both directions of PSANet's module; [B, C, *size] -> [B, C, *size], or [B, 2 C, *size] if `concat`.

    Each branch: 1x1 convolution C -> `inner` with norm and ReLU, shrunk by `shrink` (linear, corners
    aligned); 1x1 convolutions inner -> inner (norm, ReLU) -> M predict an over-complete map of M = prod(mask)
    offsets per position; softmax over the sources; weighted sum (`collect`, `distribute`). Both results
    together go through a 1x1 convolution back to C with norm and ReLU and are brought back to the input's
    size. Names as in hszhao/semseg (`model/psanet.py`), whose module then concatenates input and result for
    the head: `concat`. Otherwise they are added, so that the module keeps the shape.

    mask: odd number of offsets, for all axes or per axis; 2 n - 1 for all offsets of n shrunk positions.
    inner: C / 4 if None, as published.

    3D: offsets, masks and the interpolation get a third axis. All offsets of n^3 positions would be
    (2 n - 1)^3, eight times the N x N map; a mask shorter than that is published too, and what lies outside
    has logit 0: near positions get weights of their own, far ones share one. So the map of a volume has
    M N / shrink^3 numbers, and the logits of all pairs are formed for a few positions at a time.
    Raises ValueError where a map has more than 2^24 numbers per volume, or for an even mask.

    Work: (N / shrink^d)^2 inner multiply-adds per direction.

    Parameters, with m = inner: 4 C m + 2 m^2 + 2 m M + 8 m + 2 C.
    """

    def __init__(
        self,
        channels: int,
        spatial_dims: int,
        *,
        mask: int | Sequence[int],
        shrink: int = 2,
        inner: int | None = None,
        concat: bool = False,
    ) -> None:
        super().__init__()
        conv, norm = convolution(spatial_dims), batch_norm(spatial_dims)
        self.mask = (mask,) * spatial_dims if isinstance(mask, int) else tuple(mask)
        if len(self.mask) != spatial_dims or any(side < 1 or side % 2 == 0 for side in self.mask):
            raise ValueError(f"mask must be odd, one number or one per axis ({spatial_dims}), got {mask=}")
        self.shrink, self.concat = shrink, concat
        width = max(1, channels // 4) if inner is None else inner

        def unit(inputs: int, outputs: int) -> list[nn.Module]:
            return [conv(inputs, outputs, 1, bias=False), norm(outputs), nn.ReLU(inplace=True)]

        def predictor() -> nn.Sequential:
            return nn.Sequential(*unit(width, width), conv(width, math.prod(self.mask), 1, bias=False))

        self.reduce, self.reduce_p = (nn.Sequential(*unit(channels, width)) for _ in range(2))
        self.attention, self.attention_p = predictor(), predictor()
        self.proj = nn.Sequential(*unit(2 * width, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C or 2 C, *size]."""
        size = [(n - 1) // self.shrink + 1 for n in x.shape[2:]]
        self._check(size)
        collected, distributed = (_resized(reduce(x), size) for reduce in (self.reduce, self.reduce_p))
        parts = [
            take(y.flatten(2), predict(y).flatten(2), size, self.mask)
            for take, y, predict in (
                (collect, collected, self.attention),
                (distribute, distributed, self.attention_p),
            )
        ]
        out = _resized(self.proj(torch.unflatten(torch.cat(parts, 1), 2, size)), x.shape[2:])
        return torch.cat([x, out], 1) if self.concat else x + out

    def _check(self, size: Sequence[int]) -> None:
        if (numbers := math.prod(size) * math.prod(self.mask)) > LARGEST_MAP:
            raise ValueError(
                f"the attention map of {self.mask} offsets at {tuple(size)} positions has {numbers:,} "
                f"numbers, more than {LARGEST_MAP:,}; use a smaller mask, a larger shrink "
                f"(now {self.shrink}) or a coarser level"
            )

    def extra_repr(self) -> str:
        """The numbers that the submodules do not tell."""
        return f"mask={self.mask}, shrink={self.shrink}"


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(
        x, size=list(size), mode="bilinear" if x.ndim == 4 else "trilinear", align_corners=True
    )


def psa_layers(
    channels: int, spatial_dims: int, *, mask: int | None = None, shrink: int = 2, inner: int | None = None
) -> PointwiseSpatialAttention:
    """Point-wise spatial attention as a U-Net takes it; result and input are added.

    mask: offsets per axis (odd); 59 in 2D, as published for maps of 30 x 30, and 9 in 3D if None. shrink:
    input voxels per position. inner: channels inside; channels / 4 if None.
    """
    side = (59 if spatial_dims == 2 else 9) if mask is None else mask
    return PointwiseSpatialAttention(channels, spatial_dims, mask=side, shrink=shrink, inner=inner)
