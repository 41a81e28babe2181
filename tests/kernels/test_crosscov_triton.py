"""The Triton path of cross-covariance attention: interpreted on a CPU, real kernels on a GPU."""

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

from medattn_kernels.crosscov import cross_covariance_attention, fused  # noqa: E402
from medattn_kernels.crosscov.tiles import addresses  # noqa: E402
from medattn_kernels.testing import (  # noqa: E402
    LAYOUTS,
    Layout,
    assert_meets_budget,
    assert_within_budget,
    make_qkv,
    outputs_and_gradients,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
run_triton = partial(cross_covariance_attention, impl="triton")


def _inputs(
    size: tuple[int, ...], *, heads: int = 2, width: int = 5, batch: int = 1, **options: Any
) -> dict[str, Tensor]:
    """q, k, v and a temperature of its own for every head."""
    x = make_qkv(size, heads=heads, width=width, value_width=width, batch=batch, **options)
    x["temperature"] = torch.linspace(0.5, 4.0, heads, dtype=x["q"].dtype)
    return {name: t.to(DEVICE) for name, t in x.items()}


def _assert_within_budget(tensors: dict[str, Tensor]) -> None:
    assert_meets_budget(cross_covariance_attention, tensors, "triton", sums=("temperature",))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(70,), (7, 5), (3, 1, 4)], ids=lambda s: "x".join(map(str, s)))
