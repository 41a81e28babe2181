"""The Triton path of block attention: interpreted on a CPU, the real kernels where there is a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is there on Linux only")

import triton.language as tl  # noqa: E402

from medattn_kernels import block_attention  # noqa: E402
from medattn_kernels._device import addresses  # noqa: E402
from medattn_kernels.block import fused  # noqa: E402
from medattn_kernels.block.tiles import quick_unravel  # noqa: E402
from medattn_kernels.testing import (  # noqa: E402
    Layout,
    assert_meets_budget,
    make_qkv,
    outputs_and_gradients,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = (5, 13, 7)  # of the tables: shorter and longer than the windows below


def _inputs(
    size: tuple[int, ...],
    *,
    terms: str = "rb",
    width: int = 5,
    value_width: int = 6,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "contiguous",
    batch: int = 1,
    heads: int = 2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """q, k, v; with r in `terms` a table per axis, rel0 and so on; with b the bias.

    Entries of the tables are of the size D^-1/2 that they have in the published layers.
    """
    shape = {"batch": batch, "heads": heads, "width": width, "value_width": value_width, "seed": seed}
    tensors = make_qkv(size, dtype=dtype, layout=layout, **shape)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed + 1)
    tables = {f"rel{a}": (ROWS[a], width) for a in range(len(size)) if "r" in terms}
    tables |= {"bias": (heads, *ROWS[: len(size)])} if "b" in terms else {}
    tensors |= {
        name: (torch.randn(*shape, generator=generator) * width**-0.5).to(dtype)
        for name, shape in tables.items()
    }
    return {name: x.to(DEVICE) for name, x in tensors.items()}


def _run(impl: str | None = None, **arguments: Any) -> Tensor:
    """block_attention with the tables rel0, rel1, ... gathered into `rel`."""
    rel = [arguments.pop(f"rel{a}") for a in range(3) if f"rel{a}" in arguments]
    return block_attention(**arguments, rel=rel or None, impl=impl)  # type: ignore[arg-type]


def _assert_within_budget(tensors: dict[str, Tensor], **options: Any) -> None:
    assert_meets_budget(partial(_run, **options), tensors, "triton", ("rel", "bias"))


def _assert_same_entries_meet(tensors: dict[str, Tensor], **options: Any) -> None:
    """Not how they round: a budget from very few numbers would be a matter of luck."""
    exact = {name: x.double() for name, x in tensors.items()}
    truth = outputs_and_gradients(partial(_run, **options, impl="naive"), exact)
    actual = outputs_and_gradients(partial(_run, **options, impl="triton"), tensors)
    for name, expected in truth.items():
        scale = max(1.0, float(expected.abs().max()))
        assert (actual[name] - expected).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("terms", ["", "r", "b", "rb"])
def test_each_term_matches_the_specification_forward_and_backward(terms: str) -> None:
    """A ragged last block, a halo wider behind than ahead."""
    _assert_within_budget(_inputs((37,), terms=terms), block=16, halo=[(3, 5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        pytest.param((7, 5), {"block": 4, "halo": 1}, id="2d"),
        pytest.param((5, 3, 6), {"block": (4, 2, 6), "halo": (1, 1, 0)}, id="3d"),
        pytest.param((9, 4), {"block": 9, "halo": 2}, id="2d-ragged-tile-of-queries"),
        pytest.param((70,), {"block": 70, "halo": 0}, id="1d-two-tiles"),
    ],
)
def test_sizes_and_dtypes_match_the_specification(
    size: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    _assert_within_budget(_inputs(size, dtype=dtype, terms="r"), **options)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        pytest.param((6, 5), {"block": 1, "halo": 2}, id="sasa"),
        pytest.param((3, 3, 4), {"block": (2, 1, 2), "halo": 1}, id="3d"),
        pytest.param((6, 4), {"block": 2, "halo": [(0, 1), (2, 0)], "padding": "zero"}, id="zero"),
    ],
)
def test_small_blocks_joined_into_one_tile_keep_their_own_windows(
    size: tuple[int, ...], options: dict[str, Any]
) -> None:
    _assert_within_budget(_inputs(size), **options)


@pytest.mark.parametrize("padding", ["masked", "zero"])
@pytest.mark.parametrize("stride", [1, (2, 4)])
def test_stride_and_padding_match_the_specification(padding: str, stride: int | tuple[int, int]) -> None:
    _assert_within_budget(_inputs((9, 7)), block=(6, 4), halo=2, stride=stride, padding=padding)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        pytest.param((45,), {"block": 36, "halo": [(3, 1)], "stride": 2}, id="1d-two-tiles-of-queries"),
        pytest.param((9, 7), {"block": (6, 4), "halo": 2, "stride": (2, 4), "padding": "zero"}, id="2d"),
        pytest.param((5, 3, 6), {"block": (4, 2, 6), "halo": (1, 1, 0), "stride": (2, 1, 3)}, id="3d"),
    ],
)
def test_offsets_that_count_queries_match_the_specification(
    size: tuple[int, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "QUERIES", 16)
    _assert_same_entries_meet(_inputs(size, heads=1), **options, offsets="queries")


def test_a_batch_of_volumes_in_mixed_layouts() -> None:
    """Batch, axes and heads are told apart, whatever the strides of q, k and v."""
    layouts: dict[str, Layout] = {"q": "channels first", "k": "reversed", "v": "strided"}
    tensors = _inputs((3, 2, 4), batch=2)
    for name, layout in layouts.items():
        tensors[name] = _inputs((3, 2, 4), batch=2, layout=layout)[name]
    assert len({x.stride() for x in (tensors[n] for n in "qkv")}) == 3
    _assert_within_budget(tensors, block=(3, 2, 3), halo=1)


@pytest.mark.parametrize(("width", "value_width"), [(4, 8), (24, 40)])
def test_head_sizes_need_not_be_powers_of_two(width: int, value_width: int) -> None:
    _assert_within_budget(_inputs((18,), width=width, value_width=value_width), block=9, halo=2)


def test_heads_worked_on_in_turn_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget of shared position terms decides how many heads go together, nothing else."""
    tensors = _inputs((12,), heads=3)
    together = outputs_and_gradients(partial(_run, block=4, halo=2, impl="triton"), tensors)
    monkeypatch.setattr(fused, "SCRATCH", 1e-9)
    in_turn = outputs_and_gradients(partial(_run, block=4, halo=2, impl="triton"), tensors)
    torch.testing.assert_close(in_turn, together, rtol=1e-6, atol=1e-6)


