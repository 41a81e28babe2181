"""Cross-covariance attention: eager against the specification, and both against published arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from medattn_kernels.crosscov import cross_covariance_attention, eager
from medattn_kernels.testing import (
    AWKWARD_SIZES,
    LAYOUTS,
    Layout,
    assert_meets_budget,
    assert_within_budget,
    make_qkv,
    outputs_and_gradients,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("impl", ["naive", "eager"])


def _inputs(size: tuple[int, ...], *, heads: int = 3, width: int = 5, **options: Any) -> dict[str, Tensor]:
    """q, k, v and a temperature of its own for every head."""
    x = make_qkv(size, heads=heads, width=width, value_width=width, **options)
    return x | {"temperature": torch.linspace(0.5, 4.0, heads, dtype=x["q"].dtype)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", AWKWARD_SIZES[1:], ids=lambda s: "x".join(map(str, s)))
def test_eager_matches_the_specification_in_every_gradient(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Sums in float32 at least, whatever the dtype."""
    assert_meets_budget(
        cross_covariance_attention, _inputs(size, dtype=dtype), "eager", sums=("temperature",)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [4, 24, 33, 128])
def test_eager_matches_the_specification_at_every_head_size(width: int, dtype: torch.dtype) -> None:
    tensors = _inputs((6, 7), heads=2, width=width, dtype=dtype, batch=1)
    assert_meets_budget(cross_covariance_attention, tensors, "eager", sums=("temperature",))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_long_sums_in_many_pieces_match_the_specification(dtype: torch.dtype) -> None:
    """A sum over 27,000 positions in the dtype of the features would be far outside the budget."""
    tensors = _inputs((30, 30, 30), heads=4, width=16, dtype=dtype)
    tensors |= {name: tensors[name] + 0.5 for name in "qkv"}  # no sum is near zero
    assert_meets_budget(cross_covariance_attention, tensors, "eager", sums=("temperature",))


@settings(max_examples=40, deadline=None)
@given(
    size=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    width=st.integers(1, 9),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
)
def test_eager_matches_the_specification_for_any_shape_and_layout(  # type: ignore[no-untyped-def]
    size, batch, heads, width, layouts
) -> None:
    """In float64 both agree to rounding."""
    shape = {"batch": batch, "heads": heads, "width": width}
    tensors = _inputs(tuple(size), **shape)
    for name, layout in zip("qkv", layouts, strict=True):
        tensors[name] = _inputs(tuple(size), **shape, layout=layout)[name]
    naive, fast = (
        outputs_and_gradients(partial(cross_covariance_attention, impl=impl), tensors)
        for impl in ("naive", "eager")
    )
    torch.testing.assert_close(fast, naive, rtol=1e-10, atol=1e-11)


@BOTH
def test_formulas_written_out_by_hand(impl: Any) -> None:
    """One channel pair and one position after the other, as in the docstring."""
    x = _inputs((2, 3), batch=2, heads=2, width=3)
    expected = torch.zeros_like(x["v"]).flatten(1, 2)
    for b in range(2):
        for h in range(2):
            q, k, v = (x[name].flatten(1, 2)[b, :, h] for name in "qkv")
            for c in range(3):
                cosines = [q[:, c] @ k[:, d] / (q[:, c].norm() * k[:, d].norm()) for d in range(3)]
                weights = torch.stack([(x["temperature"][h] * s).exp() for s in cosines])
                for d in range(3):
                    expected[b, :, h, c] += weights[d] / weights.sum() * v[:, d]
    actual = cross_covariance_attention(**x, impl=impl)
    torch.testing.assert_close(actual.flatten(1, 2), expected)


