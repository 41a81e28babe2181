"""The published axial attention layer with its three batch norms (Axial-DeepLab, Wang et al. 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn_kernels import axial_attention, logit_moments
from medattn_kernels.axial.moments import pairs_seen


class _NormalisedAxialAttention(nn.Module):
    """Position-sensitive attention along one axis, batch-normalised as in the authors' PyTorch code.

    [B, in_channels, *size] -> [B, out_channels, *size]. Batch norms follow the 1x1 convolution to queries,
    keys and values, the three logit terms (one affine pair per term and head) and the two parts of the
    output, content and position, which are then added. There is no other scale and no output projection.

    axis: spatial axis, 0-based. length: positions that the table of relative positions is made for; it has
    2 length - 1 columns, and on a longer axis the offsets beyond share the end columns. span: keys per query
    (odd); all if None.

    The norm over the logits is exact without their map: `logit_moments` gives its statistics, and its shift
    cancels in the softmax, so that only a gain enters the attention. Its statistics are those of one process:
    `SyncBatchNorm` synchronises the other two norms only.

    Parameters are named and laid out as in csrhddlam/axial-deeplab (`AxialAttention`), whose state dicts
    load: `relative` is [2 g, 2 length - 1] with g channels per head, queries g / 2, keys g / 2 and values g.
    Columns of queries and values run from the offset key - query = length - 1 down to 1 - length, those of
    keys up.

    Parameters: 2 c_in c + 8 c + 6 heads + 2 (c / heads) (2 length - 1), with c = out_channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        axis: int,
        length: int,
        heads: int = 8,
        span: int | None = None,
    ) -> None:
        super().__init__()
        if out_channels % (2 * heads):
            raise ValueError(f"out_channels must be a multiple of 2 heads, got {out_channels=} and {heads=}")
        self.axis, self.heads, self.span = axis, heads, span
        self.value_size = out_channels // heads
        self.qkv_transform = nn.Conv1d(in_channels, 2 * out_channels, 1, bias=False)
        self.bn_qkv = nn.BatchNorm1d(2 * out_channels)
        self.bn_similarity = nn.BatchNorm2d(3 * heads)
        self.bn_output = nn.BatchNorm1d(2 * out_channels)
        self.relative = nn.Parameter(torch.empty(2 * self.value_size, 2 * length - 1))
        nn.init.normal_(self.qkv_transform.weight, std=in_channels**-0.5)
        nn.init.normal_(self.relative, std=self.value_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, *size] -> [B, out_channels, *size]."""
        qkv = F.linear(x.movedim(1, -1), self.qkv_transform.weight[..., 0])
        qkv = self.bn_qkv(qkv.flatten(0, -2)).view_as(qkv).unflatten(-1, (self.heads, -1))
        g = self.value_size
        q, k, v = torch.split_with_sizes(qkv, [g // 2, g // 2, g], -1)
        rel_q, rel_k, rel_v = torch.split_with_sizes(self.relative, [g // 2, g // 2, g])
        rel_q, rel_v = rel_q.flip(1).mT, rel_v.flip(1).mT
        parts = axial_attention(
            q,
            k,
            v,
            axis=self.axis,
            rel_q=rel_q,
            rel_k=rel_k.mT,
            rel_v=rel_v,
            gain=self._gain(q, k, rel_q, rel_k.mT),
            span=self.span,
            scale=1.0,
            separate=True,
        )
        both = torch.stack(tuple(parts), -1).flatten(-3)  # [B, *size, 2 out_channels]
        out: Tensor = self.bn_output(both.flatten(0, -2)).view_as(both)
        return torch.unflatten(out, -1, (-1, 2)).sum(-1).movedim(-1, 1)

    def _gain(self, q: Tensor, k: Tensor, rel_q: Tensor, rel_k: Tensor) -> Tensor:
        """What the batch norm over the logits multiplies each term by, [3, heads]."""
        norm = self.bn_similarity
        if norm.training or norm.running_var is None:
            moments = logit_moments(q, k, axis=self.axis, rel_q=rel_q, rel_k=rel_k, span=self.span)
            mean, variance = (moment.flatten() for moment in moments)
            length = q.shape[1 + self.axis]
            lines = q[..., 0, 0].numel() // length
            track_statistics(norm, mean, variance, lines * pairs_seen(length, self.span))
        else:
            variance = norm.running_var
        # the bias shifts all logits of a query alike; used this way, its gradient is zero instead of missing
        gain = norm.weight * (variance + norm.eps).rsqrt() + 0 * norm.bias
        return gain.view(3, self.heads)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "flatten_index", None)  # the authors store which column each pair reads
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The numbers that the submodules do not tell."""
        return f"axis={self.axis}, heads={self.heads}, span={self.span}"


class AxialAttention2d(_NormalisedAxialAttention):
    """Along the height (axis 0) or width (axis 1) of images [B, in_channels, h, w]; see the base class."""


class AxialAttention3d(_NormalisedAxialAttention):
    """Along one axis of volumes [B, in_channels, i, j, k]; see the base class."""


@torch.no_grad()
def track_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Move a batch norm's running statistics as its own forward pass would: the variance unbiased."""
    if not norm.training or norm.running_mean is None:
        return
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    rate = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    unbiased = variance * (count / max(1, count - 1))
    norm.running_mean.lerp_(mean.to(norm.running_mean), rate)
    norm.running_var.lerp_(unbiased.to(norm.running_var), rate)
