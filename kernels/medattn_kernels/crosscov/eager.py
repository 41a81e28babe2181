"""Cross-covariance attention in plain torch, a few positions at a time, without normalised copies."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from medattn_kernels._chunk import chunk_size, pieces
from medattn_kernels.crosscov.operator import EPS, empty_gradients, empty_results, register


def cross_covariance_attention(q: Tensor, k: Tensor, v: Tensor, *, temperature: Tensor) -> Tensor:
    """`medattn_kernels.cross_covariance_attention` on any device, differentiable once."""
    out: Tensor = _attention(q, k, v, temperature)[0]
    return out


def run_forward(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, cosines [B, H, D, D] of the channels of q and k, and their norms [B, H, 2, D].

    Products are summed in float32 at least, whatever the inputs' dtype.
    """
    out, cosine, norm = empty_results(q, k, v, temperature)
    cosine.zero_()
    norm.zero_()
    with torch.autocast(q.device.type, enabled=False):
        for batch, rows in _slabs(q):
            queries, keys = (_channels(x[batch, rows], norm.dtype) for x in (q, k))
            cosine[batch] += queries @ keys.mT
            norm[batch, :, 0] += queries.square().sum(-1)
            norm[batch, :, 1] += keys.square().sum(-1)
        norm.sqrt_()
        size = norm.clamp_min(EPS)
        cosine /= size[:, :, 0, :, None] * size[:, :, 1, None]
        attention = _attention_of(cosine, temperature)
        for batch, rows in _slabs(q):
            _write(out[batch, rows], attention[batch] @ _channels(v[batch, rows], norm.dtype))
    return out, cosine, norm


def run_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, cosine: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the temperature, from the statistics that `run_forward` found."""
    dq, dk, dv, dtemperature = empty_gradients(q, k, v, temperature)
    attention, dattention = _attention_of(cosine, temperature), torch.zeros_like(cosine)
    with torch.autocast(q.device.type, enabled=False):
        for batch, rows in _slabs(q):
            gradient, values = (_channels(x[batch, rows], norm.dtype) for x in (dout, v))
            dattention[batch] += gradient @ values.mT
            _write(dv[batch, rows], attention[batch].mT @ gradient)
        dlogits = attention * (dattention - (attention * dattention).sum(-1, keepdim=True))
        dtemperature.copy_((dlogits * cosine).sum((0, 2, 3)))
        by_query, by_key, dproduct = _through_norms(dlogits, cosine, norm, temperature)
        for batch, rows in _slabs(q):
            queries, keys = (_channels(x[batch, rows], norm.dtype) for x in (q, k))
            _write(dq[batch, rows], dproduct[batch] @ keys - by_query[batch, ..., None] * queries)
            _write(dk[batch, rows], dproduct[batch].mT @ queries - by_key[batch, ..., None] * keys)
    return dq, dk, dv, dtemperature


# operators to torch: its autograd would keep normalised copies of q and k, and torch.compile unroll the loops
_attention = register("cross_covariance_attention_eager", run_forward, run_backward)


def _slabs(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Some entries of the batch, or some places along the first axis of one, at a time."""
    return pieces(x.shape[0], x.shape[1], chunk_size(x) // math.prod(x.shape[2:]))


def _channels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A slab [b, *rows, H, D] in the dtype of the sums, channel by channel: [b, H, D, rows]."""
    return x.to(dtype).flatten(1, -3).permute(0, 2, 3, 1)


def _write(x: Tensor, channels: Tensor) -> None:
    """The way back of `_channels`: fill a slab."""
    x.copy_(channels.permute(0, 3, 1, 2).reshape(x.shape))


def _attention_of(cosine: Tensor, temperature: Tensor) -> Tensor:
    return (temperature.to(cosine.dtype)[:, None, None] * cosine).softmax(-1)


def _through_norms(
    dlogits: Tensor, cosine: Tensor, norm: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a channel of q, of k [B, H, D] takes from its own gradient, and the gradient of q'k [B, H, D, D].

    A channel that is no longer than `EPS` is divided by a constant and takes nothing.
    """
    dcosine = temperature.to(cosine.dtype)[:, None, None] * dlogits
    size = norm.clamp_min(EPS)
    along = dcosine * cosine
    shrink = torch.stack([along.sum(-1), along.sum(-2)], 2) / size.square()
    by_query, by_key = shrink.masked_fill_(norm < EPS, 0.0).unbind(2)
    return by_query, by_key, dcosine / (size[:, :, 0, :, None] * size[:, :, 1, None])
