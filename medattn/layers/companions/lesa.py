"""Locally enhanced self-attention (LESA: Yang, Qiao, Kortylewski, Yuille, arXiv 2107.05637)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.layers.axial import AxialAttention2d, track_statistics
from medattn.layers.companions.rank import batch_norm, convolution
from medattn_kernels import block_attention

LONGEST_LINE = 4096  # positions of the flat form: its norm and its logits take a map of one whole line
TABLES = ("rel_depth", "rel_height", "rel_width")  # of the last one, two or three axes


class FlatContext(AxialAttention2d):
    """Position-sensitive attention over the flattened map, [B, C, *size]: LESA's "classification" form.

    The published module is an axial layer whose only line is the whole map, with its three batch norms, and
    one table of relative positions over flattened indices (2 positions - 1 columns).

    Raises ValueError for more than 4096 positions: the operator holds the map of one line.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C, *size]."""
        line = x.flatten(2)
        if line.shape[2] > LONGEST_LINE:
            raise ValueError(
                f"the flat form takes at most {LONGEST_LINE} positions, got {tuple(x.shape[2:])}; "
                "use form='axes', whose memory does not grow with their square"
            )
        return super().forward(line).view_as(x)


class AxesContext(nn.Module):
    """Global attention with one table of relative positions per axis, [B, C, *size]: LESA's "detection" form.

        s_ij = g0 q_i.k_j + g1 q_i.(sum_a r_a[j_a - i_a])        y_i = norm(sum_j softmax_j(s_ij) v_j)

    g0, g1: gains per head, all that a batch norm over the 2 heads logit terms leaves in a softmax; its shift
    is the same for all keys. The norm's statistics over all N^2 pairs have a closed form (`_moments`).
    Queries and keys have C / (2 heads) channels per head, values C / heads; batch norms follow the
    convolution to all three and the output.

    The logits are those of one block over the whole map, formed a few at a time by `block_attention`: with
    queries (g0 q, g1 q), keys (k, 0) and tables (0, r_a) the gain stays off the shared tables.

    3D: a third table for the third axis, as the 2-D form has two. Offsets beyond a table share its end rows.

    length: positions along an axis that tables are made for, [2 length - 1, C / (2 heads)] each.

    Parameters: 2 C^2 + 6 C + 4 heads + axes (2 length - 1) C / (2 heads).
    """

    def __init__(self, channels: int, spatial_dims: int, *, heads: int, length: int) -> None:
        super().__init__()
        width = channels // (2 * heads)
        self.heads, self.tables = heads, TABLES[-spatial_dims:]
        self.qkv_transform = nn.Conv1d(channels, 2 * channels, 1, bias=False)
        self.bn_qkv = nn.BatchNorm1d(2 * channels)
        self.bn_similarity = nn.BatchNorm2d(2 * heads)
        self.bn_output = nn.BatchNorm1d(channels)
        for name in self.tables:
            self.register_parameter(name, nn.Parameter(torch.randn(2 * length - 1, width) * width**-0.5))
        nn.init.normal_(self.qkv_transform.weight, std=channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C, *size]."""
        size, heads = x.shape[2:], self.heads
        qkv = self.bn_qkv(self.qkv_transform(x.flatten(2))).mT.unflatten(1, size).unflatten(-1, (heads, -1))
        width = qkv.shape[-1] // 4
        q, k, v = qkv.split([width, width, 2 * width], -1)
        tables = [self.get_parameter(name) for name in self.tables]
        content, position = self._gain(q, k, tables).view(2, heads, 1).to(q.dtype)
        out = block_attention(
            torch.cat([content * q, position * q], -1),
            F.pad(k, (0, width)),
            v,
            block=tuple(size),
            halo=0,
            rel=[F.pad(table, (width, 0)) for table in tables],
            scale=1.0,
        )
        normed: Tensor = self.bn_output(out.flatten(1, -3).flatten(2).mT)
        return normed.view_as(x)

    def _gain(self, q: Tensor, k: Tensor, tables: Sequence[Tensor]) -> Tensor:
        norm = self.bn_similarity
        if norm.training or norm.running_var is None:
            mean, variance = _moments(q, k, tables)
            positions = q[0, ..., 0, 0].numel()
            track_statistics(norm, mean, variance, q.shape[0] * positions**2)
        else:
            variance = norm.running_var
        # the bias cancels in the softmax; used this way, its gradient is zero instead of missing
        gain: Tensor = norm.weight * (variance + norm.eps).rsqrt() + 0 * norm.bias
        return gain


