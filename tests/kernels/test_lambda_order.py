"""Which order of lambda attention is taken: by shape, and as the kernels' README says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medattn_kernels._chunk import LOGITS_CPU
from medattn_kernels.lambdas.order import Shape, box_sides, queries_first, queries_first_fused, reach


def _shape(size: tuple[int, ...], scope: int = 0, *, heads: int = 4, value_width: int = 32) -> Shape:
    """K = 16 and U = 1; scope: rows of the table on every axis, 0 for all offsets."""
    rows = tuple(min(scope, 2 * n - 1) if scope else 2 * n - 1 for n in size)
    return Shape(size, rows, heads, 1, 16, value_width)


@pytest.mark.parametrize(
    ("size", "scope", "forward", "backward"),
    [
        pytest.param((256,), 0, 8, 8, id="256-global"),
        pytest.param((1024,), 0, 2, 2, id="1024-global"),
        pytest.param((2048,), 0, 1, 1, id="2048-global"),
        pytest.param((4096,), 0, 0, 0, id="4096-global"),
        pytest.param((16, 16), 0, 4, 8, id="16x16-global"),
        pytest.param((32, 32), 0, 4, 4, id="32x32-global"),
        pytest.param((64, 64), 0, 1, 1, id="64x64-global"),
        pytest.param((32, 32), 23, 2, 2, id="32x32-scope-23"),
        pytest.param((64, 64), 23, 2, 2, id="64x64-scope-23"),
        pytest.param((8, 8, 8), 0, 4, 8, id="8x8x8-global"),
        pytest.param((16, 16, 16), 7, 1, 1, id="16x16x16-scope-7"),
        pytest.param((32, 32, 32), 7, 2, 1, id="32x32x32-scope-7"),
    ],
)
def test_eager_takes_the_queries_first_up_to_so_many_heads(
    size: tuple[int, ...], scope: int, forward: int, backward: int
) -> None:
    """Of 1, 2, 4 and 8 heads with K = 16, V = 32, the largest number; 0 if none."""
    for expected, is_backward in ((forward, False), (backward, True)):
        chosen = [
            h for h in (1, 2, 4, 8) if queries_first(_shape(size, scope, heads=h), LOGITS_CPU, is_backward)
        ]
        assert max(chosen, default=0) == expected
        assert chosen == [h for h in (1, 2, 4, 8) if h <= expected]


@pytest.mark.parametrize(
    ("size", "scope", "value_width", "most"),
    [
        pytest.param((64, 64), 0, 64, 39, id="64x64-global"),
        pytest.param((14, 14), 0, 64, 47, id="14x14-global"),
        pytest.param((64, 64), 23, 64, 15, id="64x64-scope-23"),
        pytest.param((96, 96, 96), 7, 32, 3, id="96x96x96-scope-7"),
        pytest.param((8, 8, 8), 0, 32, 7, id="8x8x8-global"),
    ],
)
def test_triton_takes_the_queries_first_up_to_so_many_heads(
    size: tuple[int, ...], scope: int, value_width: int, most: int
) -> None:
    for heads in range(1, 64):
        shape = _shape(size, scope, heads=heads, value_width=value_width)
        assert queries_first_fused(shape) == (heads <= most)


@given(
    size=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    radii=st.lists(st.integers(0, 20), min_size=3, max_size=3),
    counts=st.tuples(st.integers(1, 9), st.integers(1, 4)),
    limit=st.sampled_from([1, 1000, 10**5, 2**19]),
)
def test_boxes_fit_the_volume_and_what_may_be_held(
    size: list[int], radii: list[int], counts: tuple[int, int], limit: int
) -> None:
    """Or hold one query where even that is too much."""
    rows = tuple(min(2 * r + 1, 2 * n - 1) for r, n in zip(radii, size, strict=False))
    shape = Shape(tuple(size), rows, *counts, 16, 32)
    sides = box_sides(shape, limit)
    assert all(1 <= side <= n for side, n in zip(sides, size, strict=True))
    held = math.prod(sides) * math.prod(counts) * math.prod(reach(shape, sides)[1])
    assert held <= limit or math.prod(sides) == 1


@given(heads=st.integers(1, 30), value_width=st.integers(1, 200))
def test_more_heads_never_speak_for_queries_first(heads: int, value_width: int) -> None:
    """Lambdas are shared by the heads, pairs are not."""
    shape = _shape((20, 24), 9, heads=heads, value_width=value_width)
    more = replace(shape, heads=heads + 1)
    assert queries_first_fused(shape) >= queries_first_fused(more)
