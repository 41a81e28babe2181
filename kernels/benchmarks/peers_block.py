"""Block attention as one would write it without this package: unfolded key windows as a batch.

Legend: n blocks, h heads, x y z places in a block, u a place in the window along one axis, d a head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from shapes import Entry
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention


def dense(entry: Entry, q: Tensor, k: Tensor, v: Tensor, **tables: Tensor) -> Tensor:
    """One logits map over all windows, table rows gathered per query and place along an axis."""
    q, k, v = _windowed(entry, q, k, v)
    logits = q.shape[-1] ** -0.5 * q @ k.mT
    if tables:
        logits = logits + _bias(entry, q, tables)
    inside = _inside(entry, q.device)
    if inside is not None:
        logits = logits.masked_fill(~inside, float("-inf"))
    return _volume(logits.softmax(-1) @ v, entry)


def sdpa(entry: Entry, q: Tensor, k: Tensor, v: Tensor, **tables: Tensor) -> Tensor:
    """PyTorch's fused attention on the windows, with the position logits as its bias."""
    q, k, v = _windowed(entry, q, k, v)
    bias = inside = _inside(entry, q.device)
    if tables:
        bias = _bias(entry, q, tables)
        bias = bias if inside is None else bias.masked_fill(~inside, float("-inf"))
    return _volume(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), entry)


def flex(
    entry: Entry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend: Callable[..., Tensor] = flex_attention,
    **tables: Tensor,
) -> Tensor:
    """FlexAttention on the windows; `score_mod` looks the position logits up by axis and masks."""
    q, k, v = _windowed(entry, q, k, v)
    axes, window, inside = len(entry.size), entry.window, _inside(entry, q.device)
    terms = [term.flatten(2, 1 + axes) for term in _terms(entry, q, tables)]  # [n, h, query, u]

    def position(score: Tensor, n: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        for axis, term in enumerate(terms):
            score = score + term[n, h, query, key // window ** (axes - 1 - axis) % window]
        return score if inside is None else torch.where(inside[n, 0, 0, key], score, float("-inf"))

    return _volume(attend(q, k, v, score_mod=position), entry)


def timm(entry: Entry) -> Callable[..., Tensor]:
    """The attention of timm's `HaloAttn` (2D, zeros outside), its projections replaced by given q, k and v.

    Its tables have 2 window - 1 rows, the first `2 halo` of them never read. Raises ImportError.
    """
    from timm.layers.halo_attn import HaloAttn

    layer = HaloAttn(
        entry.heads * entry.width,
        entry.heads * entry.value_width,
        num_heads=entry.heads,
        dim_head=entry.width,
        block_size=entry.block,
        halo_size=entry.halo,
    ).to(entry.device)
    layer.q = nn.Identity()
    del layer.kv  # a plain attribute takes the place of the module

    def run(q: Tensor, k: Tensor, v: Tensor, rel0: Tensor, rel1: Tensor) -> Tensor:
        kv = torch.cat([k, v], -1).flatten(-2).movedim(-1, 1)  # [B, H (D + E), height, width]
        layer.kv = lambda _: kv
        tables = {
            f"pos_embed.{name}_rel": F.pad(table, (0, 0, 2 * entry.halo, 0))
            for name, table in (("height", rel0), ("width", rel1))
        }
        out: Tensor = torch.func.functional_call(layer, tables, (q.flatten(-2).movedim(-1, 1),))
        return out.unflatten(1, (entry.heads, entry.value_width)).movedim((1, 2), (-2, -1))

    return run


def natten(entry: Entry) -> Callable[..., Tensor]:
    """NATTEN's strided neighbourhoods: windows shared by a block, as here, but shifted inwards at borders.

    Raises ImportError.
    """
    import natten as package

    attend = getattr(package, f"na{len(entry.size)}d")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(q, k, v, kernel_size=entry.window, stride=entry.block)
        return out

    return run


def _windowed(entry: Entry, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [n, H, queries, D] of every block, its keys [n, H, keys, D] and values [n, H, keys, E]."""
    return _boxes(q, entry.block, 0), _boxes(k, entry.block, entry.halo), _boxes(v, entry.block, entry.halo)


def _boxes(x: Tensor, block: int, halo: int) -> Tensor:
    """Every block with its halo, zeros outside: [B, *size, H, D] -> [n, H, voxels, D]."""
    axes = x.ndim - 3
    margins = [margin for n in reversed(x.shape[1:-2]) for margin in (halo, halo + -n % block)]
    x = F.pad(x, [0, 0, 0, 0, *margins])
    for axis in range(axes):
        x = x.unfold(1 + axis, block + 2 * halo, block)
    return x.movedim(axes + 2, -1).flatten(0, axes).flatten(2, -2)


def _volume(x: Tensor, entry: Entry) -> Tensor:
    """[n, H, queries, E] -> [B, *size, H, E], without what lies beyond a ragged border."""
    axes, b = len(entry.size), entry.block
    counts = [-(-n // b) for n in entry.size]
    x = x.reshape(entry.batch, *counts, entry.heads, *[b] * axes, x.shape[-1])
    together = [dim for axis in range(axes) for dim in (1 + axis, 2 + axes + axis)]
    x = x.permute(0, *together, 1 + axes, -1)
    x = x.reshape(entry.batch, *(n * b for n in counts), *x.shape[-2:])
    return x[(slice(None), *(slice(n) for n in entry.size))]


def _inside(entry: Entry, device: torch.device) -> Tensor | None:
    """Which keys exist, [n, 1, 1, keys]; None where all of them do or zeros stand in."""
    if entry.padding == "zero" or (entry.halo == 0 and all(n % entry.block == 0 for n in entry.size)):
        return None
    ones = torch.ones(entry.batch, *entry.size, 1, 1, device=device)
    return _boxes(ones, entry.block, entry.halo).mT > 0


def _terms(entry: Entry, q: Tensor, tables: dict[str, Tensor]) -> list[Tensor]:
    """q.rel of every axis, [n, h, x, y, z, u]."""
    places = "xyz"[: len(entry.size)]
    near = q.unflatten(2, [entry.block] * len(places))
    query = torch.arange(entry.block, device=q.device)
    row = torch.arange(entry.window, device=q.device) - query[:, None] + entry.block - 1
    return [
        torch.einsum(f"nh{places}d,{place}ud->nh{places}u", near, table[row])
        for place, table in zip(places, tables.values(), strict=False)
    ]


def _bias(entry: Entry, q: Tensor, tables: dict[str, Tensor]) -> Tensor:
    """The position terms of the logits, [n, h, queries, keys]."""
    axes = len(entry.size)
    total: Tensor | None = None
    for axis, term in enumerate(_terms(entry, q, tables)):
        alone = [1] * axes
        alone[axis] = entry.window
        term = term.unflatten(-1, alone)
        total = term if total is None else total + term
    assert total is not None
    return total.flatten(2 + axes, -1).flatten(2, 1 + axes)
