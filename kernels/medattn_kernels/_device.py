"""Device functions that the Triton kernels share.

Those on volumes take a tensor as (pointer, strides) with the strides of batch, three spatial axes, head and
channel; volumes of one or two axes have leading axes of size 1.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bfloat16 as integers; widening them is exact
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# of float32: three TF32 products on NVIDIA's tensor cores; AMD's matrix cores take float32 as it is
PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32x3")


@triton.jit
def dot(a, b):
    """Matrix product summed in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def exp(x):
    """Triton's own takes four more instructions to keep results below 1e-38."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def unravel(i, shape):
    """Coordinates of a running index in a box, last axis fastest."""
    return i // (shape[1] * shape[2]), (i // shape[2]) % shape[1], i % shape[2]


@triton.jit
def volume(shape):
    """Entries of a box."""
    return shape[0] * shape[1] * shape[2]


@triton.jit
def within(place, size):
    """Which places lie in the volume; negative ones, taken as unsigned, lie beyond its end."""
    return (
        (place[0].to(tl.uint32) < size[0])
        & (place[1].to(tl.uint32) < size[1])
        & (place[2].to(tl.uint32) < size[2])
    )


@triton.jit
def addresses(x, batch, place, head, D: tl.constexpr):
    """Pointers [places, D] to the channels at some places."""
    strides = x[1]
    start = x[0] + batch * strides[0] + head.to(tl.int64) * strides[4]
    along = (
        place[0].to(tl.int64) * strides[1]
        + place[1].to(tl.int64) * strides[2]
        + place[2].to(tl.int64) * strides[3]
    )
    return start + along[:, None] + tl.arange(0, D).to(tl.int64)[None, :] * strides[5]


@triton.jit
def load(x, batch, place, head, inside, width, D: tl.constexpr):
    """Vectors at some places, zeros where there are none; [places, D]."""
    mask = inside[:, None] & (tl.arange(0, D)[None, :] < width)
    return tl.load(addresses(x, batch, place, head, D), mask=mask, other=0.0)


@triton.jit
def store(x, value, batch, place, head, inside, width, D: tl.constexpr):
    """Write vectors to the places that exist."""
    mask = inside[:, None] & (tl.arange(0, D)[None, :] < width)
    tl.store(addresses(x, batch, place, head, D), value.to(x[0].dtype.element_ty), mask=mask)


@triton.jit
def add(a, b):
    """Sum by axis."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]
