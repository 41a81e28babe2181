"""Axial attention: eager against the specification, and both against things that are true anyway."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medattn_kernels import axial_attention
from medattn_kernels.axial import eager
from medattn_kernels.testing import (
    AWKWARD_SIZES,
    LAYOUTS,
    assert_within_budget,
    make_qkv,
    outputs_and_gradients,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARAMETERS = ("gradient of rel", "gradient of gain")
SIZES_AND_AXES = [
    pytest.param(size, axis, id=f"{'x'.join(map(str, size))}-axis{axis}")
    for size in AWKWARD_SIZES
    for axis in range(len(size))
]


def _tables(
    rows: tuple[int, int, int], heads: int = 3, width: int = 5, value_width: int = 6
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "rel_q": (rows[0], width),
        "rel_k": (rows[1], width),
        "rel_v": (rows[2], value_width),
        "gain": (3, heads),
    }
    return {n: torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def _assert_eager_within_budget(tensors: dict[str, Tensor], dtype: torch.dtype, **options: object) -> None:
    low = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    exact = {name: tensor.double() for name, tensor in low.items()}
    truth = outputs_and_gradients(lambda **x: axial_attention(**x, **options, impl="naive"), exact)
    budget = outputs_and_gradients(lambda **x: axial_attention(**x, **options, impl="naive"), low)
    actual = outputs_and_gradients(lambda **x: axial_attention(**x, **options, impl="eager"), low)
    for name in truth:
        # the gradient of a table or gain is a few long sums: one sample of their error says less about it
        factor = 4.0 if name.startswith(PARAMETERS) else 2.0
        assert_within_budget(name, actual[name], truth[name], budget[name], factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "axis"), SIZES_AND_AXES)
def test_eager_with_all_terms_matches_the_specification_in_every_gradient(
    size: tuple[int, ...], axis: int, dtype: torch.dtype
) -> None:
    """Tables shorter and longer than the axis, gain, span and the separate pair, forward and backward."""
    tensors = make_qkv(size) | _tables((7, 31, 3))
    _assert_eager_within_budget(tensors, dtype, axis=axis)
    _assert_eager_within_budget(tensors, dtype, axis=axis, separate=True, span=5, scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", [None, 3])
def test_eager_without_tables_matches_the_specification(dtype: torch.dtype, span: int | None) -> None:
    """Value heads wider and narrower than query heads, with a gain and without."""
    for value_width in (4, 8):
        tensors = make_qkv((4, 6, 3), width=5, value_width=value_width)
        _assert_eager_within_budget(tensors, dtype, axis=1, span=span)
        _assert_eager_within_budget(tensors | {"gain": _tables((1, 1, 1))["gain"]}, dtype, axis=-1, span=span)


@settings(max_examples=20, deadline=None)
@given(
    size=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    axis=st.integers(0, 2),
    heads=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    rows=st.tuples(*[st.sampled_from([1, 3, 9, 21])] * 3),
    terms=st.sets(st.sampled_from(["rel_q", "rel_k", "rel_v", "gain"])),
    span=st.sampled_from([None, 1, 3, 7]),
    layout=st.sampled_from(LAYOUTS),
)
def test_eager_matches_the_specification_for_any_shape_and_choice_of_terms(  # type: ignore[no-untyped-def]
    size, axis, heads, widths, rows, terms, span, layout
) -> None:
    """In float64 both agree to rounding, whatever is switched on and however the inputs lie in memory."""
    tensors = make_qkv(size, heads=heads, width=widths[0], value_width=widths[1], layout=layout)
    tensors |= {n: t for n, t in _tables(rows, heads, *widths).items() if n in terms}
    options = {"axis": axis % len(size), "span": span, "separate": "rel_v" in terms}
    naive = outputs_and_gradients(lambda **x: axial_attention(**x, **options, impl="naive"), tensors)
    eager = outputs_and_gradients(lambda **x: axial_attention(**x, **options, impl="eager"), tensors)
    torch.testing.assert_close(eager, naive, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("impl", ["naive", "eager"])
def test_gradients_agree_with_finite_differences(impl: str) -> None:
    """All inputs, tables and gains, in float64."""
    tensors = make_qkv((2, 3), batch=1, heads=2, width=2, value_width=3) | _tables((3, 5, 3), 2, 2, 3)
    names, values = list(tensors), [t.requires_grad_() for t in tensors.values()]

    def run(*xs: Tensor) -> tuple[Tensor, Tensor]:
        return axial_attention(**dict(zip(names, xs, strict=True)), axis=1, separate=True, impl=impl)

    assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize("impl", ["naive", "eager"])
def test_formula_of_the_paper_written_out_for_each_pair(impl: str) -> None:
    """Equations 3 and 4 of Axial-DeepLab with one Python loop per index, tables read at key minus query."""
    tensors = make_qkv((5,), batch=1, heads=1, width=3, value_width=2) | _tables((9, 9, 9), 1, 3, 2)
    q, k, v = (tensors[n][0, :, 0] for n in "qkv")
    gain = tensors["gain"][:, 0]
    expected = torch.zeros(5, 2, dtype=torch.float64)
    for o in range(5):
        logits = torch.zeros(5, dtype=torch.float64)
        for p in range(5):
            row = p - o + 4
            terms = (q[o] @ k[p], q[o] @ tensors["rel_q"][row], k[p] @ tensors["rel_k"][row])
            logits[p] = 0.7 * sum(g * term for g, term in zip(gain, terms, strict=True))
        for p, weight in enumerate(logits.softmax(0)):
            expected[o] += weight * (v[p] + tensors["rel_v"][p - o + 4])
    actual = axial_attention(**tensors, axis=0, scale=0.7, impl=impl)
    torch.testing.assert_close(actual[0, :, 0], expected)


@pytest.mark.parametrize("impl", ["naive", "eager"])
@pytest.mark.parametrize("name", ["rel_q", "rel_k", "rel_v"])
def test_table_row_is_key_minus_query_plus_centre_and_the_end_rows_repeat(name: str, impl: str) -> None:
    """A hand-made table of three rows: one key is singled out by its offset alone."""
    size, on = 6, torch.ones(1, 6, 1, 1, dtype=torch.float64)
    table = torch.tensor([[-1000.0], [0.0], [1000.0]], dtype=torch.float64)
    if name == "rel_v":
        out = axial_attention(0 * on, on, 0 * on, axis=0, rel_v=table, impl=impl)
        expected = torch.tensor(
            [1000.0 * ((size - 1 - i) - i) / size for i in range(size)]
        )  # later less earlier keys
    else:
        place = torch.arange(size, dtype=torch.float64).view(1, size, 1, 1)
        out = axial_attention(on, on, place, axis=0, scale=1.0, impl=impl, **{name: table})
        # every key after the query has offset >= 1, so they share the last row and the softmax evenly
        expected = torch.tensor([(i + 1 + size - 1) / 2 if i < size - 1 else size - 1.0 for i in range(size)])
    torch.testing.assert_close(out.flatten(), expected.double())


@pytest.mark.parametrize("impl", ["naive", "eager"])
def test_plain_attention_of_one_line_is_scaled_dot_product_attention(impl: str) -> None:
    """1D without relative terms, against PyTorch."""
    x = make_qkv((13,), value_width=5)
    expected = F.scaled_dot_product_attention(*(x[n].transpose(1, 2) for n in "qkv")).transpose(1, 2)
    torch.testing.assert_close(axial_attention(**x, axis=0, impl=impl), expected)


@pytest.mark.parametrize("impl", ["naive", "eager"])
def test_axis_of_a_transposed_volume_is_the_other_axis(impl: str) -> None:
    """Attention along axis 0 of x equals attention along axis 2 of x with these axes exchanged."""
    x, tables = make_qkv((3, 4, 5)), _tables((5, 3, 7))
    swapped = {n: t.transpose(1, 3) for n, t in x.items()}
    along = axial_attention(**x, **tables, axis=0, impl=impl)
    across = axial_attention(**swapped, **tables, axis=2, impl=impl)
    torch.testing.assert_close(across.transpose(1, 3), along)


def test_lines_batches_and_heads_are_independent() -> None:
    """A permuted batch or head order permutes the output; a changed line leaves the others alone."""
    x, tables = make_qkv((4, 5), batch=3), _tables((5, 3, 7))
    gain = tables.pop("gain")
    out = axial_attention(**x, **tables, gain=gain, axis=1)
    order = torch.tensor([2, 0, 1])
    moved = axial_attention(**{n: t[order] for n, t in x.items()}, **tables, gain=gain, axis=1)
    torch.testing.assert_close(moved, out[order])
    heads = axial_attention(
        **{n: t[..., order, :] for n, t in x.items()}, **tables, gain=gain[:, order], axis=1
    )
    torch.testing.assert_close(heads, out[..., order, :])
    changed = {n: t.clone() for n, t in x.items()}
    changed["k"][1, 2] += 1
    same = (axial_attention(**changed, **tables, gain=gain, axis=1) == out).all((-1, -2))
    assert same.logical_not().nonzero().tolist() == [[1, 2, i] for i in range(5)]


@pytest.mark.parametrize("impl", ["naive", "eager"])
@pytest.mark.parametrize("span", [1, 3, 5, 99])
def test_span_hides_keys_further_than_half_of_it(span: int, impl: str) -> None:
    """Which keys reach a query, read from the output's gradient."""
    x = make_qkv((9,), batch=1, heads=1)
    x["v"].requires_grad_()
    for i in range(9):
        (gradient,) = torch.autograd.grad(
            axial_attention(**x, axis=0, span=span, impl=impl)[0, i].sum(), x["v"]
        )
        reached = gradient[0, :, 0].abs().sum(-1).nonzero().flatten().tolist()
        assert reached == [j for j in range(9) if abs(j - i) <= span // 2]


def test_separate_parts_add_up_and_unit_gain_is_no_gain() -> None:
    """separate=True splits the same output; a gain of ones changes nothing."""
    x, tables = make_qkv((3, 4)), _tables((5, 3, 7))
    tables["gain"] = torch.ones_like(tables["gain"])
    content, position = axial_attention(**x, **tables, axis=0, separate=True)
    del tables["gain"]
    torch.testing.assert_close(content + position, axial_attention(**x, **tables, axis=0))


@pytest.mark.parametrize(("sizes", "limit"), [((2, 3, 4), 1), ((2, 3, 4), 5), ((7, 1, 2), 6), ((0, 3), 9)])
def test_boxes_cover_everything_once_within_the_limit(sizes: tuple[int, ...], limit: int) -> None:
    """Whole last axes where they fit, parts of one where they do not."""
    covered = torch.zeros(sizes)
    for box in eager._boxes(sizes, limit):
        covered[box] += 1
        assert 0 < covered[box].numel() <= limit
    assert (covered == 1).all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("limit", [1, 200, 1000])
def test_lines_in_pieces_equal_the_whole(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line at a time, several, and a last piece that is shorter; recomputed in the backward pass."""
    tensors = make_qkv((4, 5), batch=2) | _tables((5, 9, 3))
    whole = outputs_and_gradients(lambda **x: axial_attention(**x, axis=0), tensors)
    monkeypatch.setattr("medattn_kernels._chunk.LOGITS_CPU", limit)
    torch.testing.assert_close(
        outputs_and_gradients(lambda **x: axial_attention(**x, axis=0), tensors), whole
    )


@pytest.mark.parametrize("tables", [True, False])
def test_an_empty_batch_gives_an_empty_output_and_zero_table_gradients(tables: bool) -> None:
    """A batch of size zero is legal, as in PyTorch's own layers."""
    tensors = make_qkv((3, 4), batch=0) | (_tables((3, 3, 3)) if tables else {})
    results = outputs_and_gradients(lambda **x: axial_attention(**x, axis=1), tensors)
    assert results["output 0"].shape == (0, 3, 4, 3, 6)
    assert all(not g.any() for name, g in results.items() if name.startswith("gradient"))


def test_repeated_backward_passes_are_equal_bit_for_bit() -> None:
    """Sums have a fixed order."""
    tensors = {n: t.float() for n, t in (make_qkv((24, 20)) | _tables((9, 47, 9))).items()}
    first, second = (
        outputs_and_gradients(lambda **x: axial_attention(**x, axis=0), tensors) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_without_gradients_and_expanded_ones() -> None:
    """One gradient at a time equals all at once; memory that several entries share is only read."""
    tensors = {n: t.float() for n, t in (make_qkv((4, 5)) | _tables((9, 3, 5))).items()}
    tensors |= {n: tensors[n][:1].expand(2, -1, -1, -1, -1) for n in "kv"}
    every = outputs_and_gradients(lambda **x: axial_attention(**x, axis=1), tensors)
    for name, tensor in tensors.items():
        others = {n: t for n, t in tensors.items() if n != name}
        one = outputs_and_gradients(lambda o=others, **x: axial_attention(**x, **o, axis=1), {name: tensor})
        assert all(torch.equal(one[n], every[n]) for n in one)


def test_a_second_derivative_is_refused() -> None:
    """The error names the operator; `naive` has any number of derivatives."""
    x = {n: t.requires_grad_() for n, t in make_qkv((3,)).items()}
    (first,) = torch.autograd.grad(
        axial_attention(**x, axis=0, impl="eager").sum(), x["q"], create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"axial_attention_eager_backward.* no autograd formula"):
        torch.autograd.grad(first.sum(), x["q"])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_runs_one_by_one() -> None:
    """torch knows no rule for many at once and says so."""
    x = {n: t.float() for n, t in (make_qkv((4, 3)) | _tables((5, 3, 7))).items()}
    queries = torch.stack([x.pop("q"), torch.randn(2, 4, 3, 3, 5)])

    def run(q: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return axial_attention(q, **x, axis=0, impl="eager")

    expected = torch.stack([run(q) for q in queries])  # type: ignore[arg-type, misc]
    torch.testing.assert_close(torch.vmap(run)(queries), expected)


@pytest.mark.parametrize("terms", [(), ("rel_q", "rel_k", "rel_v", "gain")], ids=["content", "all"])
def test_torch_accepts_the_operator(terms: tuple[str, ...]) -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch itself checks them."""
    x = {n: t.float().requires_grad_() for n, t in (make_qkv((4, 2)) | _tables((8, 8, 8))).items()}
    given = [x[n] if n in ("q", "k", "v", *terms) else None for n in x]  # tables as rows by offset, 2 L
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(eager._attention, (*given, 0, 3, 0.5, bool(terms)), test_utils=tests)


@pytest.mark.parametrize("terms", [(), ("rel_q", "rel_k", "rel_v", "gain")], ids=["content", "all"])
def test_compiles_without_a_break_and_with_the_same_gradients(terms: tuple[str, ...]) -> None:
    """The loop over lines writes in place, which tracing it would get wrong."""
    tensors = make_qkv((5, 2)) | {n: t for n, t in _tables((7, 15, 3)).items() if n in terms}

    def run(**x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return axial_attention(**x, axis=0, span=7, separate=bool(terms), impl="eager")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = (outputs_and_gradients(f, tensors) for f in (run, compiled))
    torch.testing.assert_close(got, expected)
