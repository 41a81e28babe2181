"""Block attention with a halo: HaloNet, window attention, SASA and the one-sided head-and-neck block form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from medattn_kernels._check import (
    Halo,
    PerAxis,
    check_bias,
    check_qkv,
    check_table,
    halo_per_axis,
    per_axis,
)
from medattn_kernels._select import Impl, as_autocast, select
from medattn_kernels.block import eager, fused, naive

IMPLEMENTATIONS: dict[Impl, Callable[..., Tensor]] = {
    "naive": naive.block_attention,
    "eager": eager.block_attention,
    "triton": fused.block_attention,
}


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: PerAxis,
    halo: Halo,
    rel: Sequence[Tensor] | None = None,
    bias: Tensor | None = None,
    stride: PerAxis = 1,
    scale: float | None = None,
    padding: str = "masked",
    offsets: str = "voxels",
    impl: Impl | None = None,
) -> Tensor:
    """Softmax attention of each query block on itself and a halo around it.

    The volume is cut into blocks from index 0 on; the last block of an axis may be ragged. A query of the
    block that starts at s sees the keys s - before ... s + block - 1 + after of every axis:

        s_nm = scale * q_n.k_m + sum_a q_n.rel[a][o_a] + bias[h, o],     o = m - n
        y_n  = sum_m softmax_m(s_nm) v_m

    q, k: [B, *size, H, D] with one to three spatial axes. v: [B, *size, H, E].
    block: an int or one per axis. halo: an int, or per axis an int or (before, after).
    rel: one table [R_a, D] per axis, R_a odd, shared by the heads, not scaled (HaloNet). Row
        o_a + (R_a - 1) / 2 belongs to offset o_a; offsets outside the table take its first or last row.
    bias: [H, *R], one odd R per axis, the same row rule on every axis (Swin's relative position bias).
    stride: an int or one per axis, dividing block; keeps the queries at indices 0, stride, 2 stride, ...
    scale: D^-1/2 if None.
    padding: what stands outside the volume. "masked": nothing. "zero": keys and values of zeros, which keep
        their position terms and take part in the softmax (timm's HaloNet weights were trained so).
    offsets: what the tables' offsets count where queries are strided. "voxels": o = m - n as above.
        "queries": o = m - s - i for the query at s + stride i (timm's HaloNet weights were trained so).

    Tables are used in q's dtype; under autocast q, k and v are cast to its dtype. Returns
    [B, *ceil(size / stride), H, E]. Raises ValueError or TypeError for arguments that do not fit.

    References: Vaswani et al. 2021 (HaloNet), Jiang et al. 2019 (halo on one side), Liu et al. 2021 (Swin).
    """
    q, k, v = as_autocast(q, k, v)
    axes = len(check_qkv(q, k, v))
    blocks = per_axis("block", block, axes, smallest=1)
    strides = per_axis("stride", stride, axes, smallest=1)
    if any(b % s for b, s in zip(blocks, strides, strict=True)):
        raise ValueError(f"stride must divide block on every axis, got {stride=} and {block=}")
    if padding not in ("masked", "zero"):
        raise ValueError(f"unknown {padding=}; expected 'masked' or 'zero'")
    if offsets not in ("voxels", "queries"):
        raise ValueError(f"unknown {offsets=}; expected 'voxels' or 'queries'")
    if rel is not None:
        if len(rel) != axes:
            raise ValueError(f"rel must be one table per spatial axis ({axes} here), got {len(rel)}")
        for axis, table in enumerate(rel):
            check_table(f"rel[{axis}]", table, q.shape[-1], q)
    if bias is not None:
        check_bias("bias", bias, axes, q)
    pairs, masked = halo_per_axis(halo, axes), padding == "masked"
    # both ways of counting give the only query of a block the same offsets
    steps = tuple(1 if offsets == "queries" and s < b else s for s, b in zip(strides, blocks, strict=True))
    refusal = "" if rel is None else fused.refusal(q.shape[1:-2], blocks, pairs, masked)
    run = select("block_attention", IMPLEMENTATIONS, impl, q, v, refusal)
    return run(
        q,
        k,
        v,
        block=blocks,
        halo=pairs,
        rel=None if rel is None else tuple(rel),
        bias=bias,
        stride=strides,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        masked=masked,
        step=steps,
    )
