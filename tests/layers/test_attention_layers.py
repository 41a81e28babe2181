"""Attention layers: shapes, parameters to the integer, safe start, reach, low precision, export."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from medattn.layers.attention import AttentionLayer, SpatialAttention, axial_layers, block_layers
from medattn.layers.crosscov import crosscov_layers
from medattn.layers.lambdas import lambda_layers

FACTORIES = [
    pytest.param(block_layers, {}, id="block"),
    pytest.param(block_layers, {"layers": 2}, id="block2"),
    pytest.param(block_layers, {"relative": False, "heads": 1}, id="block-plain"),
    pytest.param(axial_layers, {}, id="axial"),
    pytest.param(axial_layers, {"span": 3, "layers": 2}, id="axial-local"),
    pytest.param(axial_layers, {"relative": False}, id="axial-plain"),
    pytest.param(lambda_layers, {}, id="lambda"),
    pytest.param(lambda_layers, {"depth": 2, "scope": 3, "heads": 2}, id="lambda-deep"),
    pytest.param(crosscov_layers, {}, id="crosscov"),
    pytest.param(crosscov_layers, {"local": False, "heads": 4}, id="crosscov-plain"),
]
Factory = Callable[..., SpatialAttention]


def _reach(layer: nn.Module, size: tuple[int, ...], at: tuple[int, ...]) -> Tensor:
    """Positions whose input can change the output at one position: nonzero gradients of a float64 pass."""
    x = torch.randn(1, 8, *size, dtype=torch.float64, requires_grad=True)
    layer.double()(x)[(0, slice(None), *at)].sum().backward()
    assert x.grad is not None
    return x.grad[0].abs().sum(0) > 0


@pytest.mark.parametrize("size", [(6, 5), (1, 3), (17, 8), (6, 5, 7), (1, 1, 1), (3, 9, 2)], ids=str)
@pytest.mark.parametrize(("factory", "options"), FACTORIES)
def test_any_size_keeps_its_shape_and_every_parameter_gets_a_gradient(
    factory: Factory, options: dict[str, object], size: tuple[int, ...]
) -> None:
    """2D and 3D, smaller than a block, odd, a single position."""
    layer = factory(12, len(size), **options)
    x = torch.randn(2, 12, *size)
    out = layer(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if min(size) > 1:  # along an axis of length one there is nothing to choose from
            assert parameter.grad.any(), name


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [16, 64, 128])
@pytest.mark.parametrize("layers", [1, 2])
def test_block_parameters_are_those_of_the_documented_formula(channels: int, dims: int, layers: int) -> None:
    """Norm, projections and tables, counted by hand."""
    heads, head, block, halo = 2, channels // 8 if channels > 32 else 4, (8, 4)[dims - 2], (4, 2)[dims - 2]
    per_layer = 2 * channels + 4 * channels * heads * head + dims * head * (2 * (block + halo) - 1)
    module = block_layers(channels, dims, layers=layers)
    assert sum(p.numel() for p in module.parameters()) == layers * per_layer


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [16, 64, 128])
def test_axial_parameters_are_those_of_the_documented_formula(channels: int, dims: int) -> None:
    """Norm, projections and three tables per axis, counted by hand."""
    heads, head, rows = 2, max(4, channels // 16), 63
    per_axis = 2 * channels + 6 * channels * heads * head + 4 * head * rows
    module = axial_layers(channels, dims, rows=rows)
    assert sum(p.numel() for p in module.parameters()) == dims * per_axis


@pytest.mark.parametrize(("factory", "options"), FACTORIES[:6])  # cross-covariance projects at full width
def test_attention_stays_below_one_percent_of_a_five_million_parameter_network(
    factory: Factory, options: dict[str, object]
) -> None:
    """At the level of 128 channels in 3D, with default widths."""
    module = factory(128, 3, **{"layers": 1} | options) if "span" not in options else factory(128, 3)
    assert sum(p.numel() for p in module.parameters()) < 50_000


@pytest.mark.parametrize(("factory", "options"), FACTORIES)
def test_training_starts_near_the_identity(factory: Factory, options: dict[str, object]) -> None:
    """A network's features survive the insertion of an untrained layer."""
    torch.manual_seed(0)
    x = torch.randn(1, 32, 8, 8, 8)
    change = factory(32, 3, **options)(x) - x
    assert 0 < change.std() < 0.2


def test_layer_is_the_identity_without_values() -> None:
    """With the value projection at zero nothing is added (reference, check 5)."""
    for layer in (block_layers(16, 2, layers=2), axial_layers(16, 2, relative=False)):
        for inner in layer.layers:
            assert isinstance(inner, AttentionLayer)
            nn.init.zeros_(inner.qkv.weight[-inner.widths[-1] :])
        x = torch.randn(1, 16, 9, 7)
        torch.testing.assert_close(layer(x), x, rtol=0, atol=0)


def test_one_block_layer_sees_its_block_and_the_halo_on_every_side() -> None:
    """Query in the second of three blocks of 4 with a halo of 2."""
    reached = _reach(block_layers(8, 2, block=4, halo=2), (12, 12), (5, 6))
    assert reached.nonzero().tolist() == [[i, j] for i in range(2, 10) for j in range(2, 10)]


def test_two_block_layers_pass_context_both_ways() -> None:
    """The second layer looks back, and what it finds there has looked ahead."""
    reached = _reach(block_layers(8, 2, layers=2, block=4, halo=2), (12, 12), (5, 6))
    # the second layer reads [2, 8); the first filled [2, 4) from [0, 6) and [4, 8) from [4, 10)
    assert reached.nonzero().tolist() == [[i, j] for i in range(10) for j in range(10)]


def test_axial_layers_connect_every_pair_of_positions() -> None:
    """One axis after the other reaches the whole volume (Axial-DeepLab)."""
    assert _reach(axial_layers(8, 3), (4, 3, 5), (0, 2, 1)).all()


@pytest.mark.parametrize(("factory", "options"), FACTORIES)
def test_bf16_autocast_trains_close_to_float32(factory: Factory, options: dict[str, object]) -> None:
    """Forward and backward under autocast on a CPU; features in bf16 stay in bf16."""
    torch.manual_seed(0)
    layer = factory(16, 3, **options)
    x = torch.randn(2, 16, 6, 5, 7)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
        narrow = layer(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert (low - exact).abs().max() < 0.02 * exact.abs().max()
    narrow.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(("factory", "options"), FACTORIES)
def test_memory_format_and_strides_of_the_input_do_not_matter(
    factory: Factory, options: dict[str, object]
) -> None:
    """Channels-last and transposed features give the same numbers."""
    layer = factory(8, 3, **options)
    x = torch.randn(2, 8, 5, 6, 7)
    expected = layer(x)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last_3d)), expected)
    torch.testing.assert_close(layer(x.mT.contiguous().mT), expected)


@pytest.mark.parametrize(("factory", "options"), FACTORIES[:1] + FACTORIES[3:4])
def test_exported_program_computes_the_same(factory: Factory, options: dict[str, object]) -> None:
    """torch.export takes the layer as it is."""
    layer, x = factory(8, 3, **options).eval(), torch.randn(1, 8, 6, 5, 4)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        torch.testing.assert_close(program.module()(x), layer(x))


def test_state_dict_round_trip_reproduces_the_output() -> None:
    """All that the layer knows is in its state."""
    for factory in (block_layers, axial_layers):
        first, second = factory(8, 2), factory(8, 2)
        second.load_state_dict(first.state_dict())
        x = torch.randn(1, 8, 9, 9)
        torch.testing.assert_close(second(x), first(x), rtol=0, atol=0)
