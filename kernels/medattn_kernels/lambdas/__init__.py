"""Lambda attention: content and position lambdas applied to queries (LambdaNetworks, Bello 2021)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from medattn_kernels._check import check_parameter, check_qkv, shape
from medattn_kernels._select import Impl, as_autocast, select
from medattn_kernels.lambdas import eager, fused, naive

__all__ = ["lambda_attention"]

IMPLEMENTATIONS: dict[Impl, Callable[..., Tensor]] = {
    "naive": naive.lambda_attention,
    "eager": eager.lambda_attention,
    "triton": fused.lambda_attention,
}


def lambda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Queries on a summary of the whole volume and one of their surroundings; no map of pairs.

    Every position n has a matrix [K, V], its lambda, that all heads of queries are multiplied with:

        lambda_n = sum_(m, u) softmax_m(k_u)_m v_(m, u)' + sum_(m, u) table[m - n, u] v_(m, u)'
        y_(n, h) = lambda_n' q_(n, h)

    q: [B, *size, H, K] with one to three spatial axes. k: [B, *size, U, K]. v: [B, *size, U, V]. U is the
        intra-depth, over which both lambdas are summed. The softmax runs over all positions, for each batch
        entry, u and channel.
    table: [*R, U, K], one odd R per spatial axis, shared by heads and batch, used in q's dtype. Entry
        o + (R - 1) / 2 on every axis belongs to offset o = m - n; offsets outside the table contribute
        nothing. R = 2 size - 1 holds every offset (the global form). None: the first lambda only.

    Nothing is scaled. Under autocast q, k and v are cast to its dtype. Returns [B, *size, H, V]. Raises
    ValueError or TypeError for arguments that do not fit.

    Reference: Bello 2021, section 3: equations 1 and 2, table 2 and figure 3.
    """
    q, k, v = as_autocast(q, k, v)
    _check(q, k, v, table)
    run = select("lambda_attention", IMPLEMENTATIONS, impl, q, v, fused.refusal(q))
    return run(q, k, v, table=table)


def _check(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> None:
    """Raise for what does not fit; k and v have a depth U in the place of q's heads."""
    if k.ndim != q.ndim or k.shape[:-2] != q.shape[:-2] or k.shape[-1:] != q.shape[-1:] or not k.shape[-2]:
        raise ValueError(
            f"k must be [B, *size, U, K] for q [B, *size, H, K], got k {shape(k)} and q {shape(q)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must match k in all but its last axis, got v {shape(v)} and k {shape(k)}")
    check_qkv(q, k[..., :1, :].expand_as(q), v[..., :1, :].expand(*q.shape[:-1], -1))
    if table is None:
        return
    axes = q.ndim - 3
    if (
        table.ndim != axes + 2
        or any(rows % 2 == 0 for rows in table.shape[:-2])
        or table.shape[-2:] != k.shape[-2:]
    ):
        rows = ", ".join(["R"] * axes)
        raise ValueError(
            f"table must be [{rows}, {k.shape[-2]}, {k.shape[-1]}] (an odd R per axis, U, K), "
            f"got {shape(table)}"
        )
    check_parameter("table", table, q)
