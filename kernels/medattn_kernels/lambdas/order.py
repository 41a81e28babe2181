"""Which order of lambda attention is cheaper: by shape alone. Derived in kernels/README.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from torch import Tensor

from medattn_kernels._launch import padded
from medattn_kernels.lambdas.convolution import is_faster_direct, transform_lengths

# eager on a CPU, in products of a matrix multiplication, fitted to measured ratios
BOX = 5e6  # a box of queries: some twenty operators
ENTRY = 20  # a number by offset or by pair
LAMBDA = 400  # a number of a position's lambda: turned into place, and applied by small products
DOUBLING = 13  # an entry of a transform, per doubling of its length
SPECTRUM = 140  # a product of two entries of spectra
BACKWARD = 2  # times the forward pass, queries first

LARGEST = 2**12  # numbers of a lambda, padded, beside which the Triton kernels have registers for pairs
TILE = 16  # places of a tile of the Triton kernels
MARGIN = 2  # instructions per pair and head over those per pair and channel of the values, with a reserve


@dataclass(frozen=True)
class Shape:
    """What a call is like, per batch entry; rows: of the table, cropped."""

    size: tuple[int, ...]
    rows: tuple[int, ...]
    heads: int
    depths: int
    width: int
    value_width: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor, table: Tensor) -> Shape:
        """Of q [B, *size, H, K], v [B, *size, U, V] and table [*R, U, K]."""
        size, rows = tuple(q.shape[1:-2]), tuple(table.shape[:-2])
        return cls(size, rows, q.shape[-2], v.shape[-2], q.shape[-1], v.shape[-1])


def reach(shape: Shape, sides: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Places that a box of queries sees, and offsets between them, on every axis."""
    windows = [min(n, b + r - 1) for n, b, r in zip(shape.size, sides, shape.rows, strict=True)]
    return windows, [w + b - 1 for w, b in zip(windows, sides, strict=True)]


@lru_cache(1024)
def box_sides(shape: Shape, limit: int) -> tuple[int, ...]:
    """Sides of the boxes of queries: the cheapest whose products by offset stay within a limit, or ones."""
    choices = [[*(2**i for i in range(n.bit_length()) if 2**i < n), n] for n in shape.size]
    fitting = [
        sides
        for sides in product(*choices)
        if math.prod(sides) * shape.heads * shape.depths * math.prod(reach(shape, sides)[1]) <= limit
    ]
    return min(fitting, key=lambda sides: _by_pairs(shape, sides), default=(1,) * len(shape.size))


@lru_cache(1024)
def queries_first(shape: Shape, limit: int, backward: bool) -> bool:
    """Whether `eager` takes the queries first; limit: numbers that it may hold at a time."""
    by_pairs = _by_pairs(shape, box_sides(shape, limit))
    by_lambdas, transforms = _by_lambdas(shape)
    if backward:
        return BACKWARD * by_pairs < by_lambdas + transforms
    return by_pairs < by_lambdas


def queries_first_fused(shape: Shape) -> bool:
    """Whether the Triton kernels do: they differ in what they visit along the last axis only."""
    size, rows = shape.size[-1], shape.rows[-1]
    columns = padded(shape.value_width)
    if padded(shape.width) * columns > LARGEST:
        return False
    by_tile = TILE * -(-min(size, rows + TILE - 1) // TILE) * TILE * -(-size // TILE)
    by_position = size * min(rows, size + min(size, TILE) - 1)
    return MARGIN * shape.heads * by_tile < columns * by_position


def _by_pairs(shape: Shape, sides: tuple[int, ...]) -> float:
    """The forward pass with such boxes: products by offset, then by pair."""
    windows, offsets = (shape.depths * math.prod(counts) for counts in reach(shape, sides))
    boxes = math.prod(-(-n // side) for n, side in zip(shape.size, sides, strict=True))
    queries = math.prod(sides) * shape.heads
    return boxes * (BOX + queries * (offsets * (shape.width + ENTRY) + windows * (shape.value_width + ENTRY)))


def _by_lambdas(shape: Shape) -> tuple[float, float]:
    """The forward pass, and what transforms alone take."""
    numbers = shape.width * shape.value_width
    lengths = transform_lengths(shape.size, shape.rows)
    entries = math.prod(lengths)
    transforms = numbers * entries * (DOUBLING * math.log2(2 * entries) + SPECTRUM * shape.depths)
    if not is_faster_direct(shape.size, shape.rows, lengths):
        return transforms, transforms
    radii = [(n, r // 2) for n, r in zip(shape.size, shape.rows, strict=True)]
    pairs = math.prod(n * (2 * radius + 1) - radius * (radius + 1) for n, radius in radii)
    return numbers * (shape.depths * pairs + LAMBDA * math.prod(shape.size)), transforms
