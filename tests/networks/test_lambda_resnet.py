"""LambdaResNets: their integers, and their layer against timm's and its own identities."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from medattn.layers.lambda_convolution import LambdaConvolution
from medattn.networks import create

PARAMETERS = {
    **{"lambda_resnet26": 10_125_800, "lambda_resnet50": 14_995_848, "lambda_resnet101": 24_736_168},
    **{"lambda_resnet152": 32_807_112, "lambda_resnet26t": 10_958_272, "lambda_resnet50ts": 21_536_832},
    "lambda_resnet26rpt_256": 10_988_688,
}
LAYER = {64: (14_784, 46_416), 128: (23_008, 67_024), 256: (45_600, 132_816), 512: (115_360, 362_704)}


def _count(name: str, **options: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create(name, **options).parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones_to_the_integer(name: str) -> None:
    assert _count(name) == PARAMETERS[name]


def test_options_of_the_published_table() -> None:
    """Intra-depth 4; without the bias that the paper does not have, 16 less for each of 16 layers."""
    assert _count("lambda_resnet50", depth=4) == 16_532_136
    assert _count("lambda_resnet50", bias=False) == PARAMETERS["lambda_resnet50"] - 16 * 16
    assert _count("lambda_resnet50", stages=()) == 25_557_032


@pytest.mark.parametrize("width", LAYER)
def test_a_layer_counts_as_published(width: int) -> None:
    for depth, expected in zip((1, 4), LAYER[width], strict=True):
        layer = LambdaConvolution(width, rows=23, depth=depth)
        assert sum(p.numel() for p in layer.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "depths"),
    [
        ("lambda_resnet200", (3, 24, 36, 3)),
        ("lambda_resnet270", (4, 29, 53, 4)),
        ("lambda_resnet350", (4, 36, 72, 4)),
        ("lambda_resnet420", (4, 44, 87, 4)),
    ],
)
def test_deep_ones_are_the_shallow_one_and_more_of_its_blocks(name: str, depths: tuple[int, ...]) -> None:
    def block(width: int) -> int:
        return 8 * width**2 + 2 * width + 2 * width + 8 * width + LAYER[width][0]

    more = sum((n - 2) * block(64 * 2**stage) for stage, n in enumerate(depths))
    assert _count(name) == PARAMETERS["lambda_resnet26"] + more


def _layer(**options: Any) -> LambdaConvolution:
    torch.manual_seed(0)
    layer = LambdaConvolution(8, **{"heads": 2, "key_size": 3, "rows": 5} | options).double()
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("rows", [3, 5, None], ids=["3", "5", "all"])
def test_output_and_gradients_are_those_of_timms_layer(rows: int | None, timm: ModuleType) -> None:
    """The local form with its bias, and the table of all offsets."""
    torch.manual_seed(0)
    layer = timm.layers.lambda_layer.LambdaLayer
    theirs = layer(8, feat_size=(6, 6), num_heads=2, dim_head=3, r=rows).double()
    ours = _layer(rows=rows or 11, bias=rows is not None)
    if rows is None:
        table, bias = theirs.pos_emb, None
        position = {"table": table[:, :, None]}
    else:
        table, bias = theirs.conv_lambda.weight, theirs.conv_lambda.bias
        position = {"table": table[:, 0, :, :, 0].permute(1, 2, 0)[:, :, None], "bias": bias}
    own = {n: v for n, v in theirs.state_dict().items() if n.startswith(("qkv", "norm"))}
    ours.load_state_dict(own | position)
    x = torch.randn(2, 8, 6, 6).double()
    results = [layer(x) for layer in (ours, theirs)]
    torch.testing.assert_close(*results)
    for result in results:
        result.sin().sum().backward()
    torch.testing.assert_close(ours.qkv.weight.grad, theirs.qkv.weight.grad)
    expected = (
        table.grad[:, :, None] if rows is None else table.grad[:, 0, :, :, 0].permute(1, 2, 0)[:, :, None]
    )
    torch.testing.assert_close(ours.table.grad, expected)
    if bias is not None:
        torch.testing.assert_close(ours.bias.grad, bias.grad)


@torch.no_grad()
def test_a_scope_that_covers_the_map_is_the_global_form() -> None:
    """Rows beyond 2 side - 1 are never read."""
    x, whole = torch.randn(2, 8, 5, 4).double(), _layer(rows=9)
    wider = _layer(rows=13)
    padded = F.pad(whole.table, (0, 0, 0, 0, 2, 2, 2, 2), value=7.0)
    wider.load_state_dict(whole.state_dict() | {"table": padded})
    torch.testing.assert_close(wider(x), whole(x))


@torch.no_grad()
def test_without_positions_the_order_of_the_context_is_nothing() -> None:
    """Content alone: permuted positions come out permuted."""
    layer, x = _layer(bias=False), torch.randn(2, 8, 4, 5).double()
    layer.table.zero_()
    order = torch.randperm(20)
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    torch.testing.assert_close(layer(shuffled).flatten(2), layer(x).flatten(2)[:, :, order])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="rows must be odd and positive, got rows=4"):
        _layer(rows=4)
    with pytest.raises(ValueError, match="heads must divide the channels, got heads=3 and channels=8"):
        _layer(heads=3)
