"""Cross-covariance attention in plain torch, a few positions at a time, without normalised copies."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from medattn_kernels._chunk import chunk_size, pieces
from medattn_kernels._select import without_autocast
from medattn_kernels.crosscov.operator import EPS, empty_gradients, empty_results, register

IN_PLACE = 2**16  # numbers of a head from which its product is written where it belongs, one call per head


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
    with without_autocast(q):
        for batch, rows in _slabs(q):
            queries, keys = (_matrices(x[batch, rows], norm.dtype) for x in (q, k))
            norm[batch, :, 0] += queries.square().sum(-2)
            norm[batch, :, 1] += keys.square().sum(-2)
            _add_products(cosine[batch], queries, keys)
        norm.sqrt_()
        size = norm.clamp_min(EPS)
        cosine /= size[:, :, 0, :, None] * size[:, :, 1, None]
        attention = _attention_of(cosine, temperature)
        for batch, rows in _slabs(q):
            values = _matrices(v[batch, rows], norm.dtype)
            _write(out[batch, rows], values, attention[batch].mT)
    return out, cosine, norm


def run_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, cosine: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the temperature, from the statistics that `run_forward` found."""
    dq, dk, dv, dtemperature = empty_gradients(q, k, v, temperature)
    attention, dattention = _attention_of(cosine, temperature), torch.zeros_like(cosine)
    with without_autocast(q):
        for batch, rows in _slabs(q):
            gradient, values = (_matrices(x[batch, rows], norm.dtype) for x in (dout, v))
            _add_products(dattention[batch], gradient, values)
            _write(dv[batch, rows], gradient, attention[batch])
        dlogits = attention * (dattention - (attention * dattention).sum(-1, keepdim=True))
        dtemperature.copy_((dlogits * cosine).sum((0, 2, 3)))
        by_query, by_key, dproduct = _through_norms(dlogits, cosine, norm, temperature)
        for batch, rows in _slabs(q):
            queries, keys = (_matrices(x[batch, rows], norm.dtype) for x in (q, k))
            _write(dq[batch, rows], keys, dproduct[batch].mT, queries, -by_query[batch, :, None])
            _write(dk[batch, rows], queries, dproduct[batch], keys, -by_key[batch, :, None])
    return dq, dk, dv, dtemperature


# operators to torch: its autograd would keep normalised copies of q and k, and torch.compile unroll the loops
_attention = register("cross_covariance_attention_eager", run_forward, run_backward)


def _slabs(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Some entries of the batch, or some places along the first axis of one, at a time."""
    return pieces(x.shape[0], x.shape[1], chunk_size(x) // math.prod(x.shape[2:]))


def _matrices(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A slab [b, *rows, H, D] in the dtype of the sums, as matrices [b, H, rows, D]: of float32 a view."""
    return x.to(dtype).flatten(1, -3).transpose(1, 2)


def _add_products(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums [b, H, D, D] += left' right, of [b, H, rows, D]."""
    for total, x, y in _calls(sums, left.mT, right):
        total += torch.bmm(x, y)


def _write(slab: Tensor, rows: Tensor, by: Tensor, *plus: Tensor) -> None:
    """Fill a slab [b, *rows, H, D] with rows [b, H, rows, D] @ by [b, H, D, D], plus a product by elements.

    Heads lie side by side in the slab, and there bmm works on one after the other: of long ones that is
    the fastest, while short ones cost less in one call and a pass over its result.
    """
    in_place = slab.dtype == rows.dtype and math.prod(rows.shape[-2:]) >= IN_PLACE
    for room, x, y, *factors in _calls(slab.flatten(1, -3).transpose(1, 2), rows, by, *plus):
        if in_place:
            if factors:
                torch.mul(*factors, out=room)
            room.baddbmm_(x, y, beta=float(bool(factors)))
        elif factors:
            torch.addcmul(torch.bmm(x, y), *factors, out=room)
        else:
            room.copy_(torch.bmm(x, y))


def _calls(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [b, H, ., .] entry by entry, or head by head where these are fewer.

    bmm takes one axis of matrices, of any distance between their rows; to make one of two, matmul copies.
    """
    entries, heads = tensors[0].shape[:2]
    return zip(*(x.unbind(int(heads < entries)) for x in tensors), strict=True)


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
