"""Flop formulas: against torch's count of the specification, and against pairs counted one by one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from medattn.networks import create
from medattn_kernels import axial, block, crosscov, lambdas
from medattn_kernels.flops import FORMULAS

BATCH, HEADS, KEY, VALUE, DEPTH = 2, 3, 5, 7, 2
Shapes = dict[str, tuple[int, ...]]

OPERATORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "axial": (
        axial.IMPLEMENTATIONS,
        {"rel_q": None, "rel_k": None, "rel_v": None, "gain": None, "span": None, "scale": 1.0}
        | {"separate": False},
    ),
    "block": (block.IMPLEMENTATIONS, {"rel": None, "bias": None, "scale": 1.0, "masked": True}),
    "lambda": (lambdas.IMPLEMENTATIONS, {"table": None}),
    "crosscov": (crosscov.IMPLEMENTATIONS, {}),
}
OPAQUE = pytest.mark.parametrize("impl", ["eager", "triton"])


def _count(operator: str, impl: Any, shapes: Shapes, rel: Sequence[int] | None = None, **options: Any) -> Any:
    """Flops that torch counts (forward, backward) with gradients for all inputs; rel: rows of each table.

    Only naive gets memory: fake tensors do for operators, Triton's on a CPU included.
    """
    implementations, defaults = OPERATORS[operator]
    run = implementations[impl]
    with nullcontext() if impl == "naive" else FakeTensorMode():
        inputs: dict[str, Any] = {n: torch.randn(shape, requires_grad=True) for n, shape in shapes.items()}
        if rel is not None:
            inputs["rel"] = tuple(torch.randn(rows, KEY, requires_grad=True) for rows in rel)
        with FlopCounterMode(display=False) as counter:
            out = run(**defaults | inputs | options)
            forward = counter.get_total_flops()
            parts = out if isinstance(out, tuple) else (out,)
            torch.stack([part.sum() for part in parts]).sum().backward()  # type: ignore[no-untyped-call]
    return forward, counter.get_total_flops() - forward


def _qkv(size: Sequence[int]) -> Shapes:
    shape = BATCH, *size, HEADS
    return {"q": (*shape, KEY), "k": (*shape, KEY), "v": (*shape, VALUE)}


def _lambda_shapes(size: Sequence[int], heads: int, rows: Sequence[int] | None) -> Shapes:
    shapes = {"q": (BATCH, *size, heads, KEY), "k": (BATCH, *size, DEPTH, KEY)}
    shapes |= {"v": (BATCH, *size, DEPTH, VALUE)}
    return shapes if rows is None else shapes | {"table": (*rows, DEPTH, KEY)}


def _volume(size: Sequence[int]) -> list[tuple[int, ...]]:
    return list(product(*map(range, size)))


@OPAQUE
@pytest.mark.parametrize(
    ("tables", "options"),
    [
        pytest.param((), {}, id="content"),
        pytest.param(("rel_q",), {}, id="rel_q"),
        pytest.param(("rel_k",), {}, id="rel_k"),
        pytest.param(("rel_v",), {}, id="rel_v"),
        pytest.param(("rel_q", "rel_k", "rel_v"), {}, id="all"),
        pytest.param(("rel_q", "rel_k", "rel_v"), {"separate": True}, id="separate"),
    ],
)
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize(("size", "axis"), [((11,), 0), ((7, 5), 0), ((3, 1, 5), 2), ((3, 7, 5), 1)], ids=str)
def test_axial_attention_counts_the_products_of_the_specification(
    size: tuple[int, ...], axis: int, gain: bool, tables: tuple[str, ...], options: dict[str, Any], impl: str
) -> None:
    """Forward and backward; naive does no more than the definition on lines longer than one."""
    shapes = _qkv(size) | {name: (5, VALUE if name == "rel_v" else KEY) for name in tables}
    counts, expected = (
        _count("axial", name, shapes | ({"gain": (3, HEADS)} if gain else {}), axis=axis, **options)
        for name in (impl, "naive")
    )
    assert counts == expected
    assert counts[1] == 2 * counts[0]


@OPAQUE
@pytest.mark.parametrize("span", [1, 3, 7, 99])
def test_axial_attention_counts_pairs_within_the_span_only(span: int, impl: str) -> None:
    """One by one along a line of 7, on 5 lines."""
    pairs = 5 * sum(abs(i - j) <= span // 2 for i in range(7) for j in range(7))
    expected = 2 * BATCH * HEADS * pairs * (KEY + VALUE)
    assert _count("axial", impl, _qkv((7, 5)), axis=0, span=span) == (expected, 2 * expected)


WINDOWS = [
    pytest.param((11,), (4,), ((2, 1),), (1,), id="1d-ragged"),
    pytest.param((7, 5), (3, 2), ((1, 1), (0, 3)), (1, 1), id="2d-one-sided"),
    pytest.param((7, 5), (9, 2), ((4, 4), (9, 9)), (3, 1), id="2d-beyond"),
    pytest.param((9, 8), (4, 2), ((2, 1), (0, 0)), (2, 2), id="2d-strided"),
    pytest.param((3, 7, 5), (2, 3, 1), ((1, 1), (2, 0), (1, 1)), (1, 3, 1), id="3d"),
]


@OPAQUE
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("size", "side", "halo", "stride"), WINDOWS)
def test_block_attention_counts_the_products_of_the_specification(
    size: tuple[int, ...], side: Any, halo: Any, stride: Any, masked: bool, impl: str
) -> None:
    """Borders, ragged blocks, strides, both paddings; a bias costs no products."""
    shapes = _qkv(size) | {"bias": (HEADS, *(3 for _ in size))}
    options = {"block": side, "halo": halo, "stride": stride, "masked": masked}
    forward, backward = _count("block", impl, shapes, **options)
    assert (forward, backward) == _count("block", "naive", shapes, **options)
    assert backward == 2 * forward


def _block_flops(size: Any, side: Any, halo: Any, stride: Any, masked: bool, relative: bool) -> int:
    """Every query lists the coordinates that it sees along each axis; pairs are their product."""
    total = 0
    for query in product(*(range(0, n, s) for n, s in zip(size, stride, strict=True))):
        seen = [
            sum(0 <= m < n or not masked for m in range(i - i % b - before, i - i % b + b + after))
            for i, n, b, (before, after) in zip(query, size, side, halo, strict=True)
        ]
        total += prod(seen) * (KEY + VALUE) + sum(seen) * KEY * relative
    return 2 * BATCH * HEADS * total


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("size", "side", "halo", "stride"), WINDOWS)
def test_block_attention_counts_position_terms_once_per_query_and_place(
    size: tuple[int, ...], side: Any, halo: Any, stride: Any, masked: bool, relative: bool
) -> None:
    """Triton's operator has them inside; eager gets them from torch, which counts places outside as well."""
    options = {"block": side, "halo": halo, "stride": stride, "masked": masked}
    rel = [3] * len(size) if relative else None
    expected = _block_flops(size, side, halo, stride, masked, relative)
    assert _count("block", "triton", _qkv(size), rel, **options) == (expected, 2 * expected)
    forward, backward = _count("block", "eager", _qkv(size), rel, **options)
    assert forward >= expected
    assert backward == 2 * forward
    whole = all(n % b == 0 for n, b in zip(size, side, strict=True))
    if not relative or (whole and not masked):
        assert forward == expected


