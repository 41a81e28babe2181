"""Lambda attention in plain torch: lambdas of a few channels of the values at a time, or queries first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from medattn_kernels._chunk import chunk_size, pieces
from medattn_kernels._select import without_autocast
from medattn_kernels.lambdas.convolution import Convolution
from medattn_kernels.lambdas.order import Shape, queries_first
from medattn_kernels.lambdas.pairs import eager as pairs


def lambda_attention(q: Tensor, k: Tensor, v: Tensor, *, table: Tensor | None) -> Tensor:
    """`medattn_kernels.lambda_attention` on any device, differentiable once."""
    content = content_lambda(k, v)
    if table is None:
        with without_autocast(q):
            out = q.flatten(1, -2) @ content.to(q.dtype)
        return out.view(*q.shape[:-1], v.shape[-1])
    result: Tensor = _attention(q, content, v, cropped(table, q).to(q.dtype))
    return result


def content_lambda(k: Tensor, v: Tensor) -> Tensor:
    """[B, K, V] in float32 at least: a weight in a large volume is less than float16 can hold."""
    precise = torch.promote_types(k.dtype, torch.float32)
    with without_autocast(k):
        weights = k.flatten(1, -3).to(precise).softmax(1)
        return weights.flatten(1, 2).mT @ v.to(precise).flatten(1, -2)


def cropped(table: Tensor, q: Tensor) -> Tensor:
    """The table without the offsets that no two positions have."""
    for axis, size in enumerate(q.shape[1:-2]):
        outside = max(0, (table.shape[axis] - 1) // 2 - (size - 1))
        table = table.narrow(axis, outside, table.shape[axis] - 2 * outside)
    return table


def run_forward(q: Tensor, content: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Output [B, *size, H, V]; content: [B, K, V], the first lambda; table: cropped. In the inputs' dtype."""
    if queries_first(Shape.of(q, v, table), chunk_size(q), False):
        return pairs.run_forward(q, content, v, table)
    out = _empty(q, v)
    with _plain(q):
        positions = Convolution(table, q.shape[1:-2])
        for batch, channels in _steps(q, v):
            lambdas = _of_positions(positions.lambdas(_images(v, batch, channels)), q[batch])
            lambdas += content[batch, None, :, channels].to(q.dtype)
            y = q[batch].flatten(1, -3) @ lambdas
            out[batch, ..., channels] = y.view(out[batch, ..., channels].shape)
    return out


def run_backward(
    grad: Tensor, q: Tensor, content: Tensor, v: Tensor, table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, content, v and the table; all but that of v are summed in float32 at least.

    Nothing but the inputs comes from the forward pass: either pass takes the order that is cheaper for it.
    """
    if queries_first(Shape.of(q, v, table), chunk_size(q), True):
        return pairs.run_backward(grad, q, content, v, table)
    precise = torch.promote_types(q.dtype, torch.float32)
    dq, dcontent = torch.zeros_like(q, dtype=precise), torch.zeros_like(content)
    dv = torch.empty_like(v)
    with _plain(q):
        positions = Convolution(table, q.shape[1:-2])
        positions.prepare_gradients()
        for batch, channels in _steps(q, v):
            images = _images(v, batch, channels)
            lambdas = _of_positions(positions.lambdas(images), q[batch])
            lambdas += content[batch, None, :, channels].to(q.dtype)
            dy = grad[batch, ..., channels].flatten(1, -3)
            dq[batch] += (dy @ lambdas.mT).view(q[batch].shape)
            dlambdas = q[batch].flatten(1, -3).mT @ dy  # [b, n, K, channels]
            dcontent[batch, :, channels] = dlambdas.sum(1, dtype=content.dtype)
            gradients = torch.unflatten(dlambdas.movedim(-1, 1).mT.flatten(0, 1), -1, q.shape[1:-2])
            dimages = positions.backward(images, gradients.contiguous())
            dv[batch, ..., channels] = torch.unflatten(dimages, 0, (-1, dy.shape[-1])).movedim(
                (1, 2), (-1, -2)
            )
    return dq.to(q.dtype), dcontent, dv, positions.table_gradient().to(table.dtype).contiguous()


# operators to torch, so that torch.compile takes the loops and their writes in place as they are
_attention = torch.library.custom_op("medattn::lambda_attention_eager", run_forward, mutates_args=())
_backward = torch.library.custom_op("medattn::lambda_attention_eager_backward", run_backward, mutates_args=())


@_attention.register_fake
def _(q: Tensor, content: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return _empty(q, v)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, content: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(q),
        torch.empty_like(content),
        torch.empty_like(v),
        table.new_empty(table.shape),
    )


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = _backward(grad, *ctx.saved_tensors)
    return gradients


_attention.register_autograd(_differentiate, setup_context=_remember)


def _empty(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@contextmanager
def _plain(q: Tensor) -> Iterator[None]:
    """Convolutions in the inputs' own dtype, the same result every time."""
    with (
        without_autocast(q),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        yield


def _steps(q: Tensor, v: Tensor) -> Iterator[tuple[slice, slice]]:
    """Batch entries and channels of the values to work on at a time, so many that their lambdas fit."""
    lambdas = math.prod(q.shape[1:-2]) * q.shape[-1]
    return pieces(q.shape[0], v.shape[-1], chunk_size(q) // lambdas)


def _images(v: Tensor, batch: slice, channels: slice) -> Tensor:
    """Some entries and channels of v as images of U channels, [n, U, *size]."""
    return v[batch, ..., channels].movedim((-1, -2), (1, 2)).flatten(0, 1).contiguous()


def _of_positions(lambdas: Tensor, q: Tensor) -> Tensor:
    """[n, K, *size] -> [b, positions, K, channels]."""
    return torch.unflatten(lambdas.flatten(2), 0, (len(q), -1)).movedim(1, -1).transpose(1, 2).contiguous()
