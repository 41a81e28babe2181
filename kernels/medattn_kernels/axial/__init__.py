"""Position-sensitive attention along one spatial axis (Axial-DeepLab, Wang et al. 2020, equations 3-4)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from medattn_kernels._check import check_axis, check_parameter, check_qkv, check_span, check_table, shape
from medattn_kernels._select import Impl, as_autocast, select
from medattn_kernels.axial import eager, fused, naive
from medattn_kernels.axial.moments import logit_moments

__all__ = ["axial_attention", "logit_moments"]

IMPLEMENTATIONS: dict[Impl, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "naive": naive.axial_attention,
    "eager": eager.axial_attention,
    "triton": fused.axial_attention,
}


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axis: int,
    rel_q: Tensor | None = None,
    rel_k: Tensor | None = None,
    rel_v: Tensor | None = None,
    gain: Tensor | None = None,
    span: int | None = None,
    scale: float | None = None,
    separate: bool = False,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention along one spatial axis; every other position is an independent line.

    For query i and key j of one line, with offset o = j - i:

        s_ij = scale * (gain[0] q_i.k_j + gain[1] q_i.rel_q[o] + gain[2] k_j.rel_k[o])
        y_i  = sum_j softmax_j(s_ij) (v_j + rel_v[o])

    q, k: [B, *size, H, D] with one to three spatial axes. v: [B, *size, H, E].
    axis: spatial axis, 0-based; negative values count from the last spatial axis.
    rel_q, rel_k: [R, D], rel_v: [R, E], each with its own odd R, shared by the heads, used in q's dtype. Row
        o + (R - 1) / 2 belongs to offset o; offsets outside the table take its first or last row.
    gain: [3, H], one factor per logit term and head; ones if None.
    span: odd; only keys with |o| <= (span - 1) / 2 are seen. None: the whole line.
    scale: D^-1/2 if None.
    separate: return (sum_j a_ij v_j, sum_j a_ij rel_v[o]) instead of their sum; needs rel_v.

    Under autocast q, k and v are cast to its dtype. Returns [B, *size, H, E], or a pair of them. Raises
    ValueError or TypeError for arguments that do not fit.
    """
    q, k, v = as_autocast(q, k, v)
    check_qkv(q, k, v)
    axis = check_axis(axis, q)
    check_span(span)
    for name, table, width in (
        ("rel_q", rel_q, q.shape[-1]),
        ("rel_k", rel_k, q.shape[-1]),
        ("rel_v", rel_v, v.shape[-1]),
    ):
        if table is not None:
            check_table(name, table, width, q)
    if gain is not None:
        if gain.shape != (3, q.shape[-2]):
            raise ValueError(f"gain must be [3, {q.shape[-2]}] (logit terms, heads), got {shape(gain)}")
        check_parameter("gain", gain, q)
    if separate and rel_v is None:
        raise ValueError(
            "separate=True returns the content and the position part and needs rel_v, got rel_v=None"
        )
    run = select("axial_attention", IMPLEMENTATIONS, impl, q, v)
    return run(
        q,
        k,
        v,
        axis=axis,
        rel_q=rel_q,
        rel_k=rel_k,
        rel_v=rel_v,
        gain=gain,
        span=span,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        separate=separate,
    )
