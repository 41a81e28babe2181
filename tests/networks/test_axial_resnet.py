"""Axial-ResNets: published sizes, options, tables, multiply-adds. Its outputs: test_published_resnets.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import medattn_kernels.flops  # noqa: F401  teaches the counter our operators
from medattn.errors import InputError
from medattn.layers.axial import AxialAttention2d
from medattn.networks import create
from medattn.networks.axial_resnet import axial_resnet, resized_tables
from medattn.networks.resnet import ResNet

SIZES = [  # name, parameters, with tables of 509 rows, these without the head; axial_deeplab.md 2.2
    ("axial_resnet26_s", 5_944_936, 6_378_792, 5_353_792),
    ("axial_resnet50_s", 11_586_216, 12_481_000, 11_456_000),
    ("axial_resnet50_m", 25_179_400, 26_521_576, 24_984_576),
    ("axial_resnet50_l", 43_973_480, 45_763_048, 43_714_048),
    ("axial_resnet50_xl", 171_158_760, 174_737_896, 170_640_896),
]
OFFICIAL_BUFFERS = {"axial_resnet26_s": 62_821, "axial_resnet50_s": 122_553, "axial_resnet50_l": 209_529}


def _meta(name: str, **options: Any) -> ResNet:
    with torch.device("meta"):
        network = create(name, **options)
    assert isinstance(network, ResNet)
    return network


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _tiny(**options: Any) -> ResNet:
    """One block per stage, a quarter of the width, for 32 pixels; every branch takes part."""
    torch.manual_seed(0)
    network = axial_resnet((1, 1, 1, 1), 0.25, **{"num_classes": 5, "image_size": 32} | options)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.5)
    return network


@pytest.mark.parametrize(("name", "official", "paper", "trunk"), SIZES, ids=[row[0] for row in SIZES])
def test_parameters_are_the_published_ones(name: str, official: int, paper: int, trunk: int) -> None:
    wide = _meta(name, rows=509)
    assert (_count(_meta(name)), _count(wide), _count(wide) - _count(wide.head)) == (official, paper, trunk)


@pytest.mark.parametrize("name", OFFICIAL_BUFFERS)
def test_buffers_are_those_of_the_authors(name: str) -> None:
    """Statistics of norms, their counters and, in their code only, an index of K x K pairs per layer."""
    network = _meta(name)
    layers = (module for module in network.modules() if isinstance(module, AxialAttention2d))
    indices = sum(((layer.relative.shape[1] + 1) // 2) ** 2 for layer in layers)
    assert sum(buffer.numel() for buffer in network.buffers()) + indices == OFFICIAL_BUFFERS[name]


def test_the_stand_alone_model_has_the_size_of_the_paper() -> None:
    """12.5 M in its table 1, of the model with convolutional stem 12.4 M: digits cut off, not rounded."""
    alone = _count(_meta("axial_resnet50_s", rows=509, stem="axial", span=15, striding="each"))
    assert alone == 12_532_152
    assert (alone // 100_000, 12_481_000 // 100_000) == (125, 124)


def test_layers_count_as_their_formula_and_tables_have_the_sides_of_the_maps() -> None:
    network = _meta("axial_resnet50_s")
    layers = [module for module in network.modules() if isinstance(module, AxialAttention2d)]
    sides = []
    for layer in layers:
        c, columns = layer.value_size * 8, layer.relative.shape[1]
        assert _count(layer) == 2 * c * c + 2 * 2 * c + 2 * 3 * 8 + 2 * 2 * c + 2 * (c // 8) * columns
        sides.append((columns + 1) // 2)
    assert [layer.axis for layer in layers] == [0, 1] * 16
    assert sides[::2] == [56] * 3 + [56, 28, 28, 28] + [28] + [14] * 5 + [14, 7, 7]


def test_output_stride_sixteen_keeps_the_maps_of_the_last_stage() -> None:
    network = _tiny(strides=(1, 2, 2, 1)).eval()
    maps = network.features(torch.randn(1, 3, 48, 64))
    assert [tuple(m.shape[2:]) for m in maps] == [(12, 16), (6, 8), (3, 4), (3, 4)]


@pytest.mark.parametrize("stem", ["conv", "three_convs", "axial"])
@pytest.mark.parametrize("striding", ["both", "each"])
def test_odd_images_keep_their_borders(stem: str, striding: str) -> None:
    """Sides are halved upwards, and every size runs on tables of another."""
    network = _tiny(stem=stem, striding=striding, span=5).eval()
    x = torch.randn(2, 3, 45, 37)
    assert [tuple(m.shape[1:]) for m in network.features(x)] == [
        (64, 12, 10),
        (128, 6, 5),
        (256, 3, 3),
        (512, 2, 2),
    ]
    changed = x.clone()
    changed[..., -1, -1] += 1
    assert not torch.equal(network(changed), network(x))
    assert network(torch.randn(1, 3, 1, 1)).isfinite().all()


def test_layers_treat_other_lines_alike_and_shift_with_a_local_span() -> None:
    """Along the height, columns may be permuted; with a span, interior rows move with the input."""
    torch.manual_seed(0)
    x, order = torch.randn(1, 16, 9, 6), torch.randperm(6)
    layer = AxialAttention2d(16, 16, axis=0, length=9, span=3).eval()
    torch.testing.assert_close(layer(x[..., order]), layer(x)[..., order])
    torch.testing.assert_close(layer(x.roll(2, 2))[:, :, 3:-1], layer(x).roll(2, 2)[:, :, 3:-1])


def test_every_parameter_of_the_smallest_learns() -> None:
    torch.manual_seed(0)
    network = create("axial_resnet26_s", num_classes=10, image_size=64)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    out = network(torch.randn(2, 3, 64, 64))
    (out * torch.randn_like(out)).sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # biases of norms before a softmax shift all logits of a query alike
    assert [name for name in silent if not name.endswith("bn_similarity.bias")] == []


def test_state_dict_round_trip_and_channels_last_give_the_same_output() -> None:
    first, second = _tiny().eval(), _tiny().eval()
    for parameter in second.parameters():
        nn.init.uniform_(parameter)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(first(x), second(x))
    last = second.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, first(x))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_as_one_graph_it_gives_the_same() -> None:
    torch._dynamo.reset()
    network = _tiny().eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), network(x))


@torch.no_grad()
def test_low_precision_is_finite_and_close() -> None:
    network, x = _tiny().eval(), torch.randn(4, 3, 32, 32)
    full = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (network(x).float() - full).abs().max() < 0.1 * full.abs().max()
        assert network.train()(x).isfinite().all()


def test_tables_resize_to_another_image_size() -> None:
    """Linear tables stay linear, offset 0 stays in the middle, and equal sizes are left alone."""
    small, large = _tiny(), _tiny(image_size=64)
    for layer in small.modules():
        if isinstance(layer, AxialAttention2d):
            columns = layer.relative.shape[1]
            layer.relative.data = torch.linspace(-1, 1, columns).expand_as(layer.relative).clone()
    weights = small.state_dict()
    assert all(resized_tables(weights, small)[name] is weights[name] for name in weights)
    resized: dict[str, Tensor] = resized_tables(weights, large)
    large.load_state_dict(resized)
    for name, value in resized.items():
        if name.endswith(".relative"):
            expected = torch.linspace(-1, 1, value.shape[1]).expand_as(value)
            torch.testing.assert_close(value, expected if weights[name].shape[1] > 1 else value)


def test_multiply_adds_of_both_stridings() -> None:
    """The paper has 2.8 G for S, 3.3 G for the stand-alone one, without saying what counts.

    Its striding, each axis after its layer, needs 2.64 G in products, that of the authors' code 2.84 G; the
    stand-alone one with its striding needs 3.06 G.
    """
    found = {}
    for stem, striding in (("conv", "both"), ("conv", "each"), ("axial", "each")):
        span = 15 if stem == "axial" else None
        network = _meta("axial_resnet50_s", rows=509, stem=stem, striding=striding, span=span).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, 3, 224, 224, device="meta"))
        found[stem, striding] = round(counter.get_total_flops() / 2e9, 2)
    assert found == {
        ("conv", "both"): 2.84,
        ("conv", "each"): 2.64,
        ("axial", "each"): 3.06,
    }
    assert abs(found["conv", "both"] / 2.8 - 1) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "patch"}, r"stem is 'patch', expected 'conv', 'three_convs', 'axial'"),
        ({"striding": "none"}, r"striding is 'none', expected 'both', 'each'"),
        ({"rows": 508}, "rows is 508, expected an odd number"),
        ({"span": 0}, "span is 0, expected an odd number"),
        ({"spann": 3}, "has no option 'spann'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create("axial_resnet26_s", **options)