@BOTH
def test_arithmetic_of_the_published_block(impl: Any) -> None:
    """XCA from one projection [B, N, 3 C], with channels as rows: values and gradients."""
    batch, count, heads, width = 2, 12, 3, 4
    qkv = torch.randn(batch, count, 3 * heads * width, dtype=torch.float64).requires_grad_()
    temperature = torch.rand(heads, 1, 1, dtype=torch.float64).requires_grad_()
    rows = qkv.reshape(batch, count, 3, heads, width).permute(2, 0, 3, 4, 1)
    q, k, v = rows.unbind(0)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    attention = ((q @ k.transpose(-2, -1)) * temperature).softmax(dim=-1)
    expected = (attention @ v).permute(0, 3, 1, 2).reshape(batch, count, heads * width)
    parts = qkv.unflatten(-1, (3, heads, width)).unbind(2)
    actual = cross_covariance_attention(*parts, temperature=temperature.flatten(), impl=impl).flatten(-2)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    leaves = (qkv, temperature)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, weight), torch.autograd.grad(expected, leaves, weight)
    )


@BOTH
def test_gradients_agree_with_finite_differences(impl: Any) -> None:
    tensors = _inputs((3, 2), batch=2, heads=2, width=3)
    names, values = list(tensors), [t.requires_grad_() for t in tensors.values()]

    def run(*xs: Tensor) -> Tensor:
        return cross_covariance_attention(**dict(zip(names, xs, strict=True)), impl=impl)

    assert torch.autograd.gradcheck(run, values)


@BOTH
def test_the_order_of_positions_and_the_scale_of_q_and_k_do_not_matter(impl: Any) -> None:
    """No position enters, and channels are normalised (reference, check 2)."""
    x = _inputs((11,))
    out = cross_covariance_attention(**x, impl=impl)
    order = torch.randperm(11)
    moved = {name: t[:, order] if name in "qkv" else t for name, t in x.items()}
    torch.testing.assert_close(cross_covariance_attention(**moved, impl=impl), out[:, order])
    scaled = x | {"q": 300 * x["q"], "k": x["k"] * torch.linspace(0.01, 5, 5)}
    torch.testing.assert_close(cross_covariance_attention(**scaled, impl=impl), out)


@BOTH
def test_weights_sum_to_one(impl: Any) -> None:
    """Equal channels of v come back as they are (reference, check 3)."""
    x = _inputs((4, 3))
    x["v"] = x["v"][..., :1].expand(-1, -1, -1, -1, 5)
    torch.testing.assert_close(cross_covariance_attention(**x, impl=impl), x["v"])


@BOTH
def test_batches_and_heads_are_independent(impl: Any) -> None:
    """A permuted batch or head order permutes the output."""
    x, order = _inputs((5, 6), batch=3), torch.tensor([2, 0, 1])
    run = partial(cross_covariance_attention, impl=impl)
    out = run(**x)
    batch = {name: t[order] if name in "qkv" else t for name, t in x.items()}
    torch.testing.assert_close(run(**batch), out[order])
    heads = {name: t[..., order, :] if name in "qkv" else t[order] for name, t in x.items()}
    torch.testing.assert_close(run(**heads), out[..., order, :])


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_of_zeros_have_equal_weights_and_spoil_no_others(impl: Any, dtype: torch.dtype) -> None:
    """They are divided by 1e-12, so only their own gradients are large."""
    x = _inputs((9,), dtype=dtype)
    x["q"][..., 1] = 0
    x["k"][..., 2] = 0
    got = outputs_and_gradients(partial(cross_covariance_attention, impl=impl), x)
    truth = outputs_and_gradients(
        partial(cross_covariance_attention, impl="naive"), {n: t.double() for n, t in x.items()}
    )
    low = outputs_and_gradients(partial(cross_covariance_attention, impl="naive"), x)
    mean = x["v"].double().mean(-1)
    torch.testing.assert_close(got["output 0"][..., 1].double(), mean, rtol=0.01, atol=0.01)
    others = {"gradient of q": [0, 2, 3, 4], "gradient of k": [0, 1, 3, 4]}
    for name, expected in truth.items():
        of = others.get(name, slice(None))
        assert_within_budget(name, got[name][..., of], expected[..., of], low[name][..., of], 4.0)


