"""ResNets with LESA: published sizes, image sizes, forms. Their outputs: test_published_resnets.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medattn.errors import InputError
from medattn.layers.companions.lesa import LESA
from medattn.networks import create
from medattn.networks.lesa import LesaResNet


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _small(**options: Any) -> LesaResNet:
    torch.manual_seed(0)
    return LesaResNet(**{"depths": (1, 1, 2, 1), "num_classes": 5, "image_size": 48} | options)


@pytest.mark.parametrize(
    ("name", "parameters", "tables", "layer"),
    [("lesa_resnet50", 23_777_512, 275_264, 1_925_040), ("lesa_wrn50", 61_145_896, 550_528, 7_585_584)],
)
def test_parameters_are_the_published_ones(name: str, parameters: int, tables: int, layer: int) -> None:
    """8 layers: all blocks of stage 3 but the first, all of stage 4."""
    with torch.device("meta"):
        network = create(name)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, LESA)}
    assert list(layers) == [
        *(f"stages.2.{b}.mix.0" for b in range(1, 6)),
        *(f"stages.3.{b}.mix.0" for b in range(3)),
    ]
    assert _count(network) == parameters
    assert sum(p.numel() for n, p in network.named_parameters() if n.endswith("relative")) == tables
    assert _count(layers["stages.3.0.mix.0"]) == layer


def test_both_attention_stages_work_on_a_sixteenth_of_the_side() -> None:
    maps = _small().eval().features(torch.randn(1, 3, 48, 48))
    assert [tuple(m.shape[1:]) for m in maps] == [(256, 12, 12), (512, 6, 6), (1024, 3, 3), (2048, 3, 3)]


def test_flat_tables_refuse_other_maps_and_axes_take_them() -> None:
    x = torch.randn(2, 3, 33, 61)
    with pytest.raises(
        InputError, match=r"33 x 61 pixels give attention a map of 3 x 4, and flat tables .* 3 x 3"
    ):
        _small()(x)
    assert _small().eval()(x[..., :41]).shape == (2, 5)
    axes = _small(form="axes").eval()
    assert axes(x).shape == (2, 5)
    with pytest.raises(InputError, match="form is 'round', expected 'flat', 'axes'"):
        create("lesa_resnet50", form="round")


def test_a_stride_in_stage_four_averages_its_first_attention() -> None:
    network = _small(strides=(1, 2, 2, 2)).eval()
    assert [m.shape[-1] for m in network.features(torch.randn(1, 3, 48, 48))] == [12, 6, 3, 2]


@pytest.mark.parametrize("form", ["flat", "axes"])
def test_every_parameter_learns(form: str) -> None:
    network = _small(form=form)
    out = network(torch.randn(2, 3, 48, 48))
    (out * torch.randn_like(out)).sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in silent if not name.endswith("bn_similarity.bias")] == []


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
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_as_one_graph_it_gives_the_same() -> None:
    torch._dynamo.reset()
    network, x = _small().eval(), torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), network(x))
