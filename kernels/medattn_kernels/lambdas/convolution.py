"""The position lambdas as a convolution of the values with the table, and the way back of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FASTER_DIRECT = 64  # products that a convolution does while a transform handles an entry, per doubling


class Convolution:
    """A table [*R, U, K], none of its axes longer than 2 size - 1, for volumes of one size.

    Small tables are convolved directly, others by Fourier transforms. Gradients always take the transforms:
    PyTorch's convolutions are slow where they have few channels to write, as U is, and add up thousands of
    products one after the other, which costs float32 more than a digit.
    """

    def __init__(self, table: Tensor, size: Sequence[int]) -> None:
        self.size, self.rows = list(size), list(table.shape[: len(size)])
        self.lengths = transform_lengths(size, self.rows)
        self.dtype = torch.promote_types(table.dtype, torch.float32)
        self.kernel = table.movedim((-1, -2), (0, 1)).contiguous()  # [K, U, *R]
        self.direct = is_faster_direct(self.size, self.rows, self.lengths)
        self.spectrum = self.kernel if self.direct else self._transform(self.kernel)

    def lambdas(self, x: Tensor) -> Tensor:
        """sum_(o, u) table[o, u, k] x[n + o, u] for x [b, U, *size]; [b, K, *size]."""
        if self.direct:
            ones, margins = [1] * len(self.size), [rows // 2 for rows in self.rows]
            return torch.convolution(x, self.kernel, None, ones, margins, ones, False, [0] * len(ones), 1)
        product = torch.einsum("bu...,ku...->bk...", self._transform(x), self.spectrum.conj())
        return self._back(product, -1, self.size).to(x.dtype)

    def prepare_gradients(self) -> None:
        """To be called once before `backward`."""
        if self.direct:
            self.spectrum = self._transform(self.kernel)
        self.gradient = torch.zeros_like(self.spectrum)

    def backward(self, x: Tensor, g: Tensor) -> Tensor:
        """The gradient of x [b, U, *size] for that of its lambdas [b, K, *size]; the table's is added up."""
        values, gradient = self._transform(x), self._transform(g)
        self.gradient += torch.einsum("bu...,bk...->ku...", values, gradient.conj())
        product = torch.einsum("bk...,ku...->bu...", gradient, self.spectrum)
        return self._back(product, 1, self.size).to(x.dtype)

    def table_gradient(self) -> Tensor:
        """[*R, U, K], summed over all calls of `backward`."""
        return self._back(self.gradient, -1, self.rows).movedim((0, 1), (-1, -2))

    def _transform(self, x: Tensor) -> Tensor:
        spectrum: Tensor = torch.fft.rfftn(x.to(self.dtype), s=self.lengths)
        return spectrum

    def _back(self, spectrum: Tensor, sign: int, size: list[int]) -> Tensor:
        """The entries from sign * (R - 1) / 2 on, `size` of them: offset 0 is not the table's first entry.

        Volumes were extended by half a table, so that nothing that wraps around is among them.
        """
        x: Tensor = torch.fft.irfftn(spectrum, s=self.lengths)
        for axis, (n, rows) in enumerate(zip(size, self.rows, strict=True), 2):
            x = x.roll(-sign * (rows // 2), axis).narrow(axis, 0, n)
        return x


def transform_lengths(size: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Entries of the transforms along each axis, half a table more than the volume has."""
    return [_fast_length(n + r // 2) for n, r in zip(size, rows, strict=True)]


def is_faster_direct(size: Sequence[int], rows: Sequence[int], lengths: Sequence[int]) -> bool:
    """By the number of products, as measured on one core with AVX-512."""
    entries = math.prod(lengths)
    return math.prod(size) * math.prod(rows) <= FASTER_DIRECT * entries * math.log2(2 * entries)


def _fast_length(n: int) -> int:
    """The next number without prime factors above 5."""
    rest = n
    for factor in (2, 3, 5):
        while rest % factor == 0:
            rest //= factor
    return n if rest == 1 else _fast_length(n + 1)
