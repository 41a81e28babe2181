"""The Triton path of axial attention: interpreted on a CPU, the real kernels where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is there on Linux only")

import triton.language as tl  # noqa: E402

from medattn_kernels import axial_attention  # noqa: E402
from medattn_kernels.axial import fused  # noqa: E402
from medattn_kernels.axial.tiles import addresses, line_of  # noqa: E402
from medattn_kernels.testing import (  # noqa: E402
    Layout,
    assert_meets_budget,
    make_qkv,
    outputs_and_gradients,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUMS = ("gradient of rel", "gradient of gain")
ROWS = {"rel_q": 7, "rel_k": 141, "rel_v": 5}  # shorter and longer than the axes below


def _inputs(
    size: tuple[int, ...],
    *,
    terms: str = "qkvg",
    width: int = 5,
    value_width: int = 6,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "contiguous",
    batch: int = 1,
    heads: int = 2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """q, k, v and the tables named in `terms` by their last letter, g for the gain."""
    shape = {"batch": batch, "heads": heads, "width": width, "value_width": value_width, "seed": seed}
    tensors = make_qkv(size, dtype=dtype, layout=layout, **shape)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed + 1)
    widths = {"rel_q": width, "rel_k": width, "rel_v": value_width}
    for name in (n for n in ROWS if n[-1] in terms):
        tensors[name] = torch.randn(ROWS[name], widths[name], generator=generator)
    if "g" in terms:
        tensors["gain"] = torch.randn(3, heads, generator=generator)
    return {name: x.to(DEVICE) if x.dtype == dtype else x.to(DEVICE, dtype) for name, x in tensors.items()}


def _assert_within_budget(tensors: dict[str, Tensor], **options: Any) -> None:
    assert_meets_budget(lambda **x: axial_attention(**x, **options), tensors, "triton", ("rel", "gain"))


@pytest.mark.parametrize("terms", ["", "q", "k", "v", "qkv", "qkvg"])
def test_each_term_matches_the_specification_forward_and_backward(terms: str) -> None:
    _assert_within_budget(_inputs((9,), terms=terms), axis=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("size", "axis", "options"),
    [
        pytest.param((37,), 0, {}, id="1d-prime"),
        pytest.param((1, 3), 1, {}, id="2d-beside-length1"),
        pytest.param((19, 2), 0, {"separate": True}, id="2d-separate"),
        pytest.param((1, 2, 33), 2, {"span": 9}, id="3d-span"),
        pytest.param((2, 16, 1), 1, {"scale": 0.3}, id="3d-whole-tile"),
        pytest.param((66,), 0, {"span": 33}, id="1d-span-of-whole-tiles"),
    ],
)
def test_sizes_spans_and_dtypes_match_the_specification(
    size: tuple[int, ...], axis: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Several tiles, ragged ones, tiles out of reach of the span, and lengths below one tile."""
    _assert_within_budget(_inputs(size, dtype=dtype), axis=axis, **options)


def test_a_line_of_one_position_returns_its_value_and_has_no_gradient_of_logits() -> None:
    tensors = _inputs((1, 3))
    got = outputs_and_gradients(lambda **x: axial_attention(**x, axis=0, impl="triton"), tensors)
    centre = tensors["rel_v"][ROWS["rel_v"] // 2]
    torch.testing.assert_close(got["output 0"], tensors["v"] + centre)
    for name in ("q", "k", "rel_q", "rel_k", "gain"):
        assert float(got[f"gradient of {name}"].abs().max()) < 1e-5, name


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_axis_of_a_batch_of_volumes_in_mixed_layouts(axis: int) -> None:
    """Batch, both places off the axis and heads are told apart, whatever the strides of q, k and v."""
    layouts: dict[str, Layout] = {"q": "channels first", "k": "reversed", "v": "strided"}
    tensors = _inputs((3, 2, 4), batch=2)
    for name, layout in layouts.items():
        tensors[name] = _inputs((3, 2, 4), batch=2, layout=layout)[name]
    assert len({x.stride() for x in (tensors[n] for n in "qkv")}) == 3
    _assert_within_budget(tensors, axis=axis)


def test_float32_tables_beside_bfloat16_features() -> None:
    """What mixed precision sends: tables are used in q's dtype, their gradients come in their own."""
    tensors = _inputs((9,), dtype=torch.bfloat16)
    wide = {n: x.float() if n.startswith(("rel", "gain")) else x for n, x in tensors.items()}
    got, expected = (
        outputs_and_gradients(lambda **x: axial_attention(**x, axis=0, impl="triton"), given)
        for given in (wide, tensors)
    )
    for name, value in got.items():
        assert value.dtype == (torch.float32 if name.startswith(SUMS) else torch.bfloat16), name
        torch.testing.assert_close(value.to(torch.bfloat16), expected[name])


def test_a_loss_on_one_of_two_outputs_and_frozen_tables() -> None:
    tensors = _inputs((9,))
    q = tensors.pop("q").requires_grad_()
    results = []
    for impl in ("triton", "naive"):
        _, position = axial_attention(q, **tensors, axis=0, separate=True, impl=impl)  # type: ignore[arg-type]
        results.append(torch.autograd.grad(position.square().sum(), q)[0])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("width", "value_width"), [(4, 8), (24, 40)])
