"""The Triton path of lambda attention: interpreted on a CPU, the real kernels where there is a GPU."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is there on Linux only")

import triton.language as tl  # noqa: E402

from medattn_kernels.lambdas import fused, lambda_attention, launch  # noqa: E402
from medattn_kernels.lambdas.pairs.kernel import row_start, table_rows, tile_at  # noqa: E402
from medattn_kernels.lambdas.tiles import along, load_around, row_of  # noqa: E402
from medattn_kernels.testing import (  # noqa: E402
    Layout,
    assert_meets_budget,
    make_qkv,
    outputs_and_gradients,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ORDERS = ("lambdas first", "queries first")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUN = partial(lambda_attention, impl="triton")


def _inputs(
    size: tuple[int, ...],
    rows: tuple[int, ...] = (),
    *,
    batch: int = 1,
    heads: int = 2,
    depth: int = 1,
    width: int = 5,
    value_width: int = 6,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "contiguous",
    seed: int = 0,
) -> dict[str, Tensor]:
    """q, k, v and, unless `rows` is empty, a table whose sums are of the order of one."""
    shape: dict[str, Any] = {"batch": batch, "width": width, "value_width": value_width, "dtype": dtype}
    queries = make_qkv(size, heads=heads, layout=layout, seed=seed, **shape)
    context = make_qkv(size, heads=depth, layout=layout, seed=seed + 1, **shape)
    tensors = {"q": queries["q"], "k": context["k"], "v": context["v"]}
    if rows:
        generator = torch.Generator().manual_seed(seed + 2)
        table = torch.randn(*rows, depth, width, generator=generator, dtype=torch.float64)
        tensors["table"] = (table * math.prod(rows) ** -0.5).to(dtype)
    return {name: x.to(DEVICE) for name, x in tensors.items()}


def _take(order: str, patch: pytest.MonkeyPatch) -> None:
    """Make the kernels take one of the `ORDERS`, whatever the shape."""
    patch.setattr(fused, "queries_first_fused", lambda _: order == "queries first")


@pytest.fixture(params=ORDERS)
def _either_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    _take(request.param, monkeypatch)


def _assert_within_budget(tensors: dict[str, Tensor]) -> None:
    """Without a table the gradients of k and v are those of one matrix, sums over all positions."""
    assert_meets_budget(lambda_attention, tensors, "triton", ("table",) if "table" in tensors else ("k", "v"))


@pytest.mark.usefixtures("_either_order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("size", "rows"),
    [
        pytest.param((37,), (5,), id="1d-local"),
        pytest.param((7, 5), (3, 3), id="2d-local"),
        pytest.param((4, 3), (7, 5), id="2d-global"),
        pytest.param((3, 2, 5), (3, 1, 3), id="3d-local"),
        pytest.param((1, 9), (5, 99), id="2d-longer-than-the-volume"),
        pytest.param((70,), (), id="1d-content"),
        pytest.param((2,), (1,), id="two-positions"),
        pytest.param((2, 33), (3, 65), id="2d-rows-of-three-tiles"),
    ],
)
def test_sizes_and_dtypes_match_the_specification(
    size: tuple[int, ...], rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Tables of any extent, sizes that fill no tile, forward and backward."""
    _assert_within_budget(_inputs(size, rows, dtype=dtype))


@pytest.mark.usefixtures("_either_order")
def test_a_batch_of_volumes_in_mixed_layouts_with_depth() -> None:
    """Batch, axes, heads and depth are told apart, whatever the strides of q, k and v."""
    options: dict[str, Any] = {"batch": 2, "heads": 3, "depth": 2}
    layouts: dict[str, Layout] = {"q": "channels first", "k": "reversed", "v": "strided"}
    tensors = _inputs((3, 2, 4), (3, 3, 3), **options)
    for name, layout in layouts.items():
        tensors[name] = _inputs((3, 2, 4), (3, 3, 3), **options, layout=layout)[name]
    assert len({x.stride() for x in (tensors[n] for n in "qkv")}) == 3
    _assert_within_budget(tensors)


@pytest.mark.usefixtures("_either_order")
@pytest.mark.parametrize(("width", "value_width"), [(4, 8), (16, 16), (24, 40), (64, 24)])
def test_head_sizes_need_not_be_powers_of_two(width: int, value_width: int) -> None:
    _assert_within_budget(_inputs((9,), (3,), width=width, value_width=value_width))


