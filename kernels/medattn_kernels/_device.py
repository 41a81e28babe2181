"""Device functions that the Triton kernels share."""

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
