"""Companion modules against their equations, written out densely in float64; published state dicts load."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.layers.companions import (
    ChannelAttention,
    CrissCrossAttention,
    DualAttention,
    ExternalAttention,
    ExternalBlock,
    MapAttention,
    NonLocalBlock,
    PointwiseSpatialAttention,
    PositionAttention,
    criss_cross,
    pieces,
)
from medattn.layers.companions.external import double_norm
from medattn.layers.companions.psa import collect, distribute

SIZES = [(4, 3), (3, 2, 4)]
close = partial(torch.testing.assert_close, atol=1e-10, rtol=1e-10)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _filled(module: nn.Module) -> nn.Module:
    """In float64 with every parameter random, so that no start hides a term."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def _input(channels: int, size: tuple[int, ...]) -> Tensor:
    return torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A 1x1 convolution of [B, C, N] from its weights."""
    weight = state[f"{name}.weight"].flatten(1)
    out = torch.einsum("oc,bcn->bon", weight, x)
    return out + state[f"{name}.bias"][:, None] if f"{name}.bias" in state else out


def _normed(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A batch norm of [B, C, N] in training."""
    mean, var = x.mean((0, 2), keepdim=True), x.var((0, 2), correction=0, keepdim=True)
    scaled = (x - mean) / (var + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"][:, None] + state[f"{name}.bias"][:, None]


def _agree(module: nn.Module, x: Tensor, expected: Tensor) -> None:
    """Output, and gradients of the input and of every parameter."""
    out, weight = module(x), torch.randn_like(expected)
    close(out.flatten(2), expected.flatten(2))
    wanted = dict(module.named_parameters()) | {"x": x}
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    got = torch.autograd.grad((out.flatten(2) * weight.flatten(2)).sum(), [*wanted.values()], **options)
    want = torch.autograd.grad((expected * weight).sum(), [*wanted.values()], **options)
    for name, a, b in zip(wanted, got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


def _state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_non_local_block_is_equation_1_with_the_embedded_gaussian(size: tuple[int, ...]) -> None:
    block = _filled(NonLocalBlock(6, len(size)))
    x, state = _input(6, size), _state(block)
    rows = x.flatten(2)
    theta, phi, g = (_linear(state, name, rows) for name in ("theta", "phi", "g"))
    f = torch.einsum("bci,bcj->bij", theta, phi).exp()
    y = torch.einsum("bij,bcj->bci", f / f.sum(2, keepdim=True), g)
    _agree(block, x, _normed(state, "W.1", _linear(state, "W.0", y)) + rows)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dual_attention_is_both_published_modules_on_one_input(size: tuple[int, ...]) -> None:
    """With the published inverted similarity, rowmax(E) - E."""
    dual = _filled(DualAttention(16, len(size)))
    x, state = _input(16, size), _state(dual)
    rows = x.flatten(2)
    q, k, v = (_linear(state, f"position.{name}_conv", rows) for name in ("query", "key", "value"))
    position = v @ (q.mT @ k).softmax(-1).mT
    energy = rows @ rows.mT
    channel = (energy.amax(-1, keepdim=True) - energy).softmax(-1) @ rows
    _agree(dual, x, state["position.gamma"] * position + state["channel.gamma"] * channel + rows)


def test_names_are_those_of_the_published_code() -> None:
    """One key of every published state dict that the sources name, shapes of 2D convolutions included."""
    projections = {f"{p}_conv.{kind}" for p in ("query", "key", "value") for kind in ("weight", "bias")}
    assert set(PositionAttention(16, 2).state_dict()) == projections | {"gamma"}
    assert set(CrissCrossAttention(16, 2).state_dict()) == projections | {"gamma"}
    assert set(ChannelAttention().state_dict()) == {"gamma"}
    assert PositionAttention(16, 2).query_conv.weight.shape == (2, 16, 1, 1)
    external = {f"conv1.{kind}" for kind in ("weight", "bias")} | {"linear_0.weight", "linear_1.weight"}
    assert external < set(ExternalAttention(16, 2).state_dict())
    branches = {"reduce.0", "reduce.1", "attention.0", "attention.1", "attention.3"}
    expected = {f"{layer}.weight" for layer in branches} | {"proj.0.weight", "proj.1.weight"}
    expected |= {name.replace(".", "_p.", 1) for name in expected if not name.startswith("proj")}
    psa = PointwiseSpatialAttention(16, 2, mask=3)
    assert {name for name in psa.state_dict() if name.endswith("weight")} == expected


def _union(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention [B, *size, 1, D] masked to positions that differ in one coordinate at most."""
    places = torch.tensor(list(itertools.product(*map(range, q.shape[1:-2]))))
    seen = (places[:, None] != places).sum(-1) <= 1
    rows = [x.flatten(1, -2) for x in (q, k, v)]
    logits = (rows[0] @ rows[1].mT).masked_fill(~seen, -math.inf)
    return (logits.softmax(-1) @ rows[2]).view(v.shape)


@pytest.mark.parametrize("size", [*SIZES, (1, 5), (2, 1, 1), (1, 1)], ids=str)
def test_criss_cross_counts_the_union_of_lines_once(size: tuple[int, ...]) -> None:
    """Against dense attention masked to the cross, with gradients; axes of one position among them."""
    q, k = (torch.randn(2, *size, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, *size, 1, 5, dtype=torch.float64, requires_grad=True)
    got, want = criss_cross(q, k, v), _union(q, k, v)
    close(got, want)
    weight = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((want * weight).sum(), (q, k, v)),
        strict=True,
    ):
        close(a, b)


def test_criss_cross_is_the_published_pair_of_logit_lists() -> None:
    """Reference, check 1: H + W logits per pixel with exactly one -inf, one softmax."""
    q, k = (torch.randn(1, 3, 4, 1, 2, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, 3, 4, 1, 5, dtype=torch.float64)
    out = criss_cross(q, k, v)
    for h, w in itertools.product(range(3), range(4)):
        column = k[0, :, w, 0] @ q[0, h, w, 0]
        column[h] = -math.inf
        logits = torch.cat([column, k[0, h, :, 0] @ q[0, h, w, 0]])
        assert len(logits) == 7
        assert logits.isinf().sum() == 1
        close(out[0, h, w, 0], logits.softmax(0) @ torch.cat([v[0, :, w, 0], v[0, h, :, 0]]))


def test_criss_cross_in_float32_bears_logits_far_above_the_own_one() -> None:
    """The own position's weight is 1e-35 and below here, and everything is read from it."""
    q = torch.full((1, 3, 4, 2, 1, 1), 10.0)
    k = 8 * torch.rand(1, 3, 4, 2, 1, 1)
    k[0, 1, 2, 0] = 0
    v = torch.randn(1, 3, 4, 2, 1, 4)
    wide = [x.double() for x in (q, k, v)]
    torch.testing.assert_close(criss_cross(q, k, v).double(), _union(*wide), atol=1e-4, rtol=1e-4)
    k = (100 * k).requires_grad_()  # far beyond what it can resolve
    out = criss_cross(q, k, v)
    out.square().sum().backward()
    assert out.abs().max() <= v.abs().max() * (1 + 1e-5)
    assert k.grad is not None
    assert k.grad.isfinite().all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("recurrence", [1, 2])
def test_criss_cross_module_repeats_with_shared_weights(size: tuple[int, ...], recurrence: int) -> None:
    module = _filled(CrissCrossAttention(8, len(size), recurrence=recurrence))
    x, state = _input(8, size), _state(module)
    y = x
    for _ in range(recurrence):
        q, k, v = (_linear(state, f"{n}_conv", y.flatten(2)) for n in ("query", "key", "value"))
        parts = (p.mT.unflatten(1, size)[..., None, :] for p in (q, k, v))
        y = state["gamma"] * _union(*parts)[..., 0, :].movedim(-1, 1) + y
    _agree(module, x, y.flatten(2))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_external_attention_normalises_over_positions_and_then_over_slots(size: tuple[int, ...]) -> None:
    module = _filled(ExternalAttention(6, len(size), slots=5))
    x, state = _input(6, size), _state(module)
    rows = x.flatten(2)
    scores = torch.einsum(
        "sc,bcn->bsn", state["linear_0.weight"][..., 0], _linear(state, "conv1", rows)
    ).exp()
    columns = scores / scores.sum(2, keepdim=True)
    attention = columns / (1e-9 + columns.sum(1, keepdim=True))
    values = torch.einsum("cs,bsn->bcn", state["linear_1.weight"][..., 0], attention)
    _agree(module, x, (_normed(state, "conv2.1", _linear(state, "conv2.0", values)) + rows).relu())


def test_slots_sum_to_one_over_positions_and_positions_over_slots() -> None:
    """Reference, check 2."""
    logits = torch.randn(2, 5, 30, dtype=torch.float64)
    columns = logits.softmax(2)
    close(columns.sum(2), torch.ones(2, 5, dtype=torch.float64))
    rows = double_norm(logits, positions=2, slots=1)
    torch.testing.assert_close(rows.sum(1), torch.ones(2, 30, dtype=torch.float64), atol=1e-7, rtol=0)
    start = ExternalAttention(16, 2)
    torch.testing.assert_close(start.linear_0.weight, start.linear_1.weight.transpose(0, 1), rtol=0, atol=0)


def test_external_attention_of_many_heads_shares_its_memory() -> None:
    """Head by head, on tokens."""
    block = _filled(ExternalBlock(8, heads=2, slots=3))
    x, state = _input(8, (3, 4)), _state(block)
    tokens = x.flatten(2).mT
    normed = F.layer_norm(tokens, (8,), state["norm1.weight"], state["norm1.bias"])
    wide = normed @ state["attn.trans_dims.weight"].T + state["attn.trans_dims.bias"]
    heads = []
    for head in range(8):  # 4 x 2 heads of 4 channels
        part = wide[..., 4 * head : 4 * head + 4]
        logits = part @ state["attn.linear_0.weight"].T + state["attn.linear_0.bias"]
        attention = logits.softmax(1)
        attention = attention / (1e-9 + attention.sum(2, keepdim=True))
        heads.append(attention @ state["attn.linear_1.weight"].T + state["attn.linear_1.bias"])
    out = torch.cat(heads, 2) @ state["attn.proj.weight"].T + state["attn.proj.bias"]
    _agree(block, x, (tokens + out).mT)


def _over_complete(maps: Tensor, size: tuple[int, ...], mask: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The published collect and distribute matrices [B, target, i] and [B, i, target], by loops."""
    places = list(itertools.product(*map(range, size)))
    collected = torch.zeros(len(maps), len(places), len(places), dtype=maps.dtype)
    distributed = collected.clone()
    for i, here in enumerate(places):
        for target, there in enumerate(places):
            offset = [t - h + m // 2 for t, h, m in zip(there, here, mask, strict=True)]
            if all(0 <= o < m for o, m in zip(offset, mask, strict=True)):
                entry = sum(o * math.prod(mask[axis + 1 :]) for axis, o in enumerate(offset))
                collected[:, target, i] = maps[:, entry, i]
                distributed[:, i, target] = maps[:, entry, i]
    return collected, distributed


@pytest.mark.parametrize(
    ("size", "mask"),
    [((4, 3), (7, 5)), ((4, 3), (3, 3)), ((3, 2, 2), (5, 3, 3)), ((3, 2, 2), (3, 1, 3))],
    ids=["2d-all", "2d-short", "3d-all", "3d-short"],
)
@pytest.mark.parametrize("pairs", [2**22, 30], ids=["at-once", "in-pieces"])
def test_collect_and_distribute_are_products_with_the_published_matrices(
    size: tuple[int, ...], mask: tuple[int, ...], pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """X softmax(Y) with the softmax over the sources; offsets outside the mask have logit 0."""
    monkeypatch.setattr(pieces, "PAIRS", pairs)
    x = torch.randn(2, 3, math.prod(size), dtype=torch.float64, requires_grad=True)
    maps = torch.randn(2, math.prod(mask), math.prod(size), dtype=torch.float64, requires_grad=True)
    for run, matrix in zip((collect, distribute), _over_complete(maps, size, mask), strict=True):
        got, want = run(x, maps, size, mask), x @ matrix.softmax(1)
        close(got, want)
        weight = torch.randn_like(want)
        for a, b in zip(
            torch.autograd.grad((got * weight).sum(), (x, maps)),
            torch.autograd.grad((want * weight).sum(), (x, maps), retain_graph=True),
            strict=True,
        ):
            close(a, b)


def test_distribute_matrix_is_the_transposed_collect_matrix() -> None:
    """Reference, check 6."""
    collected, distributed = _over_complete(torch.randn(1, 15, 12), (4, 3), (5, 3))
    torch.testing.assert_close(collected.mT, distributed, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(7, 5), (3, 5, 4)], ids=str)
@pytest.mark.parametrize("concat", [False, True])
def test_psa_module_is_the_published_chain(size: tuple[int, ...], concat: bool) -> None:
    """Reduce, shrink, predict, weigh, project, enlarge; 2D sizes of the form 2 n - 1, as published."""
    mask = (3,) * len(size)
    module = _filled(PointwiseSpatialAttention(8, len(size), mask=3, concat=concat))
    x, state = _input(8, size), _state(module)
    small = [(n + 1) // 2 for n in size]
    mode = "bilinear" if len(size) == 2 else "trilinear"
    parts = []
    for branch, suffix in enumerate(("", "_p")):
        y = _normed(state, f"reduce{suffix}.1", _linear(state, f"reduce{suffix}.0", x.flatten(2))).relu()
        y = F.interpolate(y.unflatten(2, size), size=small, mode=mode, align_corners=True).flatten(2)
        hidden = _normed(state, f"attention{suffix}.1", _linear(state, f"attention{suffix}.0", y)).relu()
        maps = _linear(state, f"attention{suffix}.3", hidden)
        parts.append(y @ _over_complete(maps, tuple(small), mask)[branch].softmax(1))
    out = _normed(state, "proj.1", _linear(state, "proj.0", torch.cat(parts, 1))).relu()
    out = F.interpolate(out.unflatten(2, small), size=size, mode=mode, align_corners=True).flatten(2)
    rows = x.flatten(2)
    _agree(module, x, torch.cat([rows, out], 1) if concat else rows + out)


@pytest.mark.parametrize("size", [(3, 4), (2, 3, 2)], ids=str)
def test_map_attention_reads_the_map_for_the_agent(size: tuple[int, ...]) -> None:
    """A pre-norm Transformer on cells with sinusoids and the agent's token, head by head."""
    channels, axes = 16, len(size)
    layer = _filled(MapAttention(channels, axes, layers=2, heads=2, agent_size=3))
    assert isinstance(layer, MapAttention)
    x, agent, state = _input(channels, size), torch.randn(2, 3, dtype=torch.float64), _state(layer)
    count = channels // (2 * axes)
    codes = []
    for place in itertools.product(*map(range, size)):
        waves = [
            wave(torch.tensor(p * 1e4 ** (-i / count), dtype=torch.float64))
            for p in place
            for wave in (torch.sin, torch.cos)
            for i in range(count)
        ]
        codes.append(torch.stack([*waves, *[x.new_zeros(())] * (channels - len(waves))]))
    embedded = agent @ state["embed.weight"].T + state["embed.bias"]
    tokens = torch.cat([embedded[:, None], x.flatten(2).mT + torch.stack(codes)], 1)
    for depth in (0, 2):
        name = f"layers.{depth}"
        normed = F.layer_norm(tokens, (channels,), state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])
        q, k, v = (normed @ state[f"{name}.qkv.weight"].T).split(channels, -1)
        heads = [slice(0, 8), slice(8, 16)]
        attended = [(q[..., h] @ k[..., h].mT / 8**0.5).softmax(-1) @ v[..., h] for h in heads]
        tokens = tokens + torch.cat(attended, -1) @ state[f"{name}.out.weight"].T
        name = f"layers.{depth + 1}"
        normed = F.layer_norm(tokens, (channels,), state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])
        hidden = F.gelu(normed @ state[f"{name}.fc1.weight"].T + state[f"{name}.fc1.bias"])
        tokens = tokens + hidden @ state[f"{name}.fc2.weight"].T + state[f"{name}.fc2.bias"]
    told, cells = layer.read(x, agent)
    close(told, tokens[:, 0])
    close(cells.flatten(2), tokens[:, 1:].mT)
    with pytest.raises(ValueError, match=r"takes an agent \[B, agent_size\], got none"):
        layer(x)
    with pytest.raises(ValueError, match="takes no agent, it is learned, got one"):
        MapAttention(channels, axes).read(x.float(), agent.float())
