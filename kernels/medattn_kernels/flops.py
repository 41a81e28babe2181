"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators, which are opaque to it.

Counted are the products that the definitions in kernels/README.md need, two flops for a multiplication and
its addition, over the pairs that exist: nothing that an implementation pads, masks or computes twice. As in
torch's own formulas, sums, norms and exponentials are left out.

A formula takes what the torch operator takes, shapes in the place of tensors and None for what is not there.
A backward operator takes the gradients of the outputs, then the same. Each product a.b of the forward pass
has two in the backward pass, one for the gradient of a and one for that of b, so it counts twice; what is
computed again on the way does not count.

Importing this module registers the formulas. The package does not import it, since torch's counter imports
Triton, a third of a second for those who count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

import medattn_kernels  # noqa: F401  its operators are known to torch from here on
from medattn_kernels.axial.moments import pairs_seen
from medattn_kernels.block.tiling import Tiling, cut

Shape = Sequence[int]
Formula = Callable[..., int]


def axial_attention(
    q: Shape,
    k: Shape,
    v: Shape,
    by_query: Shape | None,
    by_key: Shape | None,
    by_value: Shape | None,
    *rest: Any,
) -> int:
    """Content and each table that is there, over the pairs that `span` leaves; rest ends with numbers."""
    axis, span, _, _ = rest[-4:]
    length: int = q[1 + axis]
    pairs = prod(q[:-1]) // length * pairs_seen(length, span or None)
    keys = 1 + (by_query is not None) + (by_key is not None)
    values = 1 + (by_value is not None)
    return 2 * pairs * (keys * q[-1] + values * v[-1])


def block_attention(
    q: Shape, k: Shape, v: Shape, rel0: Shape | None, rel1: Shape | None, rel2: Shape | None, *rest: Any
) -> int:
    """Content over pairs; q.rel once per query and place along an axis; rest ends with numbers."""
    block, halo, stride, _, _, masked = rest[-6:]
    sides = zip(halo[::2], halo[1::2], strict=True)
    tiles = [cut(*axis, masked) for axis in zip(q[1:-2], block, sides, stride, strict=True)]
    rows = q[0] * q[-2]
    content = rows * _window_pairs(tiles, masked) * (q[-1] + v[-1])
    if rel0 is None and rel1 is None and rel2 is None:
        return 2 * content
    queries = [-(-t.size // t.stride) for t in tiles]
    places = sum(
        prod(queries[:axis]) * _pairs_along(t, masked) * prod(queries[axis + 1 :])
        for axis, t in enumerate(tiles)
    )
    return 2 * (content + rows * places * q[-1])


def block_attention_eager(q: Shape, k: Shape, v: Shape, bias: Shape | None, cuts: Shape, masked: bool) -> int:
    """Content only: this operator gets q.rel ready, from products that torch counts by itself."""
    step = len(fields(Tiling))
    tiles = [Tiling(*cuts[n : n + step]) for n in range(0, len(cuts), step)]
    return 2 * q[0] * q[-3] * _window_pairs(tiles, masked) * (k[-1] + v[-1])


def lambda_attention(q: Shape, k: Shape, v: Shape, table: Shape | None, *statistics: Shape) -> int:
    """Both lambdas: the content's is one product of keys and values."""
    return 2 * prod(k) * v[-1] + lambda_attention_eager(q, k, v, table)


def lambda_attention_eager(q: Shape, content: Shape, v: Shape, table: Shape | None) -> int:
    """All but the content lambda, which this operator gets ready, from a product that torch counts by itself.

    Of the two orders, lambdas first or queries first, the one with fewer flops for these widths.
    """
    heads, width = q[-2:]
    depth, value_width = v[-2:]
    applied = 2 * prod(q) * value_width
    if table is None:
        return applied
    per_pair = min(width * value_width, heads * (width + value_width))
    # position and offset, the position at that offset inside the volume
    pairs = prod(pairs_seen(n, rows) for n, rows in zip(q[1:-2], table[:-2], strict=True))
    return applied + 2 * q[0] * pairs * depth * per_pair


def cross_covariance_attention(q: Shape, *rest: Any) -> int:
    """Products of channels over all positions, for the weights and for the output."""
    return 4 * prod(q) * q[-1]


# by operator: its formula, and how many gradients its backward operator takes first
FORMULAS: dict[str, tuple[Formula, int]] = {
    "axial_attention": (axial_attention, 2),
    "axial_attention_eager": (axial_attention, 2),
    "block_attention": (block_attention, 1),
    "block_attention_eager": (block_attention_eager, 1),
    "lambda_attention": (lambda_attention, 1),
    "lambda_attention_eager": (lambda_attention_eager, 1),
    "cross_covariance_attention": (cross_covariance_attention, 1),
    "cross_covariance_attention_eager": (cross_covariance_attention, 1),
}


def _forward(formula: Formula) -> Formula:
    return lambda *shapes, out_shape: formula(*shapes)


def _backward(formula: Formula, gradients: int) -> Formula:
    return lambda *shapes, out_shape: 2 * formula(*shapes[gradients:])


def _window_pairs(tiles: Sequence[Tiling], masked: bool) -> int:
    """Pairs of a query and a key of its window, for one head."""
    return prod(_pairs_along(t, masked) for t in tiles)


def _pairs_along(t: Tiling, masked: bool) -> int:
    """The same along one axis; keys outside the volume count unless they are masked."""
    pairs = 0
    for start in range(0, t.size, t.block):
        queries = -(-min(t.block, t.size - start) // t.stride)
        first = start - t.before
        keys = min(first + t.window, t.size) - max(first, 0) if masked else t.window
        pairs += queries * keys
    return pairs


def _register() -> None:
    for name, (formula, gradients) in FORMULAS.items():
        for suffix, function in (("", _forward(formula)), ("_backward", _backward(formula, gradients))):
            operator = getattr(torch.ops.medattn, name + suffix)
            if operator not in flop_registry:
                register_flop_formula(operator)(function)


_register()
