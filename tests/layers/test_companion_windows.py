"""LESA and focal attention against their published forms, written out densely in float64."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.layers.companions import LESA, FocalBlock, pieces
from medattn.layers.companions.focal import neighbour_offsets

close = partial(torch.testing.assert_close, atol=1e-10, rtol=1e-10)
HEADS, CHANNELS, SIDE = 2, 8, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _filled(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def _normed(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A batch norm in training, channels in dimension 1."""
    others, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
    mean, var = x.mean(others, keepdim=True), x.var(others, correction=0, keepdim=True)
    scaled = (x - mean) / (var + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)


def _published_names(layer: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("context."): value for name, value in layer.state_dict().items()}


def _context(state: dict[str, Tensor], x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """The binary term [B, C, N] and the logit terms [B, terms x heads, N, N] before their norm."""
    size, g = x.shape[2:], CHANNELS // HEADS
    rows = torch.einsum("oc,bcn->bon", state["qkv_transform.weight"][..., 0], x.flatten(2))
    qkv = _normed(state, "bn_qkv", rows).unflatten(1, (HEADS, 2 * g))
    q, k, v = qkv[:, :, : g // 2], qkv[:, :, g // 2 : g], qkv[:, :, g:]
    terms = [torch.einsum("bgci,bgcj->bgij", q, k)]
    if form == "flat":
        n = torch.arange(rows.shape[2])
        table = state["relative"][:, n[:, None] - n + SIDE ** len(size) - 1]  # [2 g, i, j]
        terms.append(torch.einsum("bgci,cij->bgij", q, table[: g // 2]))
        terms.append(torch.einsum("bgci,cij->bgij", k, table[g // 2 : g]).mT)
    else:
        place = torch.tensor(list(itertools.product(*map(range, size))))
        names = ("rel_depth", "rel_height", "rel_width")[-len(size) :]
        offset = place[None] - place[:, None] + SIDE - 1  # [i, j, axis]
        both = sum(state[name][offset[..., axis].clamp(0, 2 * SIDE - 2)] for axis, name in enumerate(names))
        terms.append(torch.einsum("bgci,ijc->bgij", q, both))
    raw = torch.cat(terms, 1)
    attention = _normed(state, "bn_similarity", raw).unflatten(1, (len(terms), HEADS)).sum(1).softmax(-1)
    out = torch.einsum("bgij,bgcj->bgci", attention, v)
    if form == "axes":
        return _normed(state, "bn_output", out.flatten(1, 2)), raw
    stacked = torch.stack([out, torch.einsum("bgij,cij->bgci", attention, table[g:])], 3).flatten(1, 3)
    return _normed(state, "bn_output", stacked).unflatten(1, (-1, 2)).sum(2), raw


def _local(state: dict[str, Tensor], x: Tensor) -> Tensor:
    convolve = F.conv2d if x.ndim == 4 else F.conv3d
    grouped = convolve(x, state["x_transform.0.weight"], padding=1, groups=HEADS)
    return _normed(state, "bn_x", convolve(grouped, state["x_transform.1.weight"]))


@pytest.mark.parametrize(
    ("size", "form"),
    [((4, 4), "flat"), ((4, 4, 4), "flat"), ((4, 4), "axes"), ((3, 5), "axes"), ((2, 4, 5), "axes")],
    ids=str,
)
def test_lesa_is_local_plus_gated_context(size: tuple[int, ...], form: str) -> None:
    """Output, every gradient and the logits' running statistics, with all N x N maps formed."""
    layer = _filled(LESA(CHANNELS, len(size), heads=HEADS, length=SIDE, form=form))
    x = torch.randn(2, CHANNELS, *size, dtype=torch.float64, requires_grad=True)
    state = {name.removeprefix("context."): p for name, p in layer.named_parameters()}
    local, (context, raw) = _local(state, x), _context(state, x, form)
    both = torch.cat([local, context.view_as(local)], 1).relu()
    convolve = F.conv2d if x.ndim == 4 else F.conv3d
    hidden = _normed(state, "reasoning.2", convolve(both, state["reasoning.1.weight"])).relu()
    gate = _normed(state, "projection.1", convolve(hidden, state["projection.0.weight"])).sigmoid()
    expected, got = local + gate * context.view_as(local), layer(x)
    close(got, expected)
    weight, names = torch.randn_like(expected), ["x", *state]
    wanted = torch.autograd.grad((expected * weight).sum(), [x, *state.values()])
    gradients = torch.autograd.grad((got * weight).sum(), [x, *state.values()])
    for name, a, b in zip(names, gradients, wanted, strict=True):
        assert (a - b).abs().max() < 1e-9 * max(1, b.abs().max()), f"gradient of {name}"
    running = layer.get_submodule("context.bn_similarity")
    assert isinstance(running, nn.BatchNorm2d)
    flat = raw.transpose(0, 1).flatten(1)
    close(running.running_mean, 0.1 * flat.mean(1))
    close(running.running_var, 0.9 + 0.1 * flat.var(1))


@pytest.mark.parametrize("form", ["flat", "axes"])
def test_lesa_with_a_shut_gate_is_its_convolutions_and_without_them_its_attention(form: str) -> None:
    """Reference, check 4."""
    layer = _filled(LESA(CHANNELS, 2, heads=HEADS, length=SIDE, form=form))
    assert isinstance(layer, LESA)
    x = torch.randn(2, CHANNELS, SIDE, SIDE, dtype=torch.float64)
    gate, local = layer.projection[1], layer.bn_x
    assert isinstance(gate, nn.BatchNorm2d)
    nn.init.zeros_(gate.weight)
    nn.init.constant_(gate.bias, -1e3)
    close(layer(x), _local(_published_names(layer), x))
    nn.init.constant_(gate.bias, 1e3)
    nn.init.zeros_(local.get_parameter("weight"))
    nn.init.zeros_(local.get_parameter("bias"))
    close(layer(x), _context(_published_names(layer), x, form)[0].view_as(x))


@pytest.mark.parametrize("form", ["flat", "axes"])
def test_published_state_dicts_of_lesa_load(form: str) -> None:
    """The context at the top level, and the constant index of the flat form; also inside a network."""
    first = _filled(LESA(CHANNELS, 2, heads=HEADS, length=SIDE, form=form)).eval()
    x = torch.randn(2, CHANNELS, SIDE, SIDE, dtype=torch.float64)
    published = _published_names(first) | ({"flatten_index": torch.arange(9)} if form == "flat" else {})
    second = nn.Sequential(LESA(CHANNELS, 2, heads=HEADS, length=SIDE, form=form)).double().eval()
    second.load_state_dict({f"0.{name}": value for name, value in published.items()})
    close(second(x), first(x))


def test_lesa_in_evaluation_uses_running_statistics() -> None:
    """One entry alone gives what it gives in a batch."""
    layer = _filled(LESA(CHANNELS, 3, heads=HEADS, length=SIDE))
    x = torch.randn(3, CHANNELS, 3, 2, 4, dtype=torch.float64)
    layer(x)
    layer.eval()
    close(layer(x)[1:2], layer(x[1:2]))
    close(layer(x), layer(x))


def _index(place: tuple[int, ...], shift: int, side: int) -> int:
    index = 0
    for p in place:
        index = index * side + p + shift
    return index


def _focal(block: FocalBlock, x: Tensor, heads: int, w: int, e: int, f: int) -> Tensor:
    """The published block on [B, *size, C]: rolls, masks of what a roll leaves inside, logits of -100."""
    state, size, axes, c = dict(block.named_parameters()), x.shape[1:-1], x.ndim - 2, x.shape[-1]
    normed = F.layer_norm(x, (c,), state["norm1.weight"], state["norm1.bias"])
    padded = F.pad(normed, [0, 0, *(p for n in reversed(size) for p in (0, (w - n % w) % w))])
    q, k, v = (padded @ state["attn.qkv.weight"].T + state["attn.qkv.bias"]).split(c, -1)
    grid = [n // w for n in padded.shape[1:-1]]
    dims = tuple(range(1, 1 + axes))
    inside = list(itertools.product(range(w), repeat=axes))
    own = [
        [state["attn.relative_position_bias_table"][_index(_minus(a, b), w - 1, 2 * w - 1)] for b in inside]
        for a in inside
    ]
    bias = [torch.stack([torch.stack(row) for row in own]).movedim(-1, 0)]
    if e:
        bias.append(state["attn.relative_position_bias_table_to_neighbors"].flatten(0, -3))
    if f:
        around, table = list(itertools.product(range(f), repeat=axes)), w + f - 1
        far = torch.tensor([[_index(_minus(a, b), f - 1, table) for b in around] for a in inside])
        bias.append(state["attn.relative_position_bias_table_to_windows.0"][:, far])
        weight, constant = state["pool_layers.0.weight"][0], state["pool_layers.0.bias"]
        pooled = torch.zeros(len(x), *grid, c, dtype=x.dtype)
        for at in itertools.product(*map(range, grid)):
            pooled[(slice(None), *at)] = _window(padded, at, w).mT @ weight + constant
        small = pooled @ state["attn.qkv.weight"].T + state["attn.qkv.bias"]
        border = [0, 0, *[f // 2] * (2 * axes)]
        _, far_k, far_v = (F.pad(y, border) for y in small.split(c, -1))
        shown = F.pad(torch.ones(*grid, dtype=x.dtype), border[2:])
    out = torch.zeros_like(padded)
    for at in itertools.product(*map(range, grid)):
        keys, values = [_window(k, at, w)], [_window(v, at, w)]
        for shift in itertools.product((-e, e), repeat=axes) if e else ():
            mask = torch.ones([w] * axes, dtype=torch.bool)
            mask[tuple(slice(None, -e) if s < 0 else slice(e, None) for s in shift)] = False
            keys.append(_window(k.roll(shift, dims), at, w)[:, mask.flatten()])
            values.append(_window(v.roll(shift, dims), at, w)[:, mask.flatten()])
        hidden = torch.zeros(sum(y.shape[1] for y in keys), dtype=x.dtype)
        if f:
            near = tuple(slice(a, a + f) for a in at)
            keys.append(far_k[(slice(None), *near)].flatten(1, -2))
            values.append(far_v[(slice(None), *near)].flatten(1, -2))
            hidden = torch.cat([hidden, -100 * (1 - shown[near].flatten())])
        parts = [torch.cat(keys, 1), torch.cat(values, 1), _window(q, at, w)]
        heads_of = [y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in parts]
        logits = heads_of[2] @ heads_of[0].mT * (c // heads) ** -0.5 + torch.cat(bias, -1) + hidden
        result = (logits.softmax(-1) @ heads_of[1]).transpose(1, 2).flatten(2)
        where = (slice(None), *(slice(a * w, a * w + w) for a in at))
        out[where] = result.view_as(out[where])
    attended = out @ state["attn.proj.weight"].T + state["attn.proj.bias"]
    x = x + attended[(slice(None), *(slice(n) for n in size))]
    normed = F.layer_norm(x, (c,), state["norm2.weight"], state["norm2.bias"])
    hidden = F.gelu(normed @ state["mlp.fc1.weight"].T + state["mlp.fc1.bias"])
    return x + hidden @ state["mlp.fc2.weight"].T + state["mlp.fc2.bias"]


def _minus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(p - q for p, q in zip(a, b, strict=True))


def _window(x: Tensor, at: tuple[int, ...], w: int) -> Tensor:
    """Window `at` of [B, *size, C] as [B, w^d, C]."""
    return x[(slice(None), *(slice(a * w, a * w + w) for a in at))].flatten(1, -2)


@pytest.mark.parametrize(
    ("size", "w", "e", "f"),
    [
        pytest.param((7, 14), 7, 3, 3, id="2d-published"),
        pytest.param((5, 8), 3, 1, 5, id="2d-ragged"),
        pytest.param((4, 4), 4, 0, 1, id="2d-last-stage"),
        pytest.param((5, 4, 2), 2, 1, 3, id="3d"),
        pytest.param((4, 3, 2), 2, 1, 0, id="3d-not-pooled"),
    ],
)
@pytest.mark.parametrize("pairs", [2**22, 500], ids=["at-once", "in-pieces"])
def test_focal_block_is_the_published_one(
    size: tuple[int, ...], w: int, e: int, f: int, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Window by window with rolled maps; output and every gradient."""
    monkeypatch.setattr(pieces, "PAIRS", pairs)
    block = _filled(FocalBlock(4, len(size), heads=2, window=w, expand=e, focal_window=f, mlp_ratio=2))
    assert isinstance(block, FocalBlock)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    got, want = block(x), _focal(block, x.movedim(1, -1), 2, w, e, f).movedim(-1, 1)
    close(got, want)
    weight, inputs = torch.randn_like(want), {"x": x} | dict(block.named_parameters())
    gradients = (torch.autograd.grad((y * weight).sum(), [*inputs.values()]) for y in (got, want))
    for name, a, b in zip(inputs, *gradients, strict=True):
        assert (a - b).abs().max() < 1e-9 * max(1, b.abs().max()), f"gradient of {name}"


def test_focal_neighbours_are_132_of_which_12_stand_twice() -> None:
    """Reference, check 5; in 3D with windows of 4 none does."""
    for dims, window, expand, count, distinct in ((2, 7, 3, 132, 120), (3, 4, 2, 448, 448)):
        offsets = neighbour_offsets(dims, window, expand)
        assert len(offsets) == count
        assert len(offsets.unique(dim=0)) == distinct == (window + 2 * expand) ** dims - window**dims


def test_published_state_dicts_of_a_focal_block_load() -> None:
    """With the indices that the authors store; shapes and names are theirs."""
    state = FocalBlock(6, 2, heads=3).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items() if "bias_table" in name} == {
        "attn.relative_position_bias_table": (169, 3),
        "attn.relative_position_bias_table_to_neighbors": (1, 3, 49, 132),
        "attn.relative_position_bias_table_to_windows.0": (3, 169),
    }
    linear = {name.removesuffix(".weight") for name in state if name.endswith("weight")}
    assert linear == {"norm1", "norm2", "pool_layers.0", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    stored = ("relative_position_index", "valid_ind_rolled", "relative_position_index_0")
    FocalBlock(6, 2, heads=3).load_state_dict(state | {f"attn.{name}": torch.zeros(1) for name in stored})
