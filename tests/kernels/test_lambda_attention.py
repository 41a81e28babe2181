"""Lambda attention: the specification against the paper's own sums, eager against the specification."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medattn_kernels.lambdas import eager, lambda_attention
from medattn_kernels.lambdas.convolution import Convolution
from medattn_kernels.testing import (
    AWKWARD_SIZES,
    LAYOUTS,
    Layout,
    assert_meets_budget,
    make_qkv,
    outputs_and_gradients,
)

ROWS = (7, 5, 9)  # of the tables: shorter and longer than twice the sizes below
SCOPES = {"no table": (), "one row": (1, 1, 1), "shorter": (3, 1, 3), "longer": (9, 17, 11), "mixed": ROWS}
IMPLS = ("naive", "eager")
WAYS = {"convolved": (False, 1e9), "transformed": (False, 0.0), "queries first": (True, 0.0)}


def make_inputs(
    size: tuple[int, ...],
    rows: tuple[int, ...] = ROWS,
    *,
    batch: int = 2,
    heads: int = 3,
    depth: int = 2,
    width: int = 5,
    value_width: int = 6,
    dtype: torch.dtype = torch.float64,
    layout: Layout = "contiguous",
) -> dict[str, Tensor]:
    """q, k, v and, unless `rows` is empty, a table whose sums are of the order of one."""
    shape = {"batch": batch, "width": width, "value_width": value_width}
    queries = make_qkv(size, heads=heads, dtype=dtype, layout=layout, **shape)  # type: ignore[arg-type]
    context = make_qkv(size, heads=depth, dtype=dtype, layout=layout, seed=1, **shape)  # type: ignore[arg-type]
    tensors = {"q": queries["q"], "k": context["k"], "v": context["v"]}
    if rows:
        generator = torch.Generator().manual_seed(2)
        shaped = (*rows[: len(size)], depth, width)
        table = torch.randn(shaped, generator=generator, dtype=torch.float64)
        tensors["table"] = (table * math.prod(shaped[:-2]) ** -0.5).to(dtype)
    return tensors


def take(way: str, patch: pytest.MonkeyPatch) -> None:
    """Make eager go one of the `WAYS`, whatever the shape."""
    queries_first, faster_direct = WAYS[way]
    patch.setattr("medattn_kernels.lambdas.eager.queries_first", lambda *_: queries_first)
    patch.setattr("medattn_kernels.lambdas.convolution.FASTER_DIRECT", faster_direct)


def _embeddings(table: Tensor, size: tuple[int, ...]) -> Tensor:
    """The paper's E: [N, M, K, U], one vector per pair of positions, zero beyond the table."""
    grid = torch.cartesian_prod(*(torch.arange(n) for n in size)).view(-1, len(size))
    index = grid[None] - grid[:, None] + torch.tensor([(n - 1) // 2 for n in table.shape[: len(size)]])
    inside = ((index >= 0) & (index < torch.tensor(table.shape[: len(size)]))).all(-1)
    found = table[tuple((index * inside[..., None]).unbind(-1))]  # [N, M, U, K]
    return (found * inside[..., None, None]).transpose(-1, -2)


def _published(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """The einsums of the paper's pseudo-code, with its intra-depth."""
    queries = q.flatten(1, -3).transpose(1, 2)  # [b, h, n, k]
    keys, values = (x.flatten(1, -3) for x in (k, v))  # [b, m, u, k] and [b, m, u, v]
    softmax_keys = keys.softmax(dim=1)
    content_lambda = torch.einsum("bmuk,bmuv->bkv", softmax_keys, values)
    position_lambdas = torch.einsum("nmku,bmuv->bnkv", _embeddings(table, tuple(q.shape[1:-2])), values)
    content_output = torch.einsum("bhnk,bkv->bnhv", queries, content_lambda)
    position_output = torch.einsum("bhnk,bnkv->bnhv", queries, position_lambdas)
    return (content_output + position_output).view(*q.shape[:-1], v.shape[-1])


@pytest.mark.parametrize("rows", SCOPES.values(), ids=SCOPES)
@pytest.mark.parametrize("size", AWKWARD_SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_published_einsums_in_every_gradient(
    impl: str, size: tuple[int, ...], rows: tuple[int, ...]
) -> None:
    """Against a dense tensor of one embedding per pair of positions, for tables of any extent."""
    tensors = make_inputs(size, rows)
    zero = {} if rows else {"table": tensors["q"].new_zeros(*[1] * len(size), 2, 5)}
    expected = outputs_and_gradients(lambda **x: _published(**x, **zero), tensors)
    actual = outputs_and_gradients(partial(lambda_attention, impl=impl), tensors)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_local_form_is_the_published_lambda_convolution(impl: str) -> None:
    """Values as images with U channels, a convolution to K channels, no bias."""
    x = make_inputs((6, 7), (3, 5))
    images = x["v"].movedim((-1, -2), (1, 2)).flatten(0, 1)  # [b v, u, *size]
    lambdas = F.conv2d(images, x["table"].movedim((-1, -2), (0, 1)), padding=(1, 2))
    lambdas = lambdas.unflatten(0, (2, -1)).movedim((1, 2), (-1, -2))  # [b, *size, k, v]
    expected = x["q"] @ lambdas
    content = lambda_attention(x["q"], x["k"], x["v"])
    torch.testing.assert_close(lambda_attention(**x, impl=impl) - content, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_table_it_is_linear_attention_with_a_softmax_over_positions(impl: str) -> None:
    """And the order of the positions of k and v does not matter."""
    x = make_inputs((4, 3, 5), ())
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = {n: x[n].flatten(1, 3)[:, order].view(x[n].shape) for n in "kv"}
    weights = x["k"].flatten(1, 3).softmax(1)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 2, 5, dtype=torch.float64))
    summary = sum(weights[:, :, u].mT @ x["v"].flatten(1, 3)[:, :, u] for u in range(2))
    expected = torch.einsum("bijlhk,bkv->bijlhv", x["q"], summary)
    torch.testing.assert_close(lambda_attention(x["q"], **shuffled, impl=impl), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", IMPLS)
def test_table_entry_is_key_minus_query_plus_centre_and_nothing_lies_beyond(impl: str) -> None:
    """Keys so low that one position takes the whole softmax, a table with three different entries."""
    on = torch.ones(1, 6, 1, 1, dtype=torch.float64)
    values = torch.tensor([1.0, 10, 100, 1000, 10000, 100000], dtype=torch.float64).view(1, 6, 1, 1)
    table = torch.tensor([2.0, 3, 5], dtype=torch.float64).view(3, 1, 1)
    keys = torch.full_like(on, -1e4)
    keys[0, 0] = 0
    expected = torch.tensor([3.0 + 50, 532, 5320, 53200, 532000, 320000]).double() + 1
    expected[0] = 3 + 50 + 1
    expected[1] = 2 + 30 + 500 + 1
    expected[2:5] = torch.tensor([5320.0, 53200, 532000]).double() + 1
    actual = lambda_attention(on, keys, values, table=table, impl=impl)  # type: ignore[arg-type]
    torch.testing.assert_close(actual.flatten(), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_shifted_volumes_give_shifted_outputs_away_from_borders(impl: str) -> None:
    """The position part depends on offsets only; the content part is taken off."""
    x = make_inputs((9, 8), (3, 3))
    moved = x | {n: x[n].roll((2, 1), (1, 2)) for n in "qkv"}
    outputs = [
        lambda_attention(**t, impl=impl) - lambda_attention(t["q"], t["k"], t["v"]) for t in (x, moved)
    ]  # type: ignore[arg-type]
    torch.testing.assert_close(outputs[1][:, 3:-1, 2:-1], outputs[0][:, 1:-3, 1:-2])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_agree_with_finite_differences(impl: str) -> None:
    """All inputs and the table, in float64."""
    x = make_inputs((3, 2), (3, 5), batch=1, heads=2, width=2, value_width=3)
    names, values = list(x), [t.requires_grad_() for t in x.values()]

    def run(*given: Tensor) -> Tensor:
        return lambda_attention(**dict(zip(names, given, strict=True)), impl=impl)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize("rows", SCOPES.values(), ids=SCOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [*AWKWARD_SIZES, (13, 11)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("way", ["convolved", "queries first"])
def test_eager_is_as_exact_as_the_specification(
    size: tuple[int, ...],
    dtype: torch.dtype,
    rows: tuple[int, ...],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Output and every gradient, with the budget that the specification's own rounding sets.

    Without a table the gradients of k and v are those of one matrix, sums over all positions.
    """
    take(way, monkeypatch)
    tensors = make_inputs(size, rows, dtype=dtype)
    assert_meets_budget(lambda_attention, tensors, "eager", ("table",) if rows else ("k", "v"))


@settings(max_examples=60, deadline=None)
@given(
    size=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    rows=st.lists(st.sampled_from([1, 3, 5, 7, 13]), min_size=3, max_size=3),
    heads=st.integers(1, 3),
    depth=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    layout=st.sampled_from(LAYOUTS),
    way=st.sampled_from(list(WAYS)),
    limit=st.sampled_from([1, 100, 1000, 2**19]),
)
def test_eager_matches_the_specification_for_any_shape(  # type: ignore[no-untyped-def]
    size, rows, heads, depth, widths, layout, way, limit
) -> None:
    """In float64 both agree to rounding, in either order and in pieces of any size."""
    tensors = make_inputs(
        tuple(size),
        tuple(rows),
        heads=heads,
        depth=depth,
        width=widths[0],
        value_width=widths[1],
        layout=layout,
    )
    with pytest.MonkeyPatch.context() as patch:
        take(way, patch)
        patch.setattr("medattn_kernels._chunk.LOGITS_CPU", limit)
        fast = outputs_and_gradients(partial(lambda_attention, impl="eager"), tensors)
    naive = outputs_and_gradients(partial(lambda_attention, impl="naive"), tensors)
    torch.testing.assert_close(fast, naive, rtol=1e-10, atol=1e-11)


def test_small_tables_are_convolved_and_large_ones_transformed() -> None:
    """By the number of products: local scopes one way, the global form the other."""
    size = (24, 24, 24)
    assert Convolution(torch.zeros(5, 5, 5, 1, 2), size).direct
    assert not Convolution(torch.zeros(47, 47, 47, 1, 2), size).direct
    assert Convolution(torch.zeros(1, 1, 1, 1, 2), (1, 1, 1)).direct


@pytest.mark.parametrize("limit", [1, 100, 400, 3000, 10**6])
@pytest.mark.parametrize("way", ["convolved", "queries first"])
def test_pieces_of_any_size_give_the_same_result(
    limit: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way of cutting the work: one channel or query, several, several batch entries."""
    take(way, monkeypatch)
    tensors = make_inputs((7, 5), batch=3)
    run = partial(lambda_attention, impl="eager")
    whole = outputs_and_gradients(run, tensors)
    monkeypatch.setattr("medattn_kernels._chunk.LOGITS_CPU", limit)
    torch.testing.assert_close(outputs_and_gradients(run, tensors), whole)


def test_float32_tables_beside_bfloat16_features() -> None:
    """What mixed precision sends: the table is used in q's dtype, its gradient comes in its own."""
    tensors = make_inputs((9, 4), dtype=torch.bfloat16)
    wide = tensors | {"table": tensors["table"].float()}
    run = partial(lambda_attention, impl="eager")
    got, expected = (outputs_and_gradients(run, x) for x in (wide, tensors))
    assert got["gradient of table"].dtype == torch.float32
    for name, value in got.items():
        torch.testing.assert_close(value.to(torch.bfloat16), expected[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_batches_and_heads_are_independent(impl: str) -> None:
    """A permuted batch or order of heads permutes the output; a permuted depth changes nothing."""
    x, order = make_inputs((5, 6), batch=3), torch.tensor([2, 0, 1])
    run = partial(lambda_attention, impl=impl)  # type: ignore[arg-type]
    out = run(**x)
    torch.testing.assert_close(run(**x | {n: x[n][order] for n in "qkv"}), out[order])
    torch.testing.assert_close(run(**x | {"q": x["q"][..., order, :]}), out[..., order, :])
    torch.testing.assert_close(run(**x | {n: x[n].flip(-2) for n in ("k", "v", "table")}), out)


def test_content_weights_of_large_volumes_survive_float16() -> None:
    """A uniform softmax over 2^18 positions has weights that float16 rounds by a tenth; the mean is exact."""
    size = (64, 64, 64)
    ones = torch.ones(1, *size, 1, 1, dtype=torch.float16)
    out = lambda_attention(ones, torch.zeros_like(ones), ones, impl="eager")
    torch.testing.assert_close(out, ones)


def test_an_empty_batch_gives_an_empty_output_and_zero_table_gradients() -> None:
    """A batch of size zero is legal, as in PyTorch's own layers."""
    results = outputs_and_gradients(partial(lambda_attention, impl="eager"), make_inputs((5, 4), batch=0))
    assert results["output 0"].shape == (0, 5, 4, 3, 6)
    assert all(not g.any() for name, g in results.items() if name.startswith("gradient"))


@pytest.mark.parametrize("way", WAYS)
def test_repeated_backward_passes_are_equal_bit_for_bit(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(way, monkeypatch)
    tensors = make_inputs((9, 10, 8), dtype=torch.float32)
    run = partial(lambda_attention, impl="eager")
    first, second = (outputs_and_gradients(run, tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_torch_accepts_the_operator() -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch itself checks them."""
    x = make_inputs((5, 3), (3, 5), dtype=torch.float32)
    content = torch.randn(2, 5, 6)
    given = [t.detach().requires_grad_() for t in (x["q"], content, x["v"], x["table"])]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(eager._attention, tuple(given), test_utils=tests)


@pytest.mark.parametrize("rows", [(), ROWS], ids=["content", "both"])
def test_compiles_without_a_break_and_with_the_same_gradients(rows: tuple[int, ...]) -> None:
    tensors = make_inputs((7, 5), rows, dtype=torch.float32)

    def run(**x: Tensor) -> Tensor:
        return 2 * lambda_attention(**x).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = (outputs_and_gradients(f, tensors) for f in (run, compiled))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [(), ROWS], ids=["content", "both"])
def test_autocast_casts_q_k_and_v_to_its_own_dtype(impl: str, rows: tuple[int, ...]) -> None:
    """The table stays as it is; nothing inside is cast once more."""
    x = make_inputs((4, 5), rows, dtype=torch.float32)
    expected = lambda_attention(**{n: t.bfloat16() for n, t in x.items()}, impl=impl)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        out = lambda_attention(**x, impl=impl)  # type: ignore[arg-type]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


def _zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": _zeros(2, 4, 5, 2, 4)}, r"k must be \[B, \*size, U, K\] for q .* got k \[2, 4, 5, 2, 4\]"),
        ({"k": _zeros(2, 4, 5, 0, 5)}, r"k must be .* got k \[2, 4, 5, 0, 5\]"),
        ({"k": _zeros(2, 4, 6, 2, 5)}, r"k must be .* got k \[2, 4, 6, 2, 5\] and q \[2, 4, 5, 3, 5\]"),
        ({"q": _zeros(2, 4, 3, 5)}, r"k must be .* and q \[2, 4, 3, 5\]"),
        ({"v": _zeros(2, 4, 5, 3, 6)}, r"v must match k in all but its last axis, got v \[2, 4, 5, 3, 6\]"),
        ({"v": _zeros(2, 4, 5, 2, 0)}, r"every axis but the batch needs at least one entry"),
        ({"v": _zeros(2, 4, 5, 2, 6).float()}, r"v must have the dtype of q, got torch.float32"),
        ({"v": _zeros(2, 4, 5, 2, 6).to("meta")}, r"v must be on the device of q, got meta and cpu"),
        ({"table": _zeros(3, 4, 2, 5)}, r"table must be \[R, R, 2, 5\] .* got \[3, 4, 2, 5\]"),
        ({"table": _zeros(3, 2, 5)}, r"table must be \[R, R, 2, 5\] .* got \[3, 2, 5\]"),
        ({"table": _zeros(3, 3, 1, 5)}, r"table must be \[R, R, 2, 5\] .* got \[3, 3, 1, 5\]"),
        ({"table": _zeros(3, 3, 2, 5).int()}, r"table must be floating point, got torch.int32"),
        ({"table": _zeros(3, 3, 2, 5).to("meta")}, r"table must be on the device of q, got meta and cpu"),
        ({"impl": "fast"}, r"lambda_attention: unknown impl='fast'; expected 'naive' or 'eager'"),
        ({"impl": "triton"}, r"lambda_attention: impl='triton' takes float32, bfloat16 or float16"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_by_name_and_value(
    changes: dict[str, Tensor | str], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        lambda_attention(**make_inputs((4, 5)) | changes)  # type: ignore[arg-type]


def test_q_k_and_v_that_agree_on_a_wrong_number_of_axes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"q must be \[B, \*size, H, D\] with one to three spatial axes"):
        lambda_attention(*(torch.zeros(2, 3, 4) for _ in range(3)))


def test_transforms_are_refused_in_words() -> None:
    """Only the specification has rules for them."""
    x = make_inputs((4,), dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"lambda_attention: impl='eager' has no rule .* impl='naive'"):
        torch.func.grad(lambda q: lambda_attention(**x | {"q": q}, impl="eager").sum())(x["q"])
    assert torch.func.grad(lambda q: lambda_attention(**x | {"q": q}, impl="naive").sum())(x["q"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["convolved", "queries first"])
def test_a_large_volume_needs_little_memory_beside_inputs_and_output(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lambdas of 48^3 positions with 64 channels would take 450 MB together; fork-free, by a live count."""
    take(way, monkeypatch)
    size = (48, 48, 48)
    x = make_inputs(size, (3, 3, 3), batch=1, heads=1, depth=1, width=16, value_width=64, dtype=torch.float32)
    together = math.prod(size) * 16 * 64 * 4
    with torch.profiler.profile(profile_memory=True) as profile:
        lambda_attention(**x, impl="eager")
    held = peak = 0
    for event in profile.events():
        if event.name == "[memory]":
            held += event.cpu_memory_usage
            peak = max(peak, held)
    assert peak < together / 4
