"""Companion modules: shapes, parameters to the integer, starts, reach, bounded memory, low precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medattn.layers.companions import (
    LESA,
    ExternalAttention,
    FocalBlock,
    MapAttention,
    MultiHeadExternalAttention,
    NonLocalBlock,
    PointwiseSpatialAttention,
    PositionAttention,
    crisscross_layers,
    dual_layers,
    external_layers,
    focal_layers,
    lesa_layers,
    map_layers,
    nonlocal_layers,
    psa_layers,
)

Factory = Callable[..., nn.Module]
FACTORIES = [
    pytest.param(nonlocal_layers, {}, id="nonlocal"),
    pytest.param(nonlocal_layers, {"norm": False}, id="nonlocal-plain"),
    pytest.param(dual_layers, {}, id="dual"),
    pytest.param(crisscross_layers, {}, id="crisscross"),
    pytest.param(psa_layers, {"mask": 5}, id="psa"),
    pytest.param(external_layers, {}, id="external"),
    pytest.param(external_layers, {"heads": 2}, id="external-heads"),
    pytest.param(lesa_layers, {"heads": 2, "length": 4}, id="lesa"),
    pytest.param(lesa_layers, {"heads": 1, "length": 3, "form": "flat"}, id="lesa-flat"),
    pytest.param(focal_layers, {}, id="focal"),
    pytest.param(focal_layers, {"mlp_ratio": 2, "window": 3, "focal_window": 0}, id="focal-mlp"),
    pytest.param(map_layers, {}, id="map"),
]
ZERO_STARTS = {
    nonlocal_layers: ("W.1.", "W."),
    dual_layers: ("position.gamma", "channel.gamma"),
    crisscross_layers: ("gamma",),
}
INERT = ("phi.bias", "key_conv.bias", "attn.linear_0.bias", "bn_similarity.bias")  # shift all logits alike


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _awake(module: nn.Module) -> nn.Module:
    """Away from the starts at zero, which hide everything else."""
    for name, parameter in module.named_parameters():
        if name.endswith("gamma") or name.startswith("W."):
            nn.init.uniform_(parameter, 0.5, 1)
    return module


def _reach(layer: nn.Module, size: tuple[int, ...], at: tuple[int, ...]) -> set[tuple[int, ...]]:
    x = torch.randn(1, 8, *size, dtype=torch.float64, requires_grad=True)
    _awake(layer).double().eval()(x)[(0, slice(None), *at)].sum().backward()
    assert x.grad is not None
    return {tuple(p) for p in (x.grad[0].abs().sum(0) > 0).nonzero().tolist()}


@pytest.mark.parametrize("size", [(6, 5), (1, 3), (9, 17), (5, 6, 7), (1, 1, 1), (3, 9, 2)], ids=str)
@pytest.mark.parametrize(("factory", "options"), FACTORIES)
def test_any_size_keeps_its_shape_and_every_parameter_gets_a_gradient(
    factory: Factory, options: dict[str, Any], size: tuple[int, ...]
) -> None:
    """2D and 3D, smaller than a window, odd, a single position; biases that cancel in a softmax aside."""
    torch.manual_seed(0)
    layer = _awake(factory(12, len(size), **options))
    x = torch.randn(2, 12, *size)
    out = layer(x)
    assert out.shape == x.shape
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if min(size) > 4 and not name.endswith(INERT):
            assert parameter.grad.any(), name


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("factory", ZERO_STARTS)
def test_published_starts_at_zero_are_the_identity_and_train_what_is_zero_first(
    factory: Factory, dims: int
) -> None:
    """As in the publications: nothing else has a gradient in the first step."""
    layer, x = factory(16, dims), torch.randn(2, 16, *(5, 4, 3)[:dims])
    out = layer(x)
    torch.testing.assert_close(out, x)
    (out * torch.randn_like(out)).sum().backward()
    first = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    assert first
    assert all(name.startswith(ZERO_STARTS[factory]) for name in first)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("c", [16, 32, 64])
def test_parameters_are_those_of_the_documented_formulas(c: int, dims: int) -> None:
    """Counted by hand, in 2D and 3D."""
    half, eighth, heads = c // 2, c // 8, 2
    assert _count(nonlocal_layers(c, dims)) == 3 * (c * half + half) + half * c + c + 2 * c
    crossed = 2 * (c * eighth + eighth) + c * c + c + 1
    assert _count(crisscross_layers(c, dims)) == crossed
    assert _count(dual_layers(c, dims)) == crossed + 1
    m, mask = c // 4, 7**dims
    assert _count(psa_layers(c, dims, mask=7)) == 4 * c * m + 2 * m * m + 2 * m * mask + 8 * m + 2 * c
    assert _count(external_layers(c, dims)) == 2 * c * c + 3 * c + 2 * 64 * c
    w = c // heads
    by_heads = 8 * c * c + 5 * c + 2 * 32 * w + 32 + w
    assert _count(external_layers(c, dims, heads=heads, slots=32)) == 2 * c + by_heads
    local = c * c * 4 + c * c * 3**dims // heads + 6 * c
    axes = 2 * c * c + 6 * c + 4 * heads + dims * (2 * 9 - 1) * (w // 2)
    flat = 2 * c * c + 8 * c + 6 * heads + (2 * 3**dims - 1) * 2 * w
    assert _count(lesa_layers(c, dims, heads=heads, length=9)) == local + axes
    assert _count(lesa_layers(c, dims, heads=heads, length=3, form="flat")) == local + flat
    near, ring = 4**dims, 2**dims * (4**dims - 2**dims)
    tables = heads * (7**dims + near * ring + 6**dims)
    focal = 4 * c * c + 6 * c + tables + near + 1
    assert _count(focal_layers(c, dims, window=4, focal_window=3)) == focal
    mlp = 2 * 4 * c * c + (4 + 3) * c
    assert _count(focal_layers(c, dims, window=4, focal_window=3, mlp_ratio=4)) == focal + mlp
    assert _count(map_layers(c, dims, layers=3)) == 3 * (12 * c * c + 9 * c) + c
    assert _count(MapAttention(c, dims, layers=1, agent_size=5)) == 12 * c * c + 9 * c + 6 * c


def test_parameters_in_2d_are_the_published_numbers() -> None:
    """Reference sections 1.1, 2.2, 5.1 to 5.5."""
    with torch.device("meta"):
        assert _count(NonLocalBlock(64, 2, norm=False)) == 8_352
        assert _count(NonLocalBlock(64, 2)) == 8_480
        assert [_count(PositionAttention(c, 2)) for c in (64, 512)] == [5_201, 328_321]
        assert _count(crisscross_layers(64, 2)) == 5_201
        psa = {side: _count(PointwiseSpatialAttention(2048, 2, mask=side)) for side in (59, 89)}
        assert psa == {59: 8_291_328, 89: 12_837_888}
        assert _count(ExternalAttention(512, 2)) == 591_360
        assert _count(MultiHeadExternalAttention(384, heads=6)) == 1_189_888
        assert _count(MultiHeadExternalAttention(768, heads=12)) == 4_730_752
        lesa = {c: LESA(c, 2, length=14, form="flat") for c in (256, 512, 1024)}
        assert [_count(layer) for layer in lesa.values()] == [495_600, 1_925_040, 7_585_584]
        tables = {c: layer.get_parameter("context.relative").numel() for c, layer in lesa.items()}
        assert 5 * tables[256] + 3 * tables[512] == 275_264


@pytest.mark.parametrize(
    ("width", "heads", "depths", "published"),
    [
        (96, 3, (2, 2, 6, 2), 28_880_380),
        (96, 3, (2, 2, 18, 2), 51_141_940),
        (128, 4, (2, 2, 18, 2), 89_815_400),
    ],
    ids=["tiny", "small", "base"],
)
def test_focal_blocks_add_up_to_the_published_transformers(
    width: int, heads: int, depths: tuple[int, ...], published: int
) -> None:
    """Embedding, 2x2 convolutions between stages, norms and classifier by hand; the rest are blocks."""
    total = 48 * width + 3 * width
    for stage, (depth, focal) in enumerate(zip(depths, (7, 5, 3, 1), strict=True)):
        c, expand = width * 2**stage, 3 if stage < 3 else 0
        with torch.device("meta"):
            block = FocalBlock(c, 2, heads=heads * 2**stage, expand=expand, focal_window=focal)
        total += depth * _count(block)
        total += 4 * c * 2 * c + 3 * 2 * c if stage < 3 else 2 * c + 1000 * c + 1000
    assert total == published


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns, forward and backward."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


def _largest(layer: nn.Module, side: int, channels: int) -> int:
    x = torch.randn(1, channels, *[side] * 3, requires_grad=True)
    with Largest() as seen:
        layer(x).square().sum().backward()
    assert x.grad is not None
    return seen.numbers


BOUNDED = [p for p in FACTORIES if p.id != "lesa-flat"]


@pytest.mark.parametrize(("factory", "options"), BOUNDED)
def test_memory_in_3d_stays_far_below_a_map(factory: Factory, options: dict[str, Any]) -> None:
    """16^3 = 4,096 positions: no tensor of a third of N x N numbers, forward or backward."""
    assert _largest(_awake(factory(8, 3, **options)), 16, 8) < 4096**2 / 3


@pytest.mark.slow
@pytest.mark.parametrize(("factory", "options"), BOUNDED)
def test_memory_of_a_24_cube_stays_far_below_a_map(factory: Factory, options: dict[str, Any]) -> None:
    """13,824 positions: no tensor of a 25th of N x N numbers."""
    assert _largest(_awake(factory(32, 3, **options)), 24, 32) < 13_824**2 / 25


@pytest.mark.parametrize("recurrence", [1, 2, 3])
@pytest.mark.parametrize("size", [(4, 5), (3, 4, 3)], ids=str)
def test_criss_cross_sees_what_differs_in_as_many_coordinates_as_it_has_passes(
    size: tuple[int, ...], recurrence: int
) -> None:
    """One pass: row and column (and depth). Two see everything in 2D, three in 3D."""
    torch.manual_seed(0)
    at = (1, 2, 1)[: len(size)]
    expected = {
        place
        for place in itertools.product(*map(range, size))
        if sum(p != q for p, q in zip(place, at, strict=True)) <= recurrence
    }
    assert _reach(crisscross_layers(8, len(size), recurrence=recurrence), size, at) == expected
    if recurrence == len(size):
        assert len(expected) == math.prod(size)


@pytest.mark.parametrize(
    ("factory", "options"), [p for p in FACTORIES if p.id in {"nonlocal", "dual", "external", "lesa", "map"}]
)
def test_global_attention_sees_every_position(factory: Factory, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    assert len(_reach(factory(8, 3, **options), (4, 3, 2), (1, 1, 0))) == 24


@pytest.mark.parametrize(
    ("factory", "options"), [p for p in FACTORIES if str(p.id).startswith(("nonlocal", "dual", "external"))]
)
def test_attention_without_positions_follows_any_permutation(
    factory: Factory, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    layer, x = _awake(factory(8, 3, **options)).double(), torch.randn(2, 8, 4, 3, 5, dtype=torch.float64)
    order = torch.randperm(60)
    permuted = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(layer(permuted), layer(x).flatten(2)[..., order].view_as(x))


def test_criss_cross_follows_permutations_along_an_axis_but_not_others() -> None:
    layer, x = _awake(crisscross_layers(8, 3)).double(), torch.randn(1, 8, 4, 3, 5, dtype=torch.float64)
    for axis in (2, 3, 4):
        order = torch.randperm(x.shape[axis])
        torch.testing.assert_close(layer(x.index_select(axis, order)), layer(x).index_select(axis, order))
    order = torch.randperm(60)
    moved = layer(x.flatten(2)[..., order].view_as(x)).flatten(2)
    assert not torch.allclose(moved, layer(x).flatten(2)[..., order])


def test_focal_windows_and_their_wrapped_ring_follow_a_turn_by_one_window() -> None:
    """Without pooled windows, whose border does not wrap; turned by half a window it is another function."""
    layer = focal_layers(8, 3, focal_window=0).double()
    x = torch.randn(1, 8, 8, 4, 12, dtype=torch.float64)
    for shift, same in ((4, True), (2, False)):
        turned = layer(x.roll(shift, 4)), layer(x).roll(shift, 4)
        assert torch.allclose(*turned) is same


@pytest.mark.parametrize(("factory", "options"), FACTORIES)
def test_state_dict_round_trip_reproduces_the_output(factory: Factory, options: dict[str, Any]) -> None:
    """All that the layer knows is in its state, running statistics included."""
    first, second = _awake(factory(8, 3, **options)), factory(8, 3, **options)
    x = torch.randn(2, 8, 5, 3, 4)
    first(x)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.eval()(x), first.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(("factory", "options"), FACTORIES)
def test_bf16_autocast_trains_close_to_float32(factory: Factory, options: dict[str, Any]) -> None:
    """Forward and backward on a CPU; features in bf16 stay in bf16."""
    torch.manual_seed(0)
    layer = _awake(factory(16, 3, **options))
    x = torch.randn(2, 16, 4, 5, 6)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low, narrow = layer(x), layer(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert (low - exact).abs().max() < 0.05 * exact.abs().max()
    narrow.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nonlocal_layers(8, 4), "spatial_dims must be 2 or 3"),
        (lambda: external_layers(9, 2, heads=2), "channels must be a multiple of heads"),
        (lambda: lesa_layers(12, 2), "channels must be a multiple of 2 heads"),
        (lambda: lesa_layers(16, 2, form="round"), "unknown form='round'"),
        (lambda: focal_layers(9, 2), "channels must be a multiple of heads"),
        (lambda: focal_layers(8, 2, focal_window=4), "focal_window must be odd"),
        (lambda: focal_layers(8, 2, expand=7), "expand must be at least 0 and below the window"),
        (lambda: map_layers(9, 2), "channels must be a multiple of heads"),
        (lambda: psa_layers(8, 2, mask=4), "mask must be odd"),
        (lambda: crisscross_layers(8, 2, recurrence=0), "recurrence must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_maps_beyond_the_stated_sizes_are_refused_with_a_way_out() -> None:
    """PSA's over-complete map and the single line of LESA's flat form."""
    with pytest.raises(ValueError, match=r"more than 16,777,216; use a smaller mask, a larger shrink"):
        psa_layers(8, 3, mask=23)(torch.zeros(1, 8, 24, 24, 24))
    with pytest.raises(ValueError, match=r"at most 4096 positions, got \(17, 17, 17\); use form='axes'"):
        lesa_layers(8, 3, form="flat", length=2)(torch.zeros(1, 8, 17, 17, 17))
