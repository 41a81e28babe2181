"""Lambda attention as published code has it: the lambdas of all positions formed, then applied.

Legend: b batch, n and m positions, h heads, u intra-depth, k and v head sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from shapes import Entry
from torch import Tensor


def dense(entry: Entry, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
    """Content and positions apart; a table of all offsets is gathered per pair, a smaller one convolved."""
    axes = len(entry.size)
    queries, keys, values = (x.flatten(1, axes) for x in (q, k, v))
    content = torch.einsum("bmuk,bmuv->bkv", keys.softmax(1), values)
    out = torch.einsum("bnhk,bkv->bnhv", queries, content)
    if table is not None:
        of_positions = _convolved(v, table) if entry.scope else _gathered(entry, values, table)
        out = out + torch.einsum("bnhk,bkvn->bnhv", queries, of_positions)
    return out.view(entry.batch, *entry.size, entry.heads, entry.value_width)


def _convolved(v: Tensor, table: Tensor) -> Tensor:
    """One convolution of [B, U, V, *size] with a kernel of size 1 along V, [b, k, v, n].

    Torch convolves at most three axes: for volumes V joins the batch.
    """
    axes = v.ndim - 3
    kernel, margins = table.movedim((-1, -2), (0, 1)), [rows // 2 for rows in table.shape[:axes]]
    images = v.movedim((-2, -1), (1, 2))
    if axes < 3:
        convolve = F.conv2d if axes == 1 else F.conv3d
        return convolve(images, kernel.unsqueeze(2), padding=[0, *margins]).flatten(3)
    lambdas = F.conv3d(images.transpose(1, 2).flatten(0, 1), kernel, padding=margins)
    return lambdas.flatten(2).unflatten(0, (len(v), v.shape[-1])).transpose(1, 2)


def _gathered(entry: Entry, values: Tensor, table: Tensor) -> Tensor:
    """The table's row of every pair of positions, [n, m, u, k], times the values, [b, k, v, n]."""
    places = [torch.arange(n, device=values.device) for n in entry.size]
    where = torch.cartesian_prod(*places).view(-1, len(entry.size))
    offset = where[None, :] - where[:, None] + torch.tensor(entry.size, device=values.device) - 1
    return torch.einsum("nmuk,bmuv->bkvn", table[offset.unbind(-1)], values)
