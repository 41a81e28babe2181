"""Plain ResNets to the integer, and what holds for every family that is built on the same blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medattn.errors import InputError
from medattn.networks import create
from medattn.networks.registry import task_of
from medattn.networks.resnet import ResNet

PARAMETERS = {
    **{"resnet26": 13_696_552, "resnet50": 25_557_032},
    **{"resnet50_d": 25_576_264, "se_resnet50": 28_088_024},
}
# the smallest member of each family, made smaller
SMALL: dict[str, dict[str, Any]] = {
    "resnet26": {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16)},
    "resnet50_d": {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16)},
    "se_resnet50": {"depths": (1, 2, 1, 1), "widths": (8, 8, 16, 16)},
    "halonet_h0": {"depths": (1, 2, 1, 1), "block": 4, "halo": 1},
    "halonet_h3": {"depths": (1, 1, 1, 1), "block": 2, "halo": 1, "padding": "zero", "offsets": "queries"},
    "eca_halonext26ts": {},
    "lambda_resnet26": {"scope": 5, "depth": 2},
    "lambda_resnet26t": {"scope": 3},
}
SIZE = (37, 50)
COMPILED = ("halonet_h3",)  # in the quick half
small = pytest.mark.parametrize("name", SMALL)


def _network(name: str, **options: Any) -> ResNet:
    """The same numbers every time; what starts at zero would hide other parts, so it does not."""
    torch.manual_seed(0)
    network = create(name, num_classes=5, **SMALL[name] | options)
    assert isinstance(network, ResNet)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def _images(batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones_to_the_integer(name: str) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in create(name).parameters()) == PARAMETERS[name]


@small
def test_odd_sizes_give_finite_logits_and_every_parameter_learns(name: str) -> None:
    network = _network(name)
    logits = network(_images())
    assert logits.shape == (2, 5)
    nn.functional.cross_entropy(logits, torch.tensor([1, 3])).backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@small
@torch.no_grad()
def test_state_dict_round_trip_gives_the_same_output(name: str) -> None:
    first, second = _network(name).eval(), _network(name).eval()
    for parameter in second.parameters():
        nn.init.uniform_(parameter)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(_images()), second(_images()))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in COMPILED else [pytest.mark.slow]) for n in SMALL]
)
def test_compiles_as_one_graph_with_equal_output_and_gradients(name: str) -> None:
    torch._dynamo.reset()
    network, x = _network(name).double(), _images().double()
    program = torch.compile(network, fullgraph=True, backend="aot_eager")
    results = []
    for run in (network, program):
        network.zero_grad()
        out = run(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in network.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-10)


@small
@torch.no_grad()
def test_low_precision_stays_close_to_full_precision(name: str) -> None:
    network, x = _network(name), _images()
    network(x)  # so that running statistics are not the initial ones
    network.eval()
    full = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x).float()
    assert (low - full).abs().max() < 0.1 * full.abs().max()


@small
@torch.no_grad()
def test_channels_last_gives_the_same_output(name: str) -> None:
    full = _network(name).eval().double()(_images().double())
    network = _network(name).eval().double().to(memory_format=torch.channels_last)
    last = network(_images().double().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, full)


@torch.no_grad()
def test_features_are_maps_at_four_strides() -> None:
    maps = _network("resnet26").features(_images())
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 10, 13), (32, 5, 7), (64, 3, 4), (64, 2, 2)]


@torch.no_grad()
def test_other_channels_and_classes() -> None:
    assert create("resnet26", in_channels=1, num_classes=7)(_images(channels=1)).shape == (2, 7)
    assert task_of("resnet26") == "classification"


def test_drop_path_grows_from_zero_over_the_blocks() -> None:
    network = _network("se_resnet50", drop_path=0.2)
    rates = [block.drop_path.rate for stage in network.stages for block in stage]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@torch.no_grad()
def test_a_block_starts_as_its_shortcut() -> None:
    """The last norm starts at zero: of two blocks of a stage the second changes nothing."""
    network = create("se_resnet50", **SMALL["se_resnet50"]).eval()
    second = network.stages[1][1]
    x = torch.rand(1, 32, 5, 6)
    assert torch.equal(second(x), x)


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="activation is 'gelu', expected 'relu', 'silu'"):
        create("resnet50", activation="gelu")
    with pytest.raises(InputError, match=r"heads is \(4, 8\), expected a number or one per stage \(4\)"):
        create("halonet_h0", heads=(4, 8))
    with pytest.raises(InputError, match="unknown network 'halonet_h8'; did you mean 'halonet_h"):
        create("halonet_h8")