def _moments(q: Tensor, k: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of both logit terms over all pairs, content heads first: [2 heads] each.

    q, k [B, *size, H, D]. Content: sum_ij q_i.k_j and its square from sums and Gram matrices over positions.
    Position: a key's coordinates run independently, so that over the keys of one query the means and the
    variances of the axes' terms add up. In float64: a mean may be many standard deviations.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.double(), k.double()
    flat_q, flat_k = (x.flatten(1, -3).movedim(-2, 1) for x in (q, k))  # [B, H, N, D]
    pairs = q.shape[0] * flat_q.shape[2] ** 2
    grams = flat_q.mT @ flat_q, flat_k.mT @ flat_k
    means = [(flat_q.sum(2) * flat_k.sum(2)).sum((0, 2)) / pairs]
    variances = [(grams[0] * grams[1]).sum((0, 2, 3)) / pairs - means[0] ** 2]

    mean_of_query = within = torch.zeros((), dtype=q.dtype, device=q.device)
    for axis, table in enumerate(tables):
        rows = _rows(table.double(), q.shape[1 + axis])  # [L, L, D]
        along = q.movedim(1 + axis, -2)  # [..., H, L, D]
        mean = (along * rows.mean(1)).sum(-1)
        gram = torch.einsum("ijd,ije->ide", rows, rows) / rows.shape[1]
        spread = torch.einsum("...id,ide,...ie->...i", along, gram, along) - mean**2
        mean_of_query = mean_of_query + mean.movedim(-1, 1 + axis)
        within = within + spread.movedim(-1, 1 + axis)
    others = tuple(range(q.ndim - 2))
    means.append(mean_of_query.mean(others))
    variances.append(within.mean(others) + mean_of_query.square().mean(others) - means[1] ** 2)
    return torch.cat(means).to(dtype), torch.cat(variances).clamp_min(0).to(dtype)


def _rows(table: Tensor, length: int) -> Tensor:
    """Table rows of the offsets j - i, [i, j, D]; offsets outside read the end rows."""
    place, last = torch.arange(length, device=table.device), len(table) - 1
    return table[(place[None, :] - place[:, None] + last // 2).clamp(0, last)]


class LESA(nn.Module):
    """y = u + w b: a local term u, a context term b and a gate w in (0, 1); [B, C, *size] in and out.

        u = norm(1x1 conv(3x3 conv in `heads` groups))        b = attention of all positions on all positions
        w = sigmoid(norm(1x1 conv(relu norm(1x1 conv 2C -> C(relu [u; b])))))

    No convolution has a bias. The published attention includes the position itself, though the paper's
    decomposition leaves it to u; so does this one. Position of keys: `form="axes"` is the authors' form for
    detection, `form="flat"` the one of their ImageNet models, for small maps only (`AxesContext`,
    `FlatContext`). State dicts of Chenglin-Yang/LESA_classification load: there the context's parameters
    stand at the top level. residual: y + x, the shortcut that is published around the whole bottleneck.

    3D: 3x3x3 convolutions, three tables. Work: N^2 heads (2 D + sum of sides + E) multiply-adds with
    D = C / (2 heads) and E = C / heads: the dearest module of this package.

    heads: G below; with one there is no 1x1 convolution after the 3x3. length: side of the map that the
    tables are made for.

    Parameters, with k = 3^axes: C^2 (4 + k / G) + 6 C, and of the context: axes 2 C^2 + 6 C + 4 G +
    axes (2 length - 1) C / (2 G), flat 2 C^2 + 8 C + 6 G + (2 length^axes - 1) 2 C / G.
    Raises ValueError unless channels is a multiple of 2 heads, and for an unknown form.
    """

    CONTEXT = ("qkv_transform", "bn_qkv", "bn_similarity", "bn_output", "relative", "flatten_index", *TABLES)

    def __init__(
        self,
        channels: int,
        spatial_dims: int,
        *,
        heads: int = 8,
        length: int = 32,
        form: str = "axes",
        residual: bool = False,
    ) -> None:
        super().__init__()
        conv, norm = convolution(spatial_dims), batch_norm(spatial_dims)
        if channels % (2 * heads):
            raise ValueError(f"channels must be a multiple of 2 heads, got {channels=} and {heads=}")
        if form not in ("axes", "flat"):
            raise ValueError(f"unknown {form=}; expected 'axes' or 'flat'")
        self.residual = residual
        self.context: nn.Module = (
            AxesContext(channels, spatial_dims, heads=heads, length=length)
            if form == "axes"
            else FlatContext(channels, channels, axis=0, length=length**spatial_dims, heads=heads)
        )
        grouped = conv(channels, channels, 3, padding=1, groups=heads, bias=False)
        mixing = [conv(channels, channels, 1, bias=False)] if heads > 1 else []
        self.x_transform = nn.Sequential(grouped, *mixing)
        self.bn_x = norm(channels)
        self.reasoning = nn.Sequential(
            nn.ReLU(), conv(2 * channels, channels, 1, bias=False), norm(channels), nn.ReLU()
        )
        self.projection = nn.Sequential(conv(channels, channels, 1, bias=False), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C, *size]."""
        local, context = self.bn_x(self.x_transform(x)), self.context(x)
        gate = self.projection(self.reasoning(torch.cat([local, context], 1))).sigmoid()
        out: Tensor = local + gate * context
        return out + x if self.residual else out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in list(state_dict):
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name.split(".")[0] in self.CONTEXT:
                state_dict[f"{prefix}context.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def lesa_layers(
    channels: int, spatial_dims: int, *, heads: int | None = None, length: int = 32, form: str = "axes"
) -> LESA:
    """Locally enhanced self-attention as a U-Net takes it, with a shortcut around it.

    heads: 8 in 2D, as published, and 2 in 3D, where work grows with them, if None. length, form: of `LESA`.
    """
    return LESA(
        channels,
        spatial_dims,
        heads=(8 if spatial_dims == 2 else 2) if heads is None else heads,
        length=length,
        form=form,
        residual=True,
    )