def test_few_programs_share_the_table_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that walks several tiles adds to its own sums."""
    monkeypatch.setattr(fused, "PROGRAMS", 3)
    _assert_within_budget(_inputs((40,)), block=4, halo=2)


def test_float32_tables_beside_bfloat16_features() -> None:
    """What mixed precision sends: tables are used in q's dtype, their gradients come in their own."""
    tensors = _inputs((9,), dtype=torch.bfloat16)
    wide = {n: x.float() if n.startswith(("rel", "bias")) else x for n, x in tensors.items()}
    got, expected = (
        outputs_and_gradients(partial(_run, block=4, halo=1, impl="triton"), x) for x in (wide, tensors)
    )
    for name, value in got.items():
        parameter = name.startswith(("gradient of rel", "gradient of bias"))
        assert value.dtype == (torch.float32 if parameter else torch.bfloat16), name
        torch.testing.assert_close(value.to(torch.bfloat16), expected[name])


def test_expanded_inputs_and_gradients_are_read_in_place() -> None:
    """Stride 0 in the inputs and, after a plain sum, in the gradient that comes back."""
    x = _inputs((6, 3), terms="")
    q = x["q"][:, :, :1].expand(-1, -1, 3, -1, -1).requires_grad_()
    results = []
    for impl in ("triton", "naive"):
        out = _run(impl, q=q, k=x["k"], v=x["v"], block=3, halo=1)
        results.append(torch.autograd.grad(out.sum(), q)[0])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@settings(max_examples=20)
@given(
    size=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    blocks=st.lists(st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2), (9, 3)]), min_size=3, max_size=3),
    halo=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=3, max_size=3),
    terms=st.sets(st.sampled_from("rb")),
    padding=st.sampled_from(["masked", "zero"]),
    offsets=st.sampled_from(["voxels", "queries"]),
    width=st.integers(1, 20),
    seed=st.integers(0, 999),
)
def test_any_shape_matches_the_specification(  # type: ignore[no-untyped-def]
    size, blocks, halo, terms, padding, offsets, width, seed
) -> None:
    axes = len(size)
    tensors = _inputs(tuple(size), terms="".join(sorted(terms)), width=width, heads=1, seed=seed)
    options: dict[str, Any] = {
        "block": [b for b, _ in blocks[:axes]],
        "stride": [s for _, s in blocks[:axes]],
        "halo": halo[:axes],
        "padding": padding,
        "offsets": offsets,
    }
    _assert_same_entries_meet(tensors, **options)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "offsets": "queries"}], ids=["all", "strided"])
