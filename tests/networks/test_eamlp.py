"""EAMLP against its equations written out under the authors' names; EANet's shapes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.errors import InputError
from medattn.networks import create
from medattn.networks.eamlp import EAMLP, from_published, sinusoids
from medattn.networks.registry import task_of

State = dict[str, Tensor]
SIZES = [  # name, parameters at 224 and at 384, the frozen table among them; companions.md 1.2
    ("eamlp_7", 6_146_638, 6_243_918),
    ("eamlp_14", 29_877_070, 30_022_990),
    ("eamlp_19", 54_559_054, 54_729_294),
    ("eamlp_24", 89_456_590, 89_651_150),
]


def _small(**options: Any) -> EAMLP:
    torch.manual_seed(0)
    usual = {"heads": 2, "ratio": 3, "num_classes": 5, "image_size": 48}
    return EAMLP(16, 2, **usual | options)


@pytest.mark.parametrize(("name", "at_224", "at_384"), SIZES, ids=[row[0] for row in SIZES])
def test_parameters_are_the_published_ones(name: str, at_224: int, at_384: int) -> None:
    with torch.device("meta"):
        networks = [create(name, image_size=size) for size in (224, 384)]
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [at_224, at_384]
    assert [n for n, p in networks[0].named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_positions_are_sines_and_cosines_of_the_number_of_a_token() -> None:
    table = sinusoids(7, 6)
    for p in range(7):
        for c in range(6):
            angle = p / 10000 ** (2 * (c // 2) / 6)
            assert math.isclose(table[p, c], math.cos(angle) if c % 2 else math.sin(angle), abs_tol=1e-6)


def test_memories_start_equal() -> None:
    attention = _small().tokens_to_token.attention1.attn
    assert torch.equal(attention.linear_0.weight, attention.linear_1.weight.T)
    assert attention.linear_0.weight.any()


def _state(memories: tuple[str, str]) -> State:
    """Of `_small`, as the authors name and shape it. memories: what the tokens to token call theirs."""
    generator = torch.Generator().manual_seed(0)
    state: State = {}

    def draw(name: str, *shape: int, std: float) -> None:
        state[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * std

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        draw(f"{name}.weight", outputs, inputs, std=inputs**-0.5)
        if bias:
            draw(f"{name}.bias", outputs, std=0.2)

    def norm(name: str, channels: int) -> None:
        draw(f"{name}.weight", channels, std=1)
        draw(f"{name}.bias", channels, std=0.2)

    for part, inputs in (("attention1", 147), ("attention2", 576)):
        name = f"tokens_to_token.{part}"
        norm(f"{name}.norm1", inputs)
        linear(f"{name}.attn.q_linear", inputs, 64)
        linear(f"{name}.attn.{memories[0]}", 64, 128, bias=False)
        linear(f"{name}.attn.{memories[1]}", 128, 64)
        linear(f"{name}.attn.proj", 64, 64)
        norm(f"{name}.norm2", 64)
        linear(f"{name}.mlp.fc1", 64, 64)
        linear(f"{name}.mlp.fc2", 64, 64)
    linear("tokens_to_token.project", 576, 16)
    draw("cls_token", 1, 1, 16, std=1)
    draw("pos_embed", 1, 10, 16, std=1)
    for block in range(2):
        name = f"blocks.{block}"
        norm(f"{name}.norm1", 16)
        linear(f"{name}.attn.trans_dims", 16, 64)
        linear(f"{name}.attn.linear_0", 8, 64)
        linear(f"{name}.attn.linear_1", 64, 8)
        linear(f"{name}.attn.proj", 64, 16)
        norm(f"{name}.norm2", 16)
        linear(f"{name}.mlp.fc1", 16, 48)
        linear(f"{name}.mlp.fc2", 48, 16)
    norm("norm", 16)
    linear("head", 16, 5)
    return state


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    out = torch.einsum("...i,oi->...o", x, state[f"{name}.weight"])
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def _memory(state: State, first: str, second: str, x: Tensor) -> Tensor:
    """[B, N, w] on slots: softmax over the positions, a share of each position's sum, back to w."""
    slots = _linear(state, first, x)
    slots = slots.exp() / slots.exp().sum(1, keepdim=True)
    return _linear(state, second, slots / (1e-9 + slots.sum(2, keepdim=True)))


def _split(x: Tensor, side: int, stride: int, padding: int) -> tuple[Tensor, tuple[int, ...]]:
    """Windows of [B, C, h, w] as tokens [B, N, C side^2], by a convolution that copies, and their grid."""
    width = x.shape[1] * side**2
    copy = torch.eye(width, dtype=x.dtype).view(width, x.shape[1], side, side)
    windows = F.conv2d(x, copy, stride=stride, padding=padding)
    return windows.flatten(2).mT, tuple(windows.shape[2:])