@BOTH
def test_a_norm_below_eps_is_a_constant(impl: Any) -> None:
    """As in torch.nn.functional.normalize: such a channel is divided by 1e-12, not by its norm."""
    x = _inputs((4,), batch=1, heads=1, width=2)
    x["q"] = x["q"] * torch.tensor([1e-14, 1.0])
    q, k, v = (x[n][0, :, 0].mT for n in "qkv")
    units = q / torch.stack([torch.tensor(1e-12), q[1].norm()])[:, None]
    weights = units @ F.normalize(k, dim=1).mT
    expected = (x["temperature"][0] * weights).softmax(-1) @ v
    torch.testing.assert_close(cross_covariance_attention(**x, impl=impl)[0, :, 0].mT, expected)


def test_a_single_position_has_no_gradient_for_q_and_k() -> None:
    """Cosines are then 1 or -1, whatever the numbers; what is left is rounding."""
    got = outputs_and_gradients(
        partial(cross_covariance_attention, impl="eager"), _inputs((1,), dtype=torch.float32)
    )
    assert float(max(got[f"gradient of {name}"].abs().max() for name in "qk")) < 1e-5


@pytest.mark.parametrize("limit", [1, 50, 300, 5000])
def test_pieces_of_any_size_give_the_same_result(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one batch entry, whole entries, several of them."""
    tensors = _inputs((7, 5), batch=3)
    whole = outputs_and_gradients(cross_covariance_attention, tensors)
    monkeypatch.setattr("medattn_kernels._chunk.LOGITS_CPU", limit)
    torch.testing.assert_close(outputs_and_gradients(cross_covariance_attention, tensors), whole)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [2, 5], ids="batch {}".format)
@pytest.mark.parametrize("in_place", [1, 2**40], ids=["one head at a time", "in one call"])
def test_both_ways_to_write_a_product_match_the_specification(
    in_place: int, batch: int, layout: Layout, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer entries than heads and with more, from inputs of every layout."""
    monkeypatch.setattr(eager, "IN_PLACE", in_place)
    tensors = _inputs((6, 11), batch=batch, width=8, layout=layout, dtype=dtype)
    assert_meets_budget(cross_covariance_attention, tensors, "eager", sums=("temperature",))


@pytest.mark.parametrize("batch", [2, 5], ids="batch {}".format)
@pytest.mark.parametrize("layout", ["one projection", "channels first", "every second channel"])
@pytest.mark.parametrize("in_place", [1, 2**40], ids=["one head at a time", "in one call"])
def test_only_views_that_blas_cannot_take_are_copied(
    in_place: int, layout: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch clones for bmm a matrix without a unit stride, and no other."""
    monkeypatch.setattr(eager, "IN_PLACE", in_place)
    if layout == "one projection":  # as AttentionLayer splits it
        parts = torch.randn(batch, 7, 9, 3 * 4 * 16).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (4, 16)) for x in parts)
    elif layout == "channels first":
        q, k, v = (torch.randn(batch, 4, 16, 7, 9).movedim((1, 2), (-2, -1)) for _ in "qkv")
    else:
        q, k, v = (torch.randn(batch, 7, 9, 4, 32)[..., ::2] for _ in "qkv")
    temperature = torch.ones(4)
    with profile(activities=[ProfilerActivity.CPU]) as done:
        out, *statistics = eager.run_forward(q, k, v, temperature)
        eager.run_backward(torch.randn_like(out), q, k, v, temperature, *statistics)
    cloned = "aten::clone" in {event.key for event in done.key_averages()}
    assert cloned == (layout == "every second channel")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expanded_inputs_and_gradients_of_every_layout(layout: Layout) -> None:
    """Stride 0 in the inputs and, after a plain sum, in the gradient that comes back."""
    x = _inputs((6, 3), layout=layout)
    q = x["q"][:, :, :1].expand(-1, -1, 3, -1, -1).requires_grad_()
    results = []
    for impl in ("eager", "naive"):
        out = cross_covariance_attention(**x | {"q": q}, impl=impl)
        results.append(torch.autograd.grad(out.sum(), q)[0])
    torch.testing.assert_close(*results)


@BOTH
def test_an_empty_batch_gives_an_empty_output_and_a_zero_gradient(impl: Any) -> None:
    results = outputs_and_gradients(partial(cross_covariance_attention, impl=impl), _inputs((5, 4), batch=0))
    assert results["output 0"].shape == (0, 5, 4, 3, 5)
    assert not results["gradient of temperature"].any()


@BOTH
def test_a_float32_temperature_beside_bfloat16_features_is_not_rounded(impl: Any) -> None:
    """What mixed precision sends; its gradient comes back in its own dtype."""
    x = _inputs((9,), dtype=torch.bfloat16) | {"temperature": torch.tensor([1.001, 3.003, 0.3003])}
    got = outputs_and_gradients(partial(cross_covariance_attention, impl=impl), x)
    assert got["output 0"].dtype == got["gradient of q"].dtype == torch.bfloat16
    assert got["gradient of temperature"].dtype == torch.float32
    truth = outputs_and_gradients(cross_covariance_attention, {n: t.double() for n, t in x.items()})
    for name, value in got.items():
        torch.testing.assert_close(value.double(), truth[name], rtol=0.02, atol=0.02)


def test_repeated_backward_passes_are_equal_bit_for_bit() -> None:
    tensors = _inputs((9, 10, 8), dtype=torch.float32)
    first, second = (outputs_and_gradients(cross_covariance_attention, tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_torch_accepts_the_operator() -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch itself checks them."""
    x = _inputs((5, 3), dtype=torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(eager._attention, tuple(t.requires_grad_() for t in x.values()), test_utils=tests)


def test_compiles_without_a_break_and_with_the_same_gradients() -> None:
    tensors = _inputs((7, 5), dtype=torch.float32)

    def run(**x: Tensor) -> Tensor:
        return 2 * cross_covariance_attention(**x).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = (outputs_and_gradients(f, tensors) for f in (run, compiled))
    torch.testing.assert_close(got, expected)


@BOTH
def test_autocast_casts_inputs_to_its_own_dtype(impl: Any) -> None:
    """Equal to an explicit cast; the temperature stays float32."""
    x = _inputs((4, 5), dtype=torch.float32)
    expected = cross_covariance_attention(
        **{n: t if n == "temperature" else t.bfloat16() for n, t in x.items()},
        impl=impl,
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = cross_covariance_attention(**x, impl=impl)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": torch.zeros(2, 4, 3, 6)}, r"v must have the shape of q, .* got v \[2, 4, 3, 6\] and q \[2, 4"),
        ({"k": torch.zeros(2, 4, 3, 6)}, r"k must have the shape of q, got k \[2, 4, 3, 6\]"),
        ({"temperature": torch.ones(2)}, r"temperature must be \[3\] \(heads\), got \[2\]"),
        ({"temperature": torch.ones(3, 1, 1)}, r"temperature must be \[3\] \(heads\), got \[3, 1, 1\]"),
        ({"temperature": torch.ones(3).int()}, r"temperature must be floating point, got torch.int32"),
        ({"temperature": torch.ones(3).to("meta")}, r"temperature must be on the device of q, got meta"),
        ({"impl": "fast"}, r"cross_covariance_attention: unknown impl='fast'; expected 'naive' or 'eager'"),
    ],
)
def test_arguments_are_refused_by_name_and_value(changes: dict[str, Any], message: str) -> None:
    """One sentence with argument, value and rule."""
    with pytest.raises((TypeError, ValueError), match=message):
        cross_covariance_attention(**_inputs((4,), dtype=torch.float32) | changes)
