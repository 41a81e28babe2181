"""Cross-covariance attention through Triton: how a call is cut into programs, and the launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from medattn_kernels._launch import padded
from medattn_kernels.crosscov.operator import EPS, empty_gradients, empty_results, register

Strides = tuple[int | None, ...]

CHANNELS = 64  # of the heads that one program works on together: 128 bytes of bfloat16 per position
PARTS = 528  # of a head's positions at most, each with its own sums: four per multiprocessor of an H200
SHARE = 16  # positions per part and channel at least: sums are then an eighth of what they are the sums of
TILE = 64  # positions, half of it where one head fills more than CHANNELS
SUMS = 4096  # numbers to add up at a time


def cross_covariance_attention(q: Tensor, k: Tensor, v: Tensor, *, temperature: Tensor) -> Tensor:
    """`medattn_kernels.cross_covariance_attention` in float32, bfloat16 or float16, differentiable once."""
    out: Tensor = _attention(q, k, v, temperature)[0]
    return out


def refusal(q: Tensor) -> str:
    """Why the kernels cannot take these heads; empty if they can."""
    if q.dtype != torch.float32 or q.shape[-1] <= CHANNELS:
        return ""
    return f"takes float32 heads of at most {CHANNELS}, got {q.shape[-1]}"  # matrices fill shared memory


def run_forward(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, cosines [B, H, D, D] of the channels of q and k, and their norms [B, H, 2, D]."""
    from medattn_kernels.crosscov import kernel

    out, cosine, norm = empty_results(q, k, v, temperature)
    if q.numel():
        launch = _Launch(q)
        sums = launch.sums(q.shape[-1] + 2)
        launch.stream(kernel.forward_products, (q, k), sums)
        launch.rows(kernel.forward_cosines, sums, cosine, norm, EPS)
        launch.stream(kernel.forward_values, (v, out), temperature, cosine)
    return out, cosine, norm


def run_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, cosine: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the temperature, from the statistics that `run_forward` found."""
    from medattn_kernels.crosscov import kernel

    dq, dk, dv, dtemperature = empty_gradients(q, k, v, temperature)
    if not q.numel():
        return dq, dk, dv, dtemperature.zero_()
    launch = _Launch(q)
    sums = launch.sums(q.shape[-1])
    launch.stream(kernel.backward_values, (dout, v, dv), temperature, cosine, sums)
    dlogits, by_row = torch.empty_like(cosine), torch.empty_like(norm[:, :, 0])
    launch.rows(kernel.backward_logits, sums, cosine, temperature, dlogits, by_row)
    statistics = (temperature, cosine, norm, dlogits)
    launch.stream(kernel.backward_products, (q, k, dq, dk), *statistics, EPS, num_warps=8)
    return dq, dk, dv, by_row.sum((0, 2), dtype=torch.float64).to(temperature.dtype)


_attention = register("cross_covariance_attention", run_forward, run_backward)


class _Launch:
    """How one call is cut, and the arguments that its kernels share.

    A program takes some heads and a part of the positions of one entry of the batch. The number of parts
    depends on the positions and the head size only, so that no result depends on what else is in the batch.
    """

    def __init__(self, q: Tensor) -> None:
        self.q, self.heads, self.width = q, q.shape[-2], q.shape[-1]
        self.count = math.prod(q.shape[1:-2])
        groups = -(-self.heads // max(1, CHANNELS // self.width))
        together = -(-self.heads // groups)
        columns = padded(together * self.width)
        self.parts = max(1, min(PARTS, self.count // max(TILE, SHARE * self.width)))
        self.programs = len(q) * self.parts * groups
        wide = columns > CHANNELS
        self.options = {
            "D": self.width,
            "G": together,
            "W": columns,
            "T": TILE // 2 if wide else TILE,
            "num_warps": 8 if wide else 4,
            "num_stages": 3 if q.element_size() == 2 else 2,
        }

    def stream(self, kernel: Any, tensors: tuple[Tensor, ...], *others: Any, **options: int) -> None:
        """Launch a kernel that walks over the positions of some tensors [B, *size, H, D]."""
        inner, strides = _positions(tensors)
        pairs = zip(tensors, strides, strict=True)
        shape = (self.count, inner, self.heads, self.parts)
        with torch.cuda.device_of(self.q):  # type: ignore[no-untyped-call]
            kernel[(self.programs,)](*pairs, *others, *shape, **self.options | options)

    def rows(self, kernel: Any, *arguments: Any) -> None:
        """Launch a kernel with a program per row of the matrices [D, D]."""
        channels = 1 << (self.width - 1).bit_length()
        options = {"D": self.width, "W": channels, "P": max(1, SUMS // channels), "num_warps": 4}
        with torch.cuda.device_of(self.q):  # type: ignore[no-untyped-call]
            kernel[(len(self.q) * self.heads * self.width,)](*arguments, self.heads, self.parts, **options)

    def sums(self, rows: int) -> Tensor:
        """Room for each part's sums, [B, H, parts, rows, D]."""
        shape = (len(self.q), self.heads, self.parts, rows, self.width)
        return self.q.new_empty(shape, dtype=torch.float32)


def _positions(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int] | None, list[Strides]]:
    """Lengths of the last two spatial axes, and strides as the kernels take them.

    Axes that all tensors walk through at one stride are joined; if one is left, the lengths are None.
    """
    axes: list[tuple[int, list[int]]] = []
    size = tensors[0].shape[1:-2]
    for n, steps in zip(size, zip(*(x.stride()[1:-2] for x in tensors), strict=True), strict=True):
        if n == 1 and len(size) > 1:
            continue
        if axes and all(outer == n * step for outer, step in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = (axes[-1][0] * n, list(steps))
        else:
            axes.append((n, list(steps)))
    axes = [(1, [0] * len(tensors))] * (3 - len(axes)) + axes
    along = zip(*(steps for _, steps in axes), strict=True)
    strides = [(x.stride(0), *steps, *_columns(x)) for x, steps in zip(tensors, along, strict=True)]
    inner = (axes[1][0], axes[2][0])
    return (None if axes[1][0] == 1 and axes[0][0] == 1 else inner), strides


def _columns(x: Tensor) -> tuple[int | None, int]:
    """Strides of heads and channels; None for heads that lie side by side."""
    head, channel = x.stride()[-2:]
    return (None if head == x.shape[-1] * channel else head), channel
