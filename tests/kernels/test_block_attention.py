"""Block attention: eager against the specification, and both against published forms written out by hand."""

from __future__ import annotations

from dataclasses import astuple
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medattn_kernels import block_attention
from medattn_kernels.block import eager
from medattn_kernels.block.tiling import cut, padded, query_blocks
from medattn_kernels.testing import (
    AWKWARD_SIZES,
    LAYOUTS,
    assert_meets_budget,
    make_qkv,
    outputs_and_gradients,
)

DTYPES = (torch.float32, torch.bfloat16)


def _tables(
    axes: int, heads: int = 3, width: int = 5, rows: tuple[int, ...] = (7, 5, 9)
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {f"rel{a}": (rows[a], width) for a in range(axes)} | {"bias": (heads, *rows[:axes])}
    return {n: torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def _run(impl: str | None = None, **arguments: object) -> Tensor:
    """block_attention with the tables rel0, rel1, ... gathered into `rel`."""
    rel = [arguments.pop(f"rel{a}") for a in range(3) if f"rel{a}" in arguments]
    return block_attention(**arguments, rel=rel or None, impl=impl)  # type: ignore[arg-type]


def _assert_eager_within_budget(tensors: dict[str, Tensor], dtype: torch.dtype, **options: object) -> None:
    low = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    assert_meets_budget(lambda **x: _run(**x, **options), low, "eager", ("rel", "bias"))


@pytest.mark.parametrize("padding", ["masked", "zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", AWKWARD_SIZES, ids=lambda s: "x".join(map(str, s)))
def test_eager_with_all_terms_matches_the_specification_in_every_gradient(
    size: tuple[int, ...], dtype: torch.dtype, padding: str
) -> None:
    """Ragged borders, tables shorter than the window, bias, one-sided halo, forward and backward."""
    axes = len(size)
    _assert_eager_within_budget(
        make_qkv(size) | _tables(axes), dtype, block=4, halo=[(0, 3)] * axes, padding=padding
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("halo", [0, 2, 5])
def test_eager_without_tables_matches_the_specification(dtype: torch.dtype, halo: int) -> None:
    """Content logits only, halos up to wider than a block."""
    _assert_eager_within_budget(make_qkv((6, 5, 3), value_width=4), dtype, block=(4, 2, 3), halo=halo)


@settings(max_examples=40, deadline=None)
@given(
    size=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    blocks=st.lists(
        st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 3)]), min_size=3, max_size=3
    ),
    halo=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=3, max_size=3),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    relative=st.booleans(),
    biased=st.booleans(),
    padding=st.sampled_from(["masked", "zero"]),
    offsets=st.sampled_from(["voxels", "queries"]),
    layout=st.sampled_from(LAYOUTS),
)
def test_eager_matches_the_specification_for_any_shape_and_choice_of_terms(  # type: ignore[no-untyped-def]
    size, blocks, halo, widths, relative, biased, padding, offsets, layout
) -> None:
    """In float64 both agree to rounding, strides, borders and memory layouts included."""
    axes = len(size)
    tensors = make_qkv(size, heads=2, width=widths[0], value_width=widths[1], layout=layout)
    wanted = {"bias": biased, "rel0": relative, "rel1": relative, "rel2": relative}
    tensors |= {n: t for n, t in _tables(axes, 2, widths[0]).items() if wanted[n]}
    options = {
        "block": [b for b, _ in blocks[:axes]],
        "stride": [s for _, s in blocks[:axes]],
        "halo": halo[:axes],
        "padding": padding,
        "offsets": offsets,
    }
    naive = outputs_and_gradients(lambda **x: _run("naive", **x, **options), tensors)
    fast = outputs_and_gradients(lambda **x: _run("eager", **x, **options), tensors)
    torch.testing.assert_close(fast, naive, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("impl", ["naive", "eager"])
@pytest.mark.parametrize("padding", ["masked", "zero"])
def test_gradients_agree_with_finite_differences(impl: str, padding: str) -> None:
    """All inputs and tables, in float64, with a ragged border."""
    tensors = make_qkv((3, 2), batch=1, heads=2, width=2, value_width=3) | _tables(2, 2, 2, (3, 3))
    names, values = list(tensors), [t.requires_grad_() for t in tensors.values()]

    def run(*xs: Tensor) -> Tensor:
        return _run(impl, **dict(zip(names, xs, strict=True)), block=2, halo=[(1, 0), 1], padding=padding)

    assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize("impl", ["naive", "eager"])
@pytest.mark.parametrize("size", [(12,), (4, 5), (3, 4, 2)], ids=str)
def test_one_block_without_halo_is_full_attention(size: tuple[int, ...], impl: str) -> None:
    """Against PyTorch's attention over all positions."""
    x = make_qkv(size, value_width=5)
    flat = (x[n].flatten(1, -3).transpose(1, 2) for n in "qkv")
    expected = F.scaled_dot_product_attention(*flat).transpose(1, 2).reshape(x["v"].shape)
    torch.testing.assert_close(block_attention(**x, block=size, halo=0, impl=impl), expected)
    torch.testing.assert_close(block_attention(**x, block=99, halo=7, impl=impl), expected)


@pytest.mark.parametrize("impl", ["naive", "eager"])
def test_block_one_is_stand_alone_self_attention(impl: str) -> None:
    """Each pixel attends to its clipped 5 x 5 neighbourhood with q.(k + row table + column table)."""
    tensors = make_qkv((4, 6), batch=1, heads=1, width=3, value_width=2) | _tables(2, 1, 3, (5, 5))
    del tensors["bias"]
    q, k, v = (tensors[n][0, :, :, 0] for n in "qkv")
    expected = torch.zeros(4, 6, 2, dtype=torch.float64)
    for i, j in product(range(4), range(6)):
        near = [(a, b) for a in range(i - 2, i + 3) for b in range(j - 2, j + 3) if 0 <= a < 4 and 0 <= b < 6]
        keys = [k[a, b] * 3**-0.5 + tensors["rel0"][a - i + 2] + tensors["rel1"][b - j + 2] for a, b in near]
        weights = torch.stack([q[i, j] @ key for key in keys]).softmax(0)
        expected[i, j] = sum(w * v[a, b] for w, (a, b) in zip(weights, near, strict=True))
    torch.testing.assert_close(_run(impl, **tensors, block=1, halo=2)[0, :, :, 0], expected)


def _raster_scan(x: Tensor, q: Tensor, k: Tensor, v: Tensor, block: int, kernel: int, stride: int) -> Tensor:
    """The scan of the head-and-neck network: windows overwrite a clone of x [C, L, L] in raster order."""
    out, side = x.clone(), x.shape[-1]
    for top, left in product(range(0, side, block * stride), repeat=2):
        window = (slice(None), slice(top, top + block * kernel), slice(left, left + block * kernel))
        qw, kw, vw = (t[window].flatten(1) for t in (q, k, v))
        attended = vw @ (qw.T @ kw).softmax(-1).T
        out[window] = attended.view(x[window].shape) + x[window]
    return out


@pytest.mark.parametrize("impl", ["naive", "eager"])
@pytest.mark.parametrize(
    ("side", "channels", "block"),
    [
        pytest.param(32, 6, 3, id="small"),
        pytest.param(128, 16, 12, id="published-128", marks=pytest.mark.slow),
        pytest.param(256, 8, 12, id="published-256", marks=pytest.mark.slow),
    ],
)
def test_raster_scan_of_the_block_unet_is_a_halo_after_the_block(
    side: int, channels: int, block: int, impl: str
) -> None:
    """Windows of 3 blocks every 2 blocks equal query blocks of 2 with a halo of 1 to the right and below."""
    generator = torch.Generator().manual_seed(0)
    x, q, k, v = (torch.randn(channels, side, side, generator=generator) * 0.5 for _ in range(4))
    expected = _raster_scan(x, q, k, v, block, kernel=3, stride=2)
    heads_last = [t.movedim(0, -1)[None, :, :, None] for t in (q, k, v)]
    attended = block_attention(*heads_last, block=2 * block, halo=[(0, block)] * 2, scale=1.0, impl=impl)
    assert ((x + attended[0, :, :, 0].movedim(-1, 0)) - expected).abs().max() < 1e-5


def test_a_key_reaches_only_the_query_blocks_whose_window_holds_it() -> None:
    """One-sided halo in 2D: at most four query blocks (reference, check 3)."""
    x = make_qkv((12, 12), batch=1, heads=1)
    options = {"block": 4, "halo": [(0, 2)] * 2}
    before = block_attention(**x, **options)
    for i, j in [(5, 9), (6, 6), (0, 0), (11, 3)]:
        changed = x | {"k": x["k"].clone(), "v": x["v"].clone()}
        changed["k"][0, i, j] += 1
        changed["v"][0, i, j] += 1
        moved = (block_attention(**changed, **options) != before).flatten(3).any(-1)[0]
        blocks = {(a // 4, b // 4) for a, b in moved.nonzero().tolist()}
        assert blocks == {
            (a, b)
            for a, b in product(range(3), repeat=2)
            if 4 * a <= i < 4 * a + 6 and 4 * b <= j < 4 * b + 6
        }
        assert len(blocks) <= 4


def test_zero_values_give_zero_output() -> None:
    """With v = 0 a residual layer around the operator is the identity (reference, check 5)."""
    x = make_qkv((5, 6, 4))
    assert not block_attention(**x | {"v": torch.zeros_like(x["v"])}, block=4, halo=1).any()


@pytest.mark.parametrize("impl", ["naive", "eager"])
def test_table_row_is_key_minus_query_plus_centre_and_the_end_rows_repeat(impl: str) -> None:
    """Hand-made tables of three rows: all keys after the query share the last row, so the softmax too."""
    size = 8
    on = torch.ones(1, size, 1, 1, dtype=torch.float64)
    place = torch.arange(size, dtype=torch.float64).view(1, size, 1, 1)
    after = torch.tensor([[-1000.0], [0.0], [1000.0]], dtype=torch.float64)
    expected = torch.zeros(size, dtype=torch.float64)
    for i in range(size):
        window = range(max(0, i // 4 * 4 - 1), min(size, i // 4 * 4 + 4 + 2))
        chosen = [j for j in window if j > i] or [i]
        expected[i] = sum(chosen) / len(chosen)
    options = {"block": 4, "halo": [(1, 2)], "impl": impl}
    torch.testing.assert_close(
        block_attention(0 * on + 1, on, place, rel=[after], **options).flatten(), expected
    )
    biased = block_attention(0 * on, on, place, bias=after.view(1, 3), **options)
    torch.testing.assert_close(biased.flatten(), expected)


@pytest.mark.parametrize("impl", ["naive", "eager"])
def test_bias_is_swins_relative_position_bias(impl: str) -> None:
    """Window attention with Swin's index into its (2 w - 1)^2 table, built as in the Swin paper's code."""
    side, heads = 3, 2
    x = make_qkv((6, 6), heads=heads, value_width=5)
    table = torch.randn(heads, 2 * side - 1, 2 * side - 1, dtype=torch.float64)
    coords = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    relative = (
        coords[:, None, :] - coords[:, :, None] + side - 1
    )  # key less query; Swin's own sign is the reverse
    mask = table[:, relative[0], relative[1]]
    actual = block_attention(**x, block=side, halo=0, bias=table, impl=impl)
    for a, b in product(range(0, 6, side), repeat=2):
        window = (slice(None), slice(a, a + side), slice(b, b + side))
        flat = (x[n][window].flatten(1, 2).transpose(1, 2) for n in "qkv")
        expected = F.scaled_dot_product_attention(*flat, attn_mask=mask).transpose(1, 2)
        torch.testing.assert_close(actual[window].flatten(1, 2), expected)


@pytest.mark.parametrize("impl", ["naive", "eager"])
def test_zero_padding_keeps_position_logits_of_keys_outside(impl: str) -> None:
    """Equals masked attention on a volume that was padded with zeros by hand (timm's HaloNet)."""
    x = make_qkv((4, 4)) | _tables(2)
    del x["bias"]
    wider = {n: F.pad(x[n], (0, 0, 0, 0, 2, 2, 2, 2)) for n in "qkv"}
    tables = {n: x[n] for n in ("rel0", "rel1")}
    actual = _run(impl, **x, block=4, halo=2, padding="zero")
    # a block of 8 over the padded volume sees exactly the same 8 x 8 keys
    expected = _run("naive", **wider, **tables, block=8, halo=0)[:, 2:6, 2:6]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", ["naive", "eager"])
@pytest.mark.parametrize("padding", ["masked", "zero"])
def test_stride_picks_queries_and_changes_nothing_else(impl: str, padding: str) -> None:
    """The strided output is the full output at every second position, relative terms at true offsets."""
    tensors = make_qkv((7, 5, 8)) | _tables(3)
    options = {"block": (4, 6, 2), "halo": 1, "padding": padding, "impl": impl}
    full = _run(**tensors, **options)
    strided = _run(**tensors, **options, stride=(2, 3, 1))
    torch.testing.assert_close(strided, full[:, ::2, ::3])


@pytest.mark.parametrize("impl", ["naive", "eager"])
@pytest.mark.parametrize("padding", ["masked", "zero"])
def test_offsets_may_count_queries_as_in_timms_halonet(impl: str, padding: str) -> None:
    """The query s + stride i reads the rows that one at s would read from a table moved by i rows."""
    block, stride, x = 4, 2, make_qkv((14,)) | _tables(1, rows=(25,))
    options = {"block": block, "halo": 3, "padding": padding, "impl": impl}
    actual = _run(**x, **options, stride=stride, offsets="queries")
    for i in range(block // stride):
        moved = {"q": x["q"].roll(-stride * i, 1), "rel0": x["rel0"].roll(i, 0), "bias": x["bias"].roll(i, 1)}
        alone = _run(**x | moved, **options, stride=block)
        expected = alone[:, : len(range(stride * i, 14, block))]
        torch.testing.assert_close(actual[:, i :: block // stride], expected)


def test_batches_and_heads_are_independent() -> None:
    """A permuted batch or head order permutes the output."""
    tensors = make_qkv((5, 6), batch=3) | _tables(2)
    qkv, order = {n: tensors.pop(n) for n in "qkv"}, torch.tensor([2, 0, 1])
    options = {"block": 4, "halo": 1}
    out = _run(**qkv, **tensors, **options)
    moved = _run(**{n: t[order] for n, t in qkv.items()}, **tensors, **options)
    torch.testing.assert_close(moved, out[order])
    tensors["bias"] = tensors["bias"][order]
    heads = _run(**{n: t[..., order, :] for n, t in qkv.items()}, **tensors, **options)
    torch.testing.assert_close(heads, out[..., order, :])


@pytest.mark.parametrize("limit", [1, 50, 300, 5000])
def test_pieces_of_any_size_give_the_same_result(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of cutting the work: parts of a block's queries, blocks, rows, several batch entries."""
    tensors = make_qkv((7, 5), batch=3) | _tables(2)
    options = {"block": 3, "halo": [(1, 2), 2]}
    whole = outputs_and_gradients(lambda **x: _run(**x, **options), tensors)
    monkeypatch.setattr("medattn_kernels._chunk.LOGITS_CPU", limit)
    torch.testing.assert_close(outputs_and_gradients(lambda **x: _run(**x, **options), tensors), whole)


def test_an_empty_batch_gives_an_empty_output_and_zero_table_gradients() -> None:
    """A batch of size zero is legal, as in PyTorch's own layers."""
    tensors = make_qkv((5, 4), batch=0) | _tables(2)
    results = outputs_and_gradients(lambda **x: _run(**x, block=2, halo=1), tensors)
    assert results["output 0"].shape == (0, 5, 4, 3, 6)
    assert all(not g.any() for name, g in results.items() if name.startswith("gradient"))


def test_repeated_backward_passes_are_equal_bit_for_bit() -> None:
    """Overlapping windows are summed in a fixed order."""
    tensors = {n: t.float() for n, t in (make_qkv((9, 10, 8)) | _tables(3)).items()}
    first, second = (outputs_and_gradients(lambda **x: _run(**x, block=4, halo=2), tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_torch_accepts_the_operator() -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch itself checks them."""
    tiles = (cut(5, 4, (1, 1), 1, True), cut(3, 2, (0, 1), 1, True))
    x = {n: t.float() for n, t in make_qkv((5, 3)).items()}
    given = [query_blocks(x["q"], tiles), padded(x["k"], tiles), padded(x["v"], tiles), torch.randn(3, 8, 18)]
    given = [t.detach().requires_grad_() for t in given]
    cuts = [n for t in tiles for n in astuple(t)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(eager._attention, (*given, cuts, True), test_utils=tests)


def test_compiles_without_a_break_and_with_the_same_gradients() -> None:
    """The loops write in place, which tracing them would get wrong."""
    tensors = {n: t.float() for n, t in (make_qkv((7, 5)) | _tables(2)).items()}

    def run(**x: Tensor) -> Tensor:
        return 2 * _run(**x, block=4, halo=1).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = (outputs_and_gradients(f, tensors) for f in (run, compiled))
    torch.testing.assert_close(got, expected)