def test_head_sizes_need_not_be_powers_of_two(width: int, value_width: int) -> None:
    _assert_within_budget(_inputs((18,), width=width, value_width=value_width), axis=0)


def test_expanded_inputs_and_gradients_are_read_in_place() -> None:
    """Stride 0 in the inputs and, after a plain sum, in the gradient that comes back."""
    x = _inputs((6, 3), terms="")
    q = x["q"][:, :, :1].expand(-1, -1, 3, -1, -1).requires_grad_()
    results = []
    for impl in ("triton", "naive"):
        out = axial_attention(q, x["k"], x["v"], axis=0, impl=impl)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        results.append(torch.autograd.grad(out.sum(), q)[0])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@settings(max_examples=10)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(2, 20)),
    terms=st.sets(st.sampled_from("qkvg")),
    width=st.integers(1, 20),
    span=st.none() | st.integers(0, 9).map(lambda n: 2 * n + 1),
    seed=st.integers(0, 999),
)
def test_any_shape_matches_the_specification(
    size: tuple[int, int], terms: set[str], width: int, span: int | None, seed: int
) -> None:
    """Which entries meet, not how they round: a budget from so few numbers would be a matter of luck."""
    tensors = _inputs(size, terms="".join(sorted(terms)), width=width, heads=1, seed=seed)
    exact = {name: x.double() for name, x in tensors.items()}
    options: dict[str, Any] = {"axis": 1, "span": span}
    truth = outputs_and_gradients(lambda **x: axial_attention(**x, **options, impl="naive"), exact)
    actual = outputs_and_gradients(lambda **x: axial_attention(**x, **options, impl="triton"), tensors)
    for name, expected in truth.items():
        scale = max(1.0, float(expected.abs().max()))
        assert (actual[name] - expected).abs().max() <= 1e-5 * scale, name


def test_repeated_backward_passes_are_equal_bit_for_bit() -> None:
    tensors = _inputs((21, 2), dtype=torch.bfloat16)

    def run(**x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return axial_attention(**x, axis=0, impl="triton")

    first, second = (outputs_and_gradients(run, tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_empty_batch_gives_empty_results_and_zero_table_gradients() -> None:
    tensors = {name: x[:0] if name in "qkv" else x for name, x in _inputs((5,)).items()}
    got = outputs_and_gradients(lambda **x: axial_attention(**x, axis=0, impl="triton"), tensors)
    assert got["output 0"].shape == (0, 5, 2, 6)
    assert float(got["gradient of rel_q"].abs().max()) == float(got["gradient of gain"].abs().max()) == 0


@triton.jit
def _distances(x, strides, line, shape, out):
    """Bytes from a tensor's start to the third position of a line, as the kernels compute the address."""
    along = line_of((x, strides), tl.full([], line, tl.int64), shape)
    places, _ = addresses(along, 2, 3, 1, 16, 16)
    first = tl.min(tl.min(places.to(tl.int64), 1), 0)
    tl.store(out, first - x.to(tl.int64))


@pytest.mark.parametrize(
    ("strides", "line", "expected"),
    [
        ((0, 0, 0, 2**30 + 8, 0, 1), 0, 2 * (2**30 + 8)),
        ((0, 0, 2**30 + 8, 0, 0, 1), 2, 2 * (2**30 + 8)),
        ((2**31 + 8, 0, 0, 1, 0, 1), 3, 2**31 + 8 + 2),
    ],
    ids=["axis", "off-axis", "batch"],
)
def test_offsets_beyond_two_to_the_31_are_exact(strides: tuple[int, ...], line: int, expected: int) -> None:
    """Addresses of a tensor of float16 too large to make; nothing is read there."""
    x = torch.zeros(1, dtype=torch.float16, device=DEVICE)
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _distances[(1,)](x, strides, line, (1, 3, 1, 3, 1, 1), out)
    assert int(out) == 2 * expected


def test_torch_accepts_the_operator() -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch itself checks them."""
    tensors = _inputs((5,))
    arguments = [tensors.get(n) for n in ("q", "k", "v", "rel_q", "rel_k", "rel_v", "gain")]
    for x in arguments:
        if x is not None:
            x.requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fused._attention, (*arguments, 0, 3, 0.5, True), test_utils=tests)


def test_compiles_without_a_break() -> None:
    tensors = _inputs((5, 2))

    def run(**x: Tensor) -> Tensor:
        out = axial_attention(**x, axis=0, impl="triton")
        assert isinstance(out, Tensor)
        return 2 * out.sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = (outputs_and_gradients(f, tensors) for f in (run, compiled))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


def test_a_cpu_without_the_interpreter_is_refused() -> None:
    program = """
import torch
from medattn_kernels import axial_attention  # noqa: E402
x = torch.zeros(1, 3, 1, 4)
try:
    axial_attention(x, x, x, axis=0, impl="triton")
except ValueError as error:
    assert "runs on a GPU, got q on cpu" in str(error), error
else:
    raise AssertionError("not refused")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "width"), [(96, 16), (130, 32), (257, 64), (1024, 8)])
def test_real_sizes_match_the_specification(length: int, width: int, dtype: torch.dtype) -> None:
    tensors = _inputs((3, length, 2), width=width, value_width=2 * width, heads=4, dtype=dtype)
    _assert_within_budget(tensors, axis=1)