@pytest.mark.usefixtures("_either_order")
@pytest.mark.parametrize("programs", [1, 3])
def test_any_number_of_programs_shares_the_sums(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that walks several tiles adds them up itself."""
    monkeypatch.setattr(launch, "PROGRAMS", programs)
    _assert_within_budget(_inputs((70,), (3,)))


@pytest.mark.usefixtures("_either_order")
def test_float32_tables_beside_bfloat16_features() -> None:
    """What mixed precision sends: the table is used in q's dtype, its gradient comes in its own."""
    tensors = _inputs((9,), (3,), dtype=torch.bfloat16)
    wide = tensors | {"table": tensors["table"].float()}
    got, expected = (outputs_and_gradients(RUN, x) for x in (wide, tensors))
    for name, value in got.items():
        assert value.dtype == (torch.float32 if name == "gradient of table" else torch.bfloat16), name
        torch.testing.assert_close(value.to(torch.bfloat16), expected[name])


@pytest.mark.usefixtures("_either_order")
def test_expanded_inputs_and_gradients_are_read_in_place() -> None:
    """Stride 0 in the inputs and, after a plain sum, in the gradient that comes back."""
    x = _inputs((6, 3), (3, 3))
    q = x["q"][:, :, :1].expand(-1, -1, 3, -1, -1).requires_grad_()
    results = []
    for impl in ("triton", "naive"):
        out = lambda_attention(q, x["k"], x["v"], table=x["table"], impl=impl)  # type: ignore[arg-type]
        results.append(torch.autograd.grad(out.sum(), q)[0])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("_either_order")
def test_one_position_takes_the_whole_softmax() -> None:
    """The gradient of its key is zero up to rounding, which leaves no budget in the specification's error."""
    x = _inputs((1,), (3,))
    got, expected = (outputs_and_gradients(partial(lambda_attention, impl=i), x) for i in ("triton", "naive"))  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_keys_far_apart_neither_overflow_nor_vanish() -> None:
    """The softmax over positions in parts, of which some have next to no weight."""
    x = _inputs((130,))
    x["k"] = x["k"] * 100
    got, truth = RUN(**x), lambda_attention(**{n: t.double() for n, t in x.items()}, impl="naive")
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    size=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    rows=st.lists(st.sampled_from([1, 3, 9]), min_size=3, max_size=3),
    counts=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 2)),
    widths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    order=st.sampled_from(["content", *ORDERS]),
    seed=st.integers(0, 999),
)
def test_any_shape_matches_the_specification(  # type: ignore[no-untyped-def]
    size, rows, counts, widths, order, seed
) -> None:
    """Which entries meet, not how they round: a budget from so few numbers would be a matter of luck."""
    tensors = _inputs(
        tuple(size),
        () if order == "content" else tuple(rows[: len(size)]),
        batch=counts[0],
        heads=counts[1],
        depth=counts[2],
        width=widths[0],
        value_width=widths[1],
        seed=seed,
    )
    exact = {name: x.double() for name, x in tensors.items()}
    truth = outputs_and_gradients(partial(lambda_attention, impl="naive"), exact)
    with pytest.MonkeyPatch.context() as patch:
        _take(order, patch)
        actual = outputs_and_gradients(RUN, tensors)
    for name, expected in truth.items():
        scale = max(1.0, float(expected.abs().max()))
        assert (actual[name] - expected).abs().max() <= 1e-5 * scale, name


