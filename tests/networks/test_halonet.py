"""HaloNet: its integers, and its layer against timm's and against what the paper says of it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medattn.layers.halo import HaloAttention
from medattn.networks import create

PARAMETERS = {
    **{"halonet_h0": 5_500_952, "halonet_h1": 8_100_056, "halonet_h2": 9_404_312, "halonet_h3": 11_841_304},
    **{
        "halonet_h4": 19_101_976,
        "halonet_h5": 30_717_272,
        "halonet_h6": 43_456_792,
        "halonet_h7": 67_433_240,
    },
    **{"halonet26t": 12_480_288, "halonet50ts": 22_733_280, "eca_halonext26ts": 10_756_885},
}
BLOCKS = [(8, 3), (10, 3), (12, 2), (14, 2), (8, 4), (7, 2)]  # published block and halo


def _count(name: str, **options: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create(name, **options).parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones_to_the_integer(name: str) -> None:
    assert _count(name) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "window"), [("halonet_h0", 14), ("halonet_h3", 16), ("halonet_h7", 16)])
def test_four_heads_in_the_first_stage_have_wider_tables(name: str, window: int) -> None:
    """Three blocks, two tables of 2 n - 1 rows of 16 instead of 8."""
    assert _count(name, heads=(4, 8, 8, 8)) == PARAMETERS[name] + 3 * 2 * (2 * window - 1) * 8


def _layer(**options: Any) -> HaloAttention:
    torch.manual_seed(0)
    return HaloAttention(8, **{"heads": 2, "block": 4, "halo": 2, "values": 12} | options).double()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("block", "halo"), BLOCKS)
def test_output_and_gradients_are_those_of_timms_layer(
    block: int, halo: int, stride: int, timm: ModuleType
) -> None:
    """Its tables have the same rows, `halo` further on; odd blocks are pooled where strided."""
    torch.manual_seed(0)
    theirs = timm.layers.halo_attn.HaloAttn(
        8, 16, stride=stride, num_heads=2, dim_head=3, block_size=block, halo_size=halo
    )
    theirs = theirs.double()
    ours = HaloAttention(
        8,
        heads=2,
        head_size=3,
        values=16,
        block=block,
        halo=halo,
        stride=stride,
        padding="zero",
        offsets="queries",
    ).double()
    ours.load_state_dict(
        {
            "q.weight": theirs.q.weight,
            "kv.weight": theirs.kv.weight,
            "rel.0": theirs.pos_embed.height_rel.roll(-halo, 0),
            "rel.1": theirs.pos_embed.width_rel.roll(-halo, 0),
        }
    )
    x = torch.randn(1, 8, 2 * block, 2 * block).double()
    results = [layer(x) for layer in (ours, theirs)]
    torch.testing.assert_close(*results)
    for result in results:
        result.sin().sum().backward()
    torch.testing.assert_close(ours.kv.weight.grad, theirs.kv.weight.grad)
    torch.testing.assert_close(ours.q.weight.grad, theirs.q.weight.grad)
    torch.testing.assert_close(ours.rel[0].grad, theirs.pos_embed.height_rel.grad.roll(-halo, 0))


@torch.no_grad()
def test_a_strided_layer_is_the_full_one_at_every_second_position() -> None:
    """True offsets, odd sides."""
    x = torch.randn(1, 8, 9, 7).double()
    strided = _layer(stride=2)
    full = _layer()
    full.load_state_dict(strided.state_dict())
    torch.testing.assert_close(strided(x), full(x)[:, :, ::2, ::2])


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_a_ragged_map_equals_one_padded_to_whole_blocks(stride: int) -> None:
    """With zeros, which give zero queries, keys and values: no projection has a bias."""
    layer, x = _layer(padding="zero", stride=stride), torch.randn(2, 8, 9, 6).double()
    whole = layer(F.pad(x, (0, 2, 0, 3)))
    torch.testing.assert_close(layer(x), whole[:, :, : -(-9 // stride), : -(-6 // stride)])


@torch.no_grad()
def test_shift_by_a_block_commutes_and_by_one_position_does_not() -> None:
    """Away from the border."""
    layer, x = _layer(), torch.randn(1, 8, 24, 24).double()

    def inside(shift: int) -> Tensor:
        moved = layer(x.roll((shift, shift), (2, 3)))
        return moved.roll((-shift, -shift), (2, 3))[:, :, 8:16, 8:16]

    torch.testing.assert_close(inside(4), inside(0))
    assert (inside(1) - inside(0)).abs().max() > 1e-3


def test_rows_beyond_every_offset_get_no_gradient() -> None:
    """2 halo of the 2 n - 1 published rows; here half of them at each end."""
    layer = _layer()
    layer(torch.randn(1, 8, 12, 12).double()).sin().sum().backward()
    for table in layer.rel:
        silent = (table.grad.abs().sum(1) == 0).nonzero().flatten().tolist()
        assert len(table) == 15
        assert silent == [0, 1, 13, 14]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="heads must divide the channels, got heads=3, channels=8"):
        _layer(heads=3)
