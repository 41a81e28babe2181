"""The least work of a problem, from kernels/README.md, and the least time that an H200 needs for it."""

from __future__ import annotations

from dataclasses import dataclass

from shapes import Entry

BYTES_PER_S = 4.3e12  # what a large copy reaches, read and written
FLOPS_PER_S = 790e12  # what a large bf16 product reaches
EXPONENTIALS_PER_S = 4.2e12


@dataclass(frozen=True)
class Work:
    """What no implementation can do without: every input is read and every result written once."""

    bytes: int
    flops: int
    exponentials: int


def work(entry: Entry, backward: bool) -> Work:
    """Of the forward pass, or of the backward pass alone. Tables are too small to count as bytes."""
    if entry.operator == "lambda":
        return _lambda(entry, backward)
    return _crosscov(entry, backward) if entry.operator == "crosscov" else _softmax(entry, backward)


def floor_seconds(entry: Entry, backward: bool) -> float:
    """On an H200: the largest of the three terms."""
    needed = work(entry, backward)
    return max(
        needed.bytes / BYTES_PER_S, needed.flops / FLOPS_PER_S, needed.exponentials / EXPONENTIALS_PER_S
    )


def known_for(device_name: str) -> bool:
    """Whether the rates above are that device's."""
    return "H200" in device_name


def _softmax(entry: Entry, backward: bool) -> Work:
    """Of axial and block attention. The position terms of block attention need a product per query and place
    along an axis, not per pair, and are too small to count.
    """
    d, e = entry.width, entry.value_width
    logit_tables = sum(term in entry.terms for term in ("rel_q", "rel_k"))
    value_table = "rel_v" in entry.terms
    if backward:
        moved = 4 * d + 4 * e  # q, k, v, out, dout in; dq, dk, dv out
        products = 3 * d + 2 * e + 3 * d * logit_tables + 2 * e * value_table
    else:
        moved = 2 * d + 2 * e
        products = d + e + d * logit_tables + e * value_table
    return Work(_bytes(entry, entry.queries * moved), 2 * entry.pairs * products, entry.pairs)


def _lambda(entry: Entry, backward: bool) -> Work:
    """Lambdas first. N T of the README are here the pairs that lie inside the volume."""
    u, matrix = entry.depth, entry.width * entry.value_width
    moved = entry.positions * (entry.heads + u) * (entry.width + entry.value_width)
    content = entry.positions * u * matrix
    exponentials = entry.positions * u * entry.width
    if backward:
        return Work(_bytes(entry, 2 * moved), 6 * entry.pairs * u * matrix + 6 * content, exponentials)
    return Work(_bytes(entry, moved), 2 * entry.pairs * u * matrix + 4 * content, exponentials)


def _crosscov(entry: Entry, backward: bool) -> Work:
    """Four tensors forward, seven backward; the softmax is over a matrix per head."""
    d = entry.width
    tensors, products = (7, 8) if backward else (4, 4)
    moved = _bytes(entry, tensors * entry.queries * d)
    return Work(moved, products * entry.queries * d**2, entry.batch * entry.heads * d**2)


def _bytes(entry: Entry, numbers: int) -> int:
    return entry.dtype.itemsize * numbers
