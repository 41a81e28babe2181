"""Cross-covariance attention as torch knows it: one forward and one backward operator per implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EPS = 1e-12  # smallest norm to divide by, as in torch.nn.functional.normalize


def register(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """The operator medattn::name, which torch can trace, compile and differentiate once.

    forward: q, k, v, temperature -> out, cosine [B, H, D, D], norm [B, H, 2, D] of the channels of q and k.
    backward: dout, q, k, v, temperature, cosine, norm -> gradients of q, k, v, temperature.
    """
    operator = torch.library.custom_op(f"medattn::{name}", forward, mutates_args=())
    gradient = torch.library.custom_op(f"medattn::{name}_backward", backward, mutates_args=())

    def differentiate(ctx: Any, dout: Tensor, *statistics: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = gradient(dout, *ctx.saved_tensors)
        return found

    operator.register_fake(empty_results)
    gradient.register_fake(lambda dout, *inputs: empty_gradients(*inputs[:4]))
    operator.register_autograd(differentiate, setup_context=_remember)
    return operator


def empty_results(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what the forward operator returns; the statistics in float32 at least."""
    batch, heads, width = q.shape[0], *q.shape[-2:]
    precise = torch.promote_types(q.dtype, torch.float32)
    return (
        v.new_empty(v.shape),
        q.new_empty(batch, heads, width, width, dtype=precise),
        q.new_empty(batch, heads, 2, width, dtype=precise),
    )


def empty_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Room for the gradients of some tensors."""
    return tuple(x.new_empty(x.shape) for x in inputs)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(True)
