"""LambdaResNets (Bello 2021): ResNets whose 3x3 convolutions are lambda layers.

`lambda_resnet26` to `lambda_resnet420` have them in all stages, with a scope of 23, as d-li14/lambda.pytorch
builds them, whose parameter count is the closest to the paper's. timm's networks have them in three or five
blocks, with a scope of 9, and average 2 x 2 positions where a block is strided.

No public code has the depths of 270, 350 and 420, which are to be checked against the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from medattn.layers.lambda_convolution import LambdaConvolution
from medattn.networks.registry import register_classifier
from medattn.networks.resnet import (
    STEM,
    Activation,
    Place,
    ResNet,
    activation_named,
    attention_mix,
    convolution_mix,
    mix_at,
    plain_stem,
    relu,
)
from medattn.networks.resnet_tiered import ATTENTION_50, DEPTHS_50, tiered_resnet

SCOPE = 23
TIMM_SCOPE = 9


def lambda_mix(
    place: Place, activation: Activation = relu, *, rows: int | None, pool: nn.Module | None, **layer: Any
) -> nn.Module:
    """Lambda layer, pool where strided, norm, activation: [B, width, h, w] -> [B, width, h', w'].

    rows: of the table of positions, all that the map has if None. layer: further options of
    `LambdaConvolution`.
    """
    rows = 2 * place.side - 1 if rows is None else rows
    attention = LambdaConvolution(place.width, rows=rows, pool=pool if place.stride > 1 else None, **layer)
    return attention_mix(attention, place.width, activation)


def lambda_resnet(
    depths: Sequence[int],
    *,
    scope: int | None = SCOPE,
    depth: int = 1,
    heads: int = 4,
    key_size: int = 16,
    bias: bool = True,
    stages: Sequence[int] = (0, 1, 2, 3),
    activation: str = "relu",
    in_channels: int = 3,
    **options: Any,
) -> ResNet:
    """A LambdaResNet, [B, in_channels, h, w] -> [B, num_classes], for images of any size.

    depths: blocks per stage. scope: odd, positions per axis that position lambdas see; None for all of the
    map, at `image_size`. depth: intra-depth U. bias: with public code's bias of position lambdas, 16
    parameters per layer; the paper has none. stages: which have lambda layers, from 0; 3x3 convolutions
    elsewhere. options: of `ResNet`.

    Parameters of a layer of width d, with V = d / heads and K = key_size:
    d (heads K + U K + U V) + 2 heads K + 2 U V + U K scope^2 + K.
    """
    act = activation_named(activation)
    layer = {"depth": depth, "heads": heads, "key_size": key_size, "bias": bias}

    def mix(place: Place) -> nn.Module:
        return lambda_mix(place, act, rows=scope, pool=nn.AvgPool2d(3, 2, 1), **layer)

    where = {stage: range(depths[stage]) for stage in stages}
    return ResNet(
        plain_stem(in_channels, act),
        STEM,
        depths=depths,
        mix=mix_at(where, mix, partial(convolution_mix, activation=act)),
        activation=act,
        **options,
    )


@register_classifier
def lambda_resnet26(**options: Any) -> ResNet:
    """LambdaResNet with blocks 2, 2, 2, 2: 10,125,800 parameters."""
    return lambda_resnet((2, 2, 2, 2), **options)


@register_classifier
def lambda_resnet50(**options: Any) -> ResNet:
    """LambdaResNet-50: 14,995,848 parameters; 16,532,136 with `depth=4`."""
    return lambda_resnet((3, 4, 6, 3), **options)


@register_classifier
def lambda_resnet101(**options: Any) -> ResNet:
    """LambdaResNet-101: 24,736,168 parameters."""
    return lambda_resnet((3, 4, 23, 3), **options)


@register_classifier
def lambda_resnet152(**options: Any) -> ResNet:
    """LambdaResNet-152: 32,807,112 parameters."""
    return lambda_resnet((3, 8, 36, 3), **options)


@register_classifier
def lambda_resnet200(**options: Any) -> ResNet:
    """LambdaResNet-200, blocks 3, 24, 36, 3."""
    return lambda_resnet((3, 24, 36, 3), **options)


@register_classifier
def lambda_resnet270(**options: Any) -> ResNet:
    """LambdaResNet-270, blocks 4, 29, 53, 4."""
    return lambda_resnet((4, 29, 53, 4), **options)


@register_classifier
def lambda_resnet350(**options: Any) -> ResNet:
    """LambdaResNet-350, blocks 4, 36, 72, 4."""
    return lambda_resnet((4, 36, 72, 4), **options)


@register_classifier
def lambda_resnet420(**options: Any) -> ResNet:
    """LambdaResNet-420, blocks 4, 44, 87, 4."""
    return lambda_resnet((4, 44, 87, 4), **options)


def _lambdas(scope: int | None, bias: bool) -> Any:
    """The mixes of timm's hybrids for an activation; the pool is timm's, but keeps the border of odd maps."""

    def mix(place: Place, activation: Activation) -> nn.Module:
        pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        return lambda_mix(place, activation, rows=scope, pool=pool, bias=bias)

    return lambda activation: partial(mix, activation=activation)


@register_classifier
def lambda_resnet26t(*, scope: int = TIMM_SCOPE, **options: Any) -> ResNet:
    """timm's lambda_resnet26t, for 256 pixels, lambda layers in three blocks: 10,958,272 parameters."""
    return tiered_resnet(_lambdas(scope, bias=True), **options)


@register_classifier
def lambda_resnet50ts(*, scope: int = TIMM_SCOPE, **options: Any) -> ResNet:
    """timm's lambda_resnet50ts, for 256 pixels, in five blocks, SiLU: 21,536,832 parameters."""
    numbers = {"activation": "silu"}
    return tiered_resnet(_lambdas(scope, bias=True), DEPTHS_50, ATTENTION_50, **numbers | options)


@register_classifier
def lambda_resnet26rpt_256(**options: Any) -> ResNet:
    """timm's lambda_resnet26rpt_256: tables of all offsets at 256 pixels, no bias; 10,988,688 parameters."""
    return tiered_resnet(_lambdas(None, bias=False), **options)