@pytest.mark.usefixtures("_either_order")
def test_repeated_backward_passes_are_equal_bit_for_bit() -> None:
    tensors = _inputs((9, 3), (3, 5), dtype=torch.bfloat16)
    first, second = (outputs_and_gradients(RUN, tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("_either_order")
def test_batches_and_heads_are_independent() -> None:
    """Bit for bit: what other entries hold has no part in an entry's sums."""
    x = _inputs((5, 3), (3, 3), batch=2, heads=3)
    out = RUN(**x)
    alone = RUN(**{n: t[1:] if n in "qkv" else t for n, t in x.items()})
    assert torch.equal(alone, out[1:])
    assert torch.equal(RUN(**x | {"q": x["q"][..., 2:, :]}), out[..., 2:, :])


def test_an_empty_batch_gives_empty_results_and_zero_table_gradients() -> None:
    tensors = {name: x[:0] if name in "qkv" else x for name, x in _inputs((5,), (3,)).items()}
    got = outputs_and_gradients(RUN, tensors)
    assert got["output 0"].shape == (0, 5, 2, 6)
    assert float(got["gradient of table"].abs().max()) == 0


@pytest.mark.usefixtures("_either_order")
def test_offsets_that_no_two_positions_have_get_no_gradient() -> None:
    tensors = _inputs((2, 3), (9, 3))
    gradient = outputs_and_gradients(RUN, tensors)["gradient of table"]
    assert not gradient[:3].any()
    assert not gradient[6:].any()
    assert gradient[3:6].any()


@triton.jit
def _distance(x, strides, place, out):
    """Entries from a tensor's start to a place, as the kernels compute it."""
    tl.store(out, tl.min(along((x, strides), (tl.zeros([16], tl.int32) + place, place, place)), 0))


@triton.jit
def _row(rows, offset, out):
    """Table row of an offset, the same on every axis."""
    tl.store(out, tl.min(row_of((tl.zeros([16], tl.int32) + offset, offset, offset), rows), 0))


@triton.jit
def _value_at(x, strides, batch, depth, out):
    """The first value of one batch entry and depth, through `load_around`."""
    zero = tl.zeros([16], tl.int32)
    here = (zero, zero, zero)
    there = (tl.zeros([1], tl.int32), tl.zeros([1], tl.int32), tl.zeros([1], tl.int32))
    found = load_around(
        (x, strides), tl.cast(batch, tl.int64), depth, there, there[0] == 0, here, zero == 0, (1, 1, 1), 1, 1
    )
    tl.store(out, tl.max(tl.max(tl.max(found, 2), 1), 0))


@triton.jit
def _last_of_tile(x, strides, back, out):
    """The last of 16 places from 2^28 on in a row, of one head, seen from so far back."""
    row = row_start((x - back, strides), tl.cast(1, tl.int64), 3, 3, 0)
    address, _ = tile_at((x, strides), row, 2**28, 2**30, 2, 3, 1, 16, 1, 16)
    first = tl.arange(0, 16)[None, :] == 0
    tl.store(out, tl.max(tl.max(tl.load(address, mask=first, other=0.0), 1), 0))


@triton.jit
def _last_of_rows(x, rows, back, out):
    """The last of 16 table entries from offset (900, 900, 0) on, seen from so far back."""
    found = table_rows((x - back, rows), 900, 900, 0, 0, 1, 1, 16, 16)
    tl.store(out, tl.max(tl.max(found, 1), 0))


def test_offsets_beyond_two_to_the_31_are_exact() -> None:
    """Distances in tensors and rows of tables too large to make."""
    x = torch.zeros(1, dtype=torch.float16, device=DEVICE)
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _distance[(1,)](x, (0, 2**30 + 8, 2**29, 8, 0, 1), 3, out)
    assert int(out) == 3 * (2**30 + 8 + 2**29 + 8)
    _row[(1,)]((2001, 2001, 2001), 900, out)
    assert int(out) == (1900 * 2001 + 1900) * 2001 + 1900


def test_tiles_beyond_two_to_the_31_are_exact() -> None:
    """Places and table entries at the end of tensors too large to make: only the end is there."""
    x = torch.arange(16.0, device=DEVICE)
    out = torch.zeros(1, device=DEVICE)
    back = 2**31 + 3 * 2**30 + 3 * 2**29 + 2**28 + 2 * 2**30
    _last_of_tile[(1,)](x, (2**31, 2**30, 2**29, 1, 2**30, 1), back, out)
    assert float(out) == 15
    _last_of_rows[(1,)](x, (2001, 2001, 2001), (1900 * 2001 + 1900) * 2001 + 1000, out.zero_())
    assert float(out) == 15


def test_batch_and_depth_are_found_by_their_strides() -> None:
    x = torch.arange(100.0, device=DEVICE)
    out = torch.zeros(1, device=DEVICE)
    _value_at[(1,)](x, (20, 0, 0, 0, 3, 1), 4, 5, out)
    assert float(out) == 95


def test_torch_accepts_the_operator() -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch itself checks them."""
    tensors = [x.requires_grad_() for x in _inputs((5,), (3,)).values()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fused._attention, tuple(tensors), test_utils=tests)


def test_compiles_without_a_break() -> None:
    tensors = _inputs((5, 2), (3, 3))

    def run(**x: Tensor) -> Tensor:
        return 2 * RUN(**x).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = (outputs_and_gradients(f, tensors) for f in (run, compiled))
    torch.testing.assert_close(got, expected)


def test_keys_too_wide_for_registers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"impl='triton' takes keys of at most 64, got 65; use impl='eager'"):
        RUN(**_inputs((5,), width=65))


@pytest.mark.usefixtures("_either_order")
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("size", "rows", "width", "value_width", "depth"),
    [
        ((24, 16, 20), (7, 7, 7), 16, 32, 1),
        ((28, 28), (23, 23), 16, 64, 1),
        ((14, 14), (27, 27), 16, 64, 4),
        ((10, 9, 8), (19, 17, 15), 32, 16, 1),
        ((200,), (399,), 64, 256, 1),
    ],
)
def test_real_sizes_match_the_specification(
    size: tuple[int, ...],
    rows: tuple[int, ...],
    width: int,
    value_width: int,
    depth: int,
    dtype: torch.dtype,
) -> None:
    shape: dict[str, Any] = {"width": width, "value_width": value_width, "depth": depth}
    _assert_within_budget(_inputs(size, rows, batch=2, heads=4, dtype=dtype, **shape))