def test_sizes_and_dtypes_match_the_specification(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """A ragged second tile, less than one tile, an axis of length one."""
    _assert_within_budget(_inputs(size, dtype=dtype, batch=2))


@pytest.mark.parametrize("parts", [2, 528])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_several_parts_give_the_same_sums(
    parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program per tile, and programs of several tiles; rows of sums in several pieces."""
    monkeypatch.setattr(fused, "SHARE", 0)
    monkeypatch.setattr(fused, "PARTS", parts)
    monkeypatch.setattr(fused, "SUMS", 16)
    tensors = _inputs((17, 19), dtype=dtype)
    assert fused._Launch(tensors["q"]).parts == min(parts, 5)
    _assert_within_budget(tensors)


@pytest.mark.parametrize(
    ("heads", "width", "groups"),
    [(5, 16, 2), (3, 24, 2), (17, 4, 2), (1, 33, 1), (2, 65, 2)],
    ids=str,
)
def test_heads_share_a_program_as_far_as_they_fit(heads: int, width: int, groups: int) -> None:
    """Unequal groups, head sizes that are no powers of two, a head that fills a program alone."""
    tensors = _inputs((20,), heads=heads, width=width, dtype=torch.bfloat16)
    assert fused._Launch(tensors["q"]).programs == groups
    _assert_within_budget(tensors)


def test_the_widest_heads() -> None:
    _assert_within_budget(_inputs((40,), heads=1, width=128, dtype=torch.bfloat16))


def test_float32_heads_wider_than_shared_memory_are_refused() -> None:
    """Never replaced: impl=None takes eager for them."""
    x = _inputs((4,), width=65, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"impl='triton' takes float32 heads of at most 64, got 65; use"):
        run_triton(**x)
    assert cross_covariance_attention(**x).shape == x["v"].shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_in_place(layout: Layout) -> None:
    _assert_within_budget(_inputs((3, 4, 5), layout=layout, batch=2, dtype=torch.float32))


def test_a_batch_of_volumes_in_mixed_layouts() -> None:
    """Batch, axes and heads are told apart, whatever the strides of q, k and v."""
    tensors = _inputs((3, 2, 4), batch=2, dtype=torch.float32)
    layouts: dict[str, Layout] = {"q": "channels first", "k": "reversed", "v": "strided"}
    for name, layout in layouts.items():
        tensors[name] = _inputs((3, 2, 4), batch=2, dtype=torch.float32, layout=layout)[name]
    assert len({tensors[name].stride() for name in "qkv"}) == 3
    _assert_within_budget(tensors)


def test_axes_of_one_stride_are_joined() -> None:
    """A whole volume is one axis where memory allows; a part of one is not."""
    x = torch.zeros(2, 4, 5, 6, 3, 8)
    first = torch.zeros(2, 3, 8, 4, 5, 6).movedim((1, 2), (-2, -1))
    assert fused._positions((x, first)) == (None, [(2880, 0, 0, 24, None, 1), (2880, 0, 0, 1, None, 120)])
    inner, strides = fused._positions((x[:, :, :3], first[:, :, :3]))
    assert inner == (4, 18)
    assert strides[0][1:4] == (0, 720, 24)
    assert fused._positions((x[:, :, :3, :4],)) == ((3, 4), [(2880, 720, 144, 24, None, 1)])
    assert fused._positions((x[..., :2, :5],))[1][0][4:] == (8, 1)


def test_expanded_inputs_and_gradients_are_read_in_place() -> None:
    """Stride 0 in the inputs and, after a plain sum, in the gradient that comes back."""
    x = _inputs((6, 3), dtype=torch.float32)
    q = x["q"][:, :, :1].expand(-1, -1, 3, -1, -1).requires_grad_()
    results = []
    for impl in ("triton", "naive"):
        out = cross_covariance_attention(**x | {"q": q}, impl=impl)
        results.append(torch.autograd.grad(out.sum(), q)[0])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # their own, in float16
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_of_zeros_have_equal_weights_and_spoil_no_others(dtype: torch.dtype) -> None:
    """They are divided by 1e-12; what that makes large stays out of the other channels' gradients."""
    x = _inputs((9,), dtype=dtype)
    x["q"][..., 1] = 0
    x["k"][..., 2] = 0
    exact = {name: t.double() for name, t in x.items()}
    naive = partial(cross_covariance_attention, impl="naive")
    truth, low, got = (outputs_and_gradients(f, t) for f, t in ((naive, exact), (naive, x), (run_triton, x)))
    others = {"gradient of q": [0, 2, 3, 4], "gradient of k": [0, 1, 3, 4]}
    for name, expected in truth.items():
        of = others.get(name, slice(None))
        assert_within_budget(name, got[name][..., of], expected[..., of], low[name][..., of], 4.0)


def test_small_gradients_survive_in_float16() -> None:
    """Entries of [D, D] go into products at the size of one, so that any scale keeps its bits."""
    x = _inputs((9,), dtype=torch.float32)
    x |= {name: x[name].half().float() for name in "qkv"}
    wide = outputs_and_gradients(run_triton, x)
    large = x | {"k": 2048 * x["k"]}
    half = outputs_and_gradients(run_triton, {name: t.half() for name, t in large.items()})
    scale = float(wide["gradient of q"].abs().max())
    torch.testing.assert_close(
        half["gradient of q"].float(), wide["gradient of q"], rtol=0.01, atol=0.005 * scale
    )


def test_a_single_position_has_no_gradient_for_q_and_k() -> None:
    """Cosines are then 1 or -1, whatever the numbers; what is left is rounding."""
    got = outputs_and_gradients(run_triton, _inputs((1,), dtype=torch.float32))
    assert float(max(got[f"gradient of {name}"].abs().max() for name in "qk")) < 1e-5


def test_results_do_not_depend_on_the_rest_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: how positions are cut depends on their number and on the head size only."""
    monkeypatch.setattr(fused, "SHARE", 0)
    x = _inputs((100,), batch=3, dtype=torch.bfloat16)
    alone = {name: t[1:2] if name in "qkv" else t for name, t in x.items()}
    assert torch.equal(run_triton(**x)[1:2], run_triton(**alone))


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    size=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    width=st.integers(1, 20),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    seed=st.integers(0, 999),
)
def test_any_shape_matches_the_specification(  # type: ignore[no-untyped-def]
    size, batch, heads, width, layouts, seed
) -> None:
    """Which entries meet, not how they round: a budget from so few numbers would be a matter of luck."""
    shape = {"batch": batch, "heads": heads, "width": width, "seed": seed, "dtype": torch.float32}
    tensors = _inputs(tuple(size), **shape)
    for name, layout in zip("qkv", layouts, strict=True):
        tensors[name] = _inputs(tuple(size), **shape, layout=layout)[name]
    exact = {name: x.double() for name, x in tensors.items()}
    truth = outputs_and_gradients(partial(cross_covariance_attention, impl="naive"), exact)
    for name, value in outputs_and_gradients(run_triton, tensors).items():
        norms = tensors[name[-1]].flatten(1, -3).norm(dim=1) if name[-1] in "qk" else None
        scale = max(1.0, float(truth[name].abs().max()), 0.0 if norms is None else 1 / float(norms.min()))
        assert (value - truth[name]).abs().max() <= 2e-5 * scale, name


def test_repeated_backward_passes_are_equal_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "SHARE", 0)
    tensors = _inputs((9, 23), dtype=torch.bfloat16)
    first, second = (outputs_and_gradients(run_triton, tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_float32_temperature_beside_bfloat16_features() -> None:
    """What mixed precision sends; its gradient comes back in its own dtype."""
    x = _inputs((9,), dtype=torch.bfloat16)
    x["temperature"] = torch.tensor([1.001, 0.3003], device=DEVICE)
    got = outputs_and_gradients(run_triton, x)
    eager = outputs_and_gradients(partial(cross_covariance_attention, impl="eager"), x)
    assert got["gradient of temperature"].dtype == torch.float32
    torch.testing.assert_close(
        got["gradient of temperature"], eager["gradient of temperature"], rtol=1e-5, atol=1e-5
    )


def test_an_empty_batch_gives_empty_results_and_a_zero_gradient() -> None:
    got = outputs_and_gradients(run_triton, _inputs((5,), batch=0, dtype=torch.float32))
    assert got["output 0"].shape == (0, 5, 2, 5)
    assert not got["gradient of temperature"].any()


@triton.jit
def _distance(x, strides, inner, place, out):
    """Bytes from a tensor's start to a place, as the kernels compute the address."""
    zero = tl.zeros([16], tl.int32)
    columns = (zero + 3, zero + 3, zero, zero == 0)
    places = addresses((x, strides), tl.full([], 1, tl.int64), zero + place, inner, columns)
    tl.store(out, tl.min(tl.min(places.to(tl.int64), 1), 0) - x.to(tl.int64))


@pytest.mark.parametrize(
    ("strides", "inner", "expected"),
    [
        ((0, 0, 0, 2**30 + 8, 0, 1), None, 35 * (2**30 + 8)),
        ((0, 2**31 + 8, 2**30 + 8, 0, 0, 1), (4, 5), 2**31 + 8 + 3 * (2**30 + 8)),
        ((0, 0, 0, 0, 2**30 + 8, 1), None, 3 * (2**30 + 8)),
        ((0, 0, 0, 0, None, 2**30 + 8), None, 3 * (2**30 + 8)),
        ((2**31 + 8, 0, 0, 0, 0, 1), None, 2**31 + 8),
    ],
    ids=["joined axes", "axes", "head", "channels of joined heads", "batch"],
)
def test_offsets_beyond_two_to_the_31_are_exact(
    strides: tuple[int | None, ...], inner: tuple[int, int] | None, expected: int
) -> None:
    """Addresses of a tensor of float16 too large to make; nothing is read there."""
    x = torch.zeros(1, dtype=torch.float16, device=DEVICE)
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _distance[(1,)](x, strides, inner, 35, out)
    assert int(out) == 2 * expected


def test_torch_accepts_the_operator() -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch itself checks them."""
    x = _inputs((5,), dtype=torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fused._attention, tuple(t.requires_grad_() for t in x.values()), test_utils=tests)


def test_compiles_without_a_break() -> None:
    tensors = _inputs((5, 2), dtype=torch.float32)

    def run(**x: Tensor) -> Tensor:
        return 2 * run_triton(**x).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = (outputs_and_gradients(f, tensors) for f in (run, compiled))
    torch.testing.assert_close(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "heads", "width"),
    [((196,), 8, 48), ((48, 40, 56), 4, 16), ((96, 96, 96), 8, 16), ((64, 64, 64), 2, 64)],
)
def test_real_sizes_match_the_specification(
    size: tuple[int, ...], heads: int, width: int, dtype: torch.dtype
) -> None:
    _assert_within_budget(_inputs(size, heads=heads, width=width, dtype=dtype))