def test_eager_block_attention_with_tables_equals_triton_where_nothing_is_outside() -> None:
    """Blocks that fit, without a halo: torch's products of the position terms are those of the definition."""
    options = {"block": (3, 2), "halo": ((0, 0), (0, 0)), "stride": (1, 1)}
    counts = [_count("block", impl, _qkv((9, 8)), (3, 3), **options) for impl in ("eager", "triton")]
    assert counts[0] == counts[1]


def _lambda_flops(size: Any, heads: int, rows: Any, order: str) -> int:
    """Content lambda, applying, and positions by the pairs (position, offset) that meet the volume."""
    places = _volume(size)
    reach = [] if rows is None else _volume(rows)
    pairs = sum(
        all(0 <= i + o - r // 2 < n for i, o, r, n in zip(place, offset, rows, size, strict=True))
        for place in places
        for offset in reach
    )
    per_pair = KEY * VALUE if order == "lambda first" else heads * (KEY + VALUE)
    return 2 * BATCH * (len(places) * (DEPTH + heads) * KEY * VALUE + pairs * DEPTH * per_pair)


@OPAQUE
@pytest.mark.parametrize(("heads", "order"), [(3, "lambda first"), (8, "lambda first"), (2, "query first")])
@pytest.mark.parametrize(
    ("size", "rows"),
    [((11,), (5,)), ((11,), (21,)), ((4,), (9,)), ((7, 5), (3, 5)), ((3, 7, 1), (5, 1, 3)), ((7, 5), None)],
    ids=str,
)
def test_lambda_attention_counts_the_cheaper_order_over_offsets_inside(
    size: tuple[int, ...], rows: tuple[int, ...] | None, heads: int, order: str, impl: str
) -> None:
    """K V = 35, K + V = 12: queries first below three heads. Eager and torch's part of it add up."""
    expected = _lambda_flops(size, heads, rows, order)
    assert _count("lambda", impl, _lambda_shapes(size, heads, rows)) == (expected, 2 * expected)


@OPAQUE
@pytest.mark.parametrize(
    ("size", "rows"), [((11,), (1,)), ((11,), (5,)), ((3, 4), (1, 3)), ((4,), None)], ids=str
)
def test_lambda_attention_counts_the_specification_less_what_is_padding(
    size: tuple[int, ...], rows: tuple[int, ...] | None, impl: str
) -> None:
    """naive multiplies the zeros around the volume too: two pairs for 3 rows on a line, six for 5 rows."""
    shapes = _lambda_shapes(size, 3, rows)
    forward, backward = _count("lambda", impl, shapes)
    outside = {1: 0, 3: 2, 5: 6}[rows[-1]] * prod(size[:-1]) if rows else 0
    padded = 2 * BATCH * outside * DEPTH * KEY * VALUE
    assert (forward + padded, backward + 2 * padded) == _count("lambda", "naive", shapes)


@OPAQUE
@pytest.mark.parametrize("size", [(11,), (7, 5), (3, 1, 5)], ids=str)
def test_cross_covariance_attention_counts_the_products_of_the_specification(
    size: tuple[int, ...], impl: str
) -> None:
    """4 N H D^2 forward, twice that backward."""
    shapes = dict.fromkeys("qkv", (BATCH, *size, HEADS, KEY)) | {"temperature": (HEADS,)}
    counts = _count("crosscov", impl, shapes)
    assert counts == _count("crosscov", "naive", shapes)
    assert counts[0] == 4 * BATCH * prod(size) * HEADS * KEY**2


def test_every_operator_of_the_package_has_a_formula() -> None:
    """A new one without is counted as nothing, silently."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("medattn::")}
    assert names == {f"medattn::{name}{suffix}" for name in FORMULAS for suffix in ("", "_backward")}


def _network_flops(name: str, size: int, **options: Any) -> int:
    """Flops of one forward pass on tensors without memory."""
    network: nn.Module = create(name, spatial_dims=3, in_channels=1, out_channels=2, **options).to("meta")
    with FlopCounterMode(display=False) as counter:
        out: Tensor = network(torch.empty(1, 1, size, size, size, device="meta"))
    assert out.is_meta
    total: int = counter.get_total_flops()
    return total


@pytest.mark.parametrize("size", [32, 512])  # half a gigabyte of input, and no memory
def test_an_attention_network_counts_its_layer_beside_the_plain_network(size: int) -> None:
    """What is added: projections to queries, keys, values and back, and the operator."""
    more = _network_flops("unet_block", size, relative=False) - _network_flops("unet", size)
    side, channels, heads, width = size // 4, 64, 2, 8  # a quarter of the resolution, blocks of 4, halo 2
    projections = 2 * side**3 * channels * 4 * heads * width
    pairs = (
        side // 4 * 4 * 8 - 2 * 4 * 2
    )  # two voxels of the halo of the first and the last block are outside
    assert more == projections + 2 * pairs**3 * heads * 2 * width


def test_the_package_alone_loads_neither_the_counter_nor_triton() -> None:
    program = """
import sys, torch, medattn_kernels
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["unet_lambda", "unet_crosscov", "unet_axial", "unet_dual", "unet_halo"])
def test_networks_count_on_the_meta_device_too(name: str) -> None:
    """Where nothing is computed and autocast does not exist."""
    assert _network_flops(name, 32) > _network_flops("unet", 32)
