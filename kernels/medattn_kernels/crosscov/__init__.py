"""Cross-covariance attention: channels attend to channels (XCiT, El-Nouby et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from medattn_kernels._check import check_parameter, check_qkv, shape
from medattn_kernels._select import Impl, as_autocast, select
from medattn_kernels.crosscov import eager, fused, naive

IMPLEMENTATIONS: dict[Impl, Callable[..., Tensor]] = {
    "naive": naive.cross_covariance_attention,
    "eager": eager.cross_covariance_attention,
    "triton": fused.cross_covariance_attention,
}


def cross_covariance_attention(
    q: Tensor, k: Tensor, v: Tensor, *, temperature: Tensor, impl: Impl | None = None
) -> Tensor:
    """Softmax attention among the channels of a head, by the cosine between their values at all positions.

    For channels c, d of one head, with n running over all N positions:

        c_cd = sum_n q_nc k_nd / (|q_c| |k_d|),     |x_c| = max(sqrt(sum_n x_nc^2), 1e-12)
        a_cd = softmax_d(temperature[h] * c_cd)
        y_nc = sum_d a_cd v_nd

    q, k, v: [B, *size, H, D] with one to three spatial axes, all of one shape. Time and memory are linear
        in N, and nothing depends on the order of the positions.
    temperature: [H], one factor per head, never rounded to less than float32. It multiplies, as in the
        published code; the paper's tau divides.

    Under autocast q, k and v are cast to its dtype. Returns [B, *size, H, D]. Raises ValueError or TypeError
    for arguments that do not fit.

    Reference: El-Nouby et al. 2021, section 3.2, with the softmax over the channels of k as in its code.
    """
    q, k, v = as_autocast(q, k, v)
    check_qkv(q, k, v)
    if v.shape != q.shape:
        raise ValueError(
            f"v must have the shape of q, as its channels are weighted by those of k, "
            f"got v {shape(v)} and q {shape(q)}"
        )
    heads = q.shape[-2]
    if temperature.shape != (heads,):
        raise ValueError(f"temperature must be [{heads}] (heads), got {shape(temperature)}")
    check_parameter("temperature", temperature, q)
    run = select("cross_covariance_attention", IMPLEMENTATIONS, impl, q, v, fused.refusal(q))
    return run(q, k, v, temperature=temperature)
