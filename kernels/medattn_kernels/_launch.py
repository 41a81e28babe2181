"""What the hosts of the Triton kernels share: sizes of tiles, and tensors as the kernels take them."""

from __future__ import annotations

from torch import Tensor

Pointer = tuple[Tensor, tuple[int, ...]]


def padded(n: int) -> int:
    """The next power of two that a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())


def at(x: Tensor) -> Pointer:
    """[B, *size, H, D] and its strides: batch, three spatial axes, absent ones first, head, channel."""
    first, *spatial, head, channel = x.stride()
    return x, (first, *[0] * (3 - len(spatial)), *spatial, head, channel)
