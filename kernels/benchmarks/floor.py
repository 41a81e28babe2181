"""The least time that an H200 needs for a problem, from kernels/README.md: bytes, products, exponentials."""

from __future__ import annotations

from shapes import Entry

BYTES_PER_S = 4.3e12  # what a large copy reaches, read and written
FLOPS_PER_S = 790e12  # what a large bf16 product reaches
EXPONENTIALS_PER_S = 4.2e12
BYTES = 2  # of a bfloat16


def floor_seconds(entry: Entry, backward: bool) -> float:
    """Of the forward pass, or of the backward pass alone; the largest of the three terms.

    Every input is read and every result written once. Tables are too small to count, and for block attention
    so are the position terms: they need a product per query and place along an axis, not per pair.
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
    return max(
        BYTES * entry.queries * moved / BYTES_PER_S,
        2 * entry.pairs * products / FLOPS_PER_S,
        entry.pairs / EXPONENTIALS_PER_S,
    )


def known_for(device_name: str) -> bool:
    """Whether the rates above are that device's."""
    return "H200" in device_name