def _dense(state: State, image: Tensor, memories: tuple[str, str]) -> Tensor:
    linear, norm = partial(_linear, state), partial(_norm, state)
    mlp = lambda name, x: linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", x)))  # noqa: E731
    x = image
    for part, split in (("attention1", (7, 4, 2)), ("attention2", (3, 2, 1))):
        name = f"tokens_to_token.{part}"
        tokens, grid = _split(x, *split)
        q = linear(f"{name}.attn.q_linear", norm(f"{name}.norm1", tokens))
        mixed = _memory(state, *(f"{name}.attn.{memory}" for memory in memories), q)
        tokens = q + linear(f"{name}.attn.proj", mixed)
        tokens = tokens + mlp(name, norm(f"{name}.norm2", tokens))
        x = tokens.mT.unflatten(2, grid)
    tokens = linear("tokens_to_token.project", _split(x, 3, 2, 1)[0])
    x = torch.cat([state["cls_token"].expand(len(tokens), 1, -1), tokens], 1) + state["pos_embed"]
    for block in range(2):
        name = f"blocks.{block}"
        wide = linear(f"{name}.attn.trans_dims", norm(f"{name}.norm1", x))
        heads = [
            _memory(state, f"{name}.attn.linear_0", f"{name}.attn.linear_1", h) for h in wide.split(8, 2)
        ]
        x = x + linear(f"{name}.attn.proj", torch.cat(heads, 2))
        x = x + mlp(name, norm(f"{name}.norm2", x))
    return linear("head", norm("norm", x)[:, 0])


@pytest.mark.parametrize(
    "memories", [("linear_0", "linear_1"), ("linear_1", "linear_2")], ids=["7", "others"]
)
def test_published_state_dicts_load_and_give_the_dense_program(memories: tuple[str, str]) -> None:
    """The released models name the memories of the tokens to token in two ways."""
    state = _state(memories)
    network = _small().eval()
    weights = from_published(network, state)
    network.load_state_dict(weights)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    expected = _dense(state, x, memories)
    scale = expected.abs().max()
    assert (network(x.float()) - expected).abs().max() <= 1e-5 * scale
    network.double().load_state_dict(weights)
    assert (network(x) - expected).abs().max() <= 1e-12 * scale


def test_other_and_odd_image_sizes_continue_the_table() -> None:
    network = _small().eval()
    assert network(torch.randn(2, 3, 45, 61)).shape == (2, 5)
    wide = _small(image_size=80).eval()
    names = [name for name in wide.state_dict() if name != "pos_embed"]
    wide.load_state_dict({name: network.state_dict()[name] for name in names}, strict=False)
    x = torch.randn(1, 3, 80, 80)
    torch.testing.assert_close(network(x), wide(x))


def test_every_parameter_learns_and_drop_path_drops() -> None:
    network = create("eamlp_7", image_size=32, num_classes=10, drop_path=0.1)
    out = network(torch.randn(4, 3, 32, 32))
    (out * torch.randn_like(out)).sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # the bias before a softmax over positions shifts them alike
    assert [n for n in silent if not n.endswith("attn.linear_0.bias")] == ["pos_embed"]
    assert [block.drop_path.rate for block in network.blocks] == pytest.approx([i / 60 for i in range(7)])
    assert network.tokens_to_token.attention1.attn.drop.p == 0.1


@torch.no_grad()
def test_round_trip_layout_and_precision() -> None:
    first, second = _small().eval(), _small().eval()
    for parameter in second.parameters():
        nn.init.uniform_(parameter)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, 48, 48)
    expected = first(x)
    assert torch.equal(expected, second(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert (first(x).float() - expected).abs().max() < 0.1 * expected.abs().max()
    last = second.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_as_one_graph_it_gives_the_same() -> None:
    torch._dynamo.reset()
    network, x = _small().eval(), torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), network(x))


def test_eanet_segments_images_at_an_eighth() -> None:
    with torch.device("meta"):
        networks = [
            create(name, in_channels=1, out_channels=4) for name in ("eanet_resnet50", "eanet_resnet101")
        ]
        x = torch.empty(1, 1, 65, 97)
        assert [tuple(n.eval()(x).shape) for n in networks] == [(1, 4, 65, 97)] * 2
        maps = networks[0].extractor.features(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(17, 25), (9, 13), (9, 13), (9, 13)]
    assert sum(p.numel() for p in networks[0].linu.parameters()) == 591_360
    assert task_of("eanet_resnet50") == "segmentation"
    with pytest.raises(InputError, match="spatial_dims is 3, expected 2"):
        create("eanet_resnet50", spatial_dims=3, in_channels=1, out_channels=4)
