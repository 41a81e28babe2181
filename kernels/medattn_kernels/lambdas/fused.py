"""Lambda attention through Triton: the operator as torch knows it, and the launches behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medattn_kernels.lambdas.eager import cropped
from medattn_kernels.lambdas.launch import LambdasFirst, Launch
from medattn_kernels.lambdas.order import Shape, queries_first_fused
from medattn_kernels.lambdas.pairs.launch import QueriesFirst

WIDEST_KEY = 64


def lambda_attention(q: Tensor, k: Tensor, v: Tensor, *, table: Tensor | None) -> Tensor:
    """`medattn_kernels.lambda_attention` in float32, bfloat16 or float16, differentiable once."""
    out: Tensor = _attention(q, k, v, table)[0]
    return out


def refusal(q: Tensor) -> str:
    """Why the kernels cannot take these queries; empty if they can."""
    return "" if q.shape[-1] <= WIDEST_KEY else f"takes keys of at most {WIDEST_KEY}, got {q.shape[-1]}"


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, and float32: the first lambda by depth [B, U, K, V], the largest keys and sums [B, U, K]."""
    out, content, highest, total = _empty(q, k, v)
    if q.numel():
        launch = _launch(q, v, table)
        highest, total, content = launch.content(k)
        launch.by_query("forward", q, content.sum(1, dtype=torch.float64).float(), out)
    return out, content, highest, total


def run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    content: Tensor,
    highest: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the table; empty without a table."""
    dq, dk, dv, dtable = _empty_gradients(q, k, v, table)
    if not q.numel():
        return dq, dk, dv, dtable.zero_()
    launch = _launch(q, v, table)
    launch.by_query("backward_queries", dout, content.sum(1, dtype=torch.float64).float(), dq)
    gradient = launch.content_gradient(dout)
    inner = (content * gradient[:, None]).sum(-1)
    launch.by_value(k, dout, (gradient, inner, highest, total), dk, dv)
    if table is not None:
        cropped(dtable.zero_(), q).copy_(launch.by_offset(dout))
    return dq, dk, dv, dtable


_attention = torch.library.custom_op("medattn::lambda_attention", run_forward, mutates_args=())
_backward = torch.library.custom_op("medattn::lambda_attention_backward", run_backward, mutates_args=())


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(q, k, v)


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(q, k, v, table)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _differentiate(ctx: Any, dout: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing computes them again, and allows no more
    dq, dk, dv, dtable = _backward(dout, *saved)
    return dq, dk, dv, None if saved[3] is None else dtable


_attention.register_autograd(_differentiate, setup_context=_remember)


def _empty(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by_channel = len(k), *k.shape[-2:]
    return (
        v.new_empty(*q.shape[:-1], v.shape[-1]),
        v.new_empty(*by_channel, v.shape[-1], dtype=torch.float32),
        k.new_empty(by_channel, dtype=torch.float32),
        k.new_empty(by_channel, dtype=torch.float32),
    )


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    last = q.new_empty(0) if table is None else table.new_empty(table.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), last


def _launch(q: Tensor, v: Tensor, table: Tensor | None) -> Launch:
    """The cheaper order; without a table there is only one."""
    if table is None or not queries_first_fused(Shape.of(q, v, cropped(table, q))):
        return LambdasFirst(q, v, table)
    return QueriesFirst(q, v, table)