def test_repeated_backward_passes_are_equal_bit_for_bit(options: dict[str, Any]) -> None:
    tensors = _inputs((9, 3), dtype=torch.bfloat16)
    run = partial(_run, block=4, halo=1, impl="triton", **options)
    first, second = (outputs_and_gradients(run, tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_empty_batch_gives_empty_results_and_zero_table_gradients() -> None:
    tensors = {name: x[:0] if name in "qkv" else x for name, x in _inputs((5,)).items()}
    got = outputs_and_gradients(partial(_run, block=2, halo=1, impl="triton"), tensors)
    assert got["output 0"].shape == (0, 5, 2, 6)
    assert float(got["gradient of rel0"].abs().max()) == float(got["gradient of bias"].abs().max()) == 0


@triton.jit
def _distance(x, strides, place, out):
    """Bytes from a tensor's start to a place, as the kernels compute the address."""
    zero = tl.zeros([16], tl.int32)
    places = addresses(
        (x, strides), tl.full([], 1, tl.int64), (zero + place, zero, zero), tl.full([], 3, tl.int32), 16
    )
    tl.store(out, tl.min(tl.min(places.to(tl.int64), 1), 0) - x.to(tl.int64))


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ((0, 2**30 + 8, 0, 0, 0, 1), 2 * (2**30 + 8)),
        ((0, 0, 0, 0, 2**30 + 8, 1), 3 * (2**30 + 8)),
        ((2**31 + 8, 0, 0, 0, 0, 1), 2**31 + 8),
    ],
    ids=["axis", "head", "batch"],
)
def test_offsets_beyond_two_to_the_31_are_exact(strides: tuple[int, ...], expected: int) -> None:
    """Addresses of a tensor of float16 too large to make; nothing is read there."""
    x = torch.zeros(1, dtype=torch.float16, device=DEVICE)
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _distance[(1,)](x, strides, 2, out)
    assert int(out) == 2 * expected


@triton.jit
def _coordinates(out, shape, inverse, start, B: tl.constexpr):
    i = tl.arange(0, B)
    found = quick_unravel(start + i, shape, inverse)
    for axis in tl.static_range(3):
        tl.store(out + axis * B + i, found[axis])


@pytest.mark.parametrize("shape", [(3, 5, 7), (128, 128, 128), (1, 1, 64), (36, 1, 36)], ids=str)
def test_products_take_the_place_of_divisions_exactly(shape: tuple[int, int, int]) -> None:
    """At the start and the end of the largest windows."""
    total = shape[0] * shape[1] * shape[2]
    for start in (0, max(0, total - 64)):
        out = torch.zeros(3, 64, dtype=torch.int32, device=DEVICE)
        _coordinates[(1,)](out, shape, fused._inverse(shape), start, B=64)
        inside = min(64, total)
        expected = torch.unravel_index(torch.arange(start, start + inside), shape)
        torch.testing.assert_close(out[:, :inside].cpu().long(), torch.stack(expected))


def test_torch_accepts_the_operator() -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch itself checks them."""
    x = _inputs((5,))
    tensors = [x["q"], x["k"], x["v"], None, None, x["rel0"], x["bias"]]
    for tensor in tensors:
        if tensor is not None:
            tensor.requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fused._attention, (*tensors, [4], [1, 2], [2], [1], 0.5, True), test_utils=tests)


def test_compiles_without_a_break() -> None:
    tensors = _inputs((5, 2))

    def run(**x: Tensor) -> Tensor:
        return 2 * _run("triton", **x, block=4, halo=1).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = (outputs_and_gradients(f, tensors) for f in (run, compiled))
    torch.testing.assert_close(got, expected)


def test_windows_too_long_for_registers_are_refused_with_tables_only() -> None:
    x = make_qkv((200,), batch=1, heads=1, dtype=torch.float32)
    options: dict[str, Any] = {"block": 100, "halo": 40}
    with pytest.raises(ValueError, match=r"impl='triton' takes windows of at most 128 .* rel, got 180"):
        block_attention(**x, **options, rel=[torch.zeros(3, 5)], impl="triton")
    assert fused.refusal((40,), (100,), ((40, 40),), masked=True) == ""  # no longer than the volume


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("size", "width", "options"),
    [
        ((24, 16, 20), 16, {"block": 8, "halo": 4}),
        ((28, 28), 64, {"block": 8, "halo": 3}),
        ((48, 48), 32, {"block": 24, "halo": [(0, 12)] * 2}),
        ((14, 14), 16, {"block": 1, "halo": 3}),
    ],
)
def test_real_sizes_match_the_specification(
    size: tuple[int, ...], width: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    _assert_within_budget(
        _inputs(size, width=width, value_width=width, heads=4, dtype=dtype, terms="r"), **options
    )
