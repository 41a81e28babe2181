"""HaloNet (Vaswani et al. 2021): ResNets whose 3x3 convolutions are blocked local attention with a halo.

H0 to H7 are the paper's, to the integer of independent transcriptions. timm's networks are here by their
names, as timm's published weights need them: zeros around the map take part in the softmax, and a strided
query's offset counts queries. H0 to H7 take the same choices as options, `padding="zero"` and
`offsets="queries"`; by default nothing stands outside the map and offsets count positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from medattn.errors import InputError
from medattn.layers.channels import ChannelConvolution
from medattn.layers.halo import HaloAttention
from medattn.networks.registry import register_classifier
from medattn.networks.resnet import (
    STEM,
    WIDTHS,
    Activation,
    Mix,
    Place,
    ResNet,
    activation_named,
    attention_mix,
    conv_norm,
    plain_stem,
    relu,
)
from medattn.networks.resnet_tiered import ATTENTION_50, DEPTHS_50, tiered_resnet

HEADS = 8
AS_TIMM = {"padding": "zero", "offsets": "queries"}


def halo_mix(
    place: Place,
    activation: Activation = relu,
    *,
    heads: int = HEADS,
    widening: float = 1.0,
    **attention: Any,
) -> nn.Module:
    """Attention with the stride, norm, activation: [B, width, h, w] -> [B, width * widening, h', w'].

    attention: options of `HaloAttention`.
    """
    values = round(place.width * widening)
    layer = HaloAttention(place.width, heads=heads, stride=place.stride, values=values, **attention)
    return attention_mix(layer, values, activation)


def halonet(
    *,
    block: int,
    halo: int,
    value_ratio: float,
    output_ratio: float,
    depth: int,
    final_width: int | None = None,
    heads: int | Sequence[int] = HEADS,
    activation: str = "relu",
    in_channels: int = 3,
    padding: str = "masked",
    offsets: str = "voxels",
    **options: Any,
) -> ResNet:
    """A HaloNet, [B, in_channels, h, w] -> [B, num_classes], for images of any size.

    block, halo: positions along an axis. value_ratio, output_ratio: values and block outputs over the width
    of queries and keys, which is 64, 128, 256, 512. depth: blocks of the third stage; the others have 3.
    final_width: channels of a last 1x1 convolution, if any. heads: one number, or one per stage ((4, 8, 8, 8)
    in another transcription of the paper). activation: "relu" or "silu". options: of `ResNet`.

    Parameters of a block with width w, window n = block + 2 halo, v = w value_ratio and o = w output_ratio:
    c w + 2 w + 2 w^2 + w v + 2 (2 n - 1) w / heads + 2 v + v o + 2 o, c channels in; c o + 2 o more for the
    shortcut of a stage's first block. The numbers are the paper's table as timm
    and keras_cv_attention_models have it.
    """
    act, by_stage = activation_named(activation), [heads] * len(WIDTHS) if isinstance(heads, int) else heads
    if len(by_stage) != len(WIDTHS):
        raise InputError(f"heads is {heads!r}, expected a number or one per stage ({len(WIDTHS)})")
    outputs = [round(width * output_ratio) for width in WIDTHS]
    last = None
    if final_width is not None:
        last = nn.Sequential(*conv_norm(outputs[-1], final_width, 1), act()), final_width

    def mix(place: Place) -> nn.Module:
        return halo_mix(
            place,
            act,
            heads=by_stage[place.stage],
            widening=value_ratio,
            block=block,
            halo=halo,
            padding=padding,
            offsets=offsets,
        )

    return ResNet(
        plain_stem(in_channels, act),
        STEM,
        mix=mix,
        between=lambda width: round(width * value_ratio),
        outputs=outputs,
        activation=act,
        last=last,
        **{"depths": (3, 3, depth, 3)} | options,
    )


def _numbers(  # one row of the published table
    block: int, halo: int, values: float, outputs: float, depth: int, image: int, final: int | None = None
) -> dict[str, Any]:
    numbers = {"block": block, "halo": halo, "value_ratio": values, "output_ratio": outputs}
    return numbers | {"depth": depth, "image_size": image, "final_width": final}


@register_classifier
def halonet_h0(**options: Any) -> ResNet:
    """HaloNet-H0, for 256 pixels: 5,500,952 parameters."""
    return halonet(**_numbers(8, 3, 1.0, 0.5, 7, 256) | options)


@register_classifier
def halonet_h1(**options: Any) -> ResNet:
    """HaloNet-H1, for 256 pixels: 8,100,056 parameters. timm's has `padding="zero", offsets="queries"`."""
    return halonet(**_numbers(8, 3, 1.0, 1.0, 10, 256) | options)


@register_classifier
def halonet_h2(**options: Any) -> ResNet:
    """HaloNet-H2, for 256 pixels: 9,404,312 parameters."""
    return halonet(**_numbers(8, 3, 1.0, 1.25, 11, 256) | options)


@register_classifier
def halonet_h3(**options: Any) -> ResNet:
    """HaloNet-H3, for 320 pixels: 11,841,304 parameters."""
    return halonet(**_numbers(10, 3, 1.0, 1.5, 12, 320, 1024) | options)


@register_classifier
def halonet_h4(**options: Any) -> ResNet:
    """HaloNet-H4, for 384 pixels: 19,101,976 parameters."""
    return halonet(**_numbers(12, 2, 1.0, 3.0, 12, 384, 1280) | options)


@register_classifier
def halonet_h5(**options: Any) -> ResNet:
    """HaloNet-H5, for 448 pixels: 30,717,272 parameters; only values are widened."""
    return halonet(**_numbers(14, 2, 2.5, 2.0, 23, 448, 1536) | options)


@register_classifier
def halonet_h6(**options: Any) -> ResNet:
    """HaloNet-H6, for 512 pixels: 43,456,792 parameters; only values are widened."""
    return halonet(**_numbers(8, 4, 3.0, 2.75, 24, 512, 1536) | options)


@register_classifier
def halonet_h7(**options: Any) -> ResNet:
    """HaloNet-H7, for 600 pixels: 67,433,240 parameters; only values are widened."""
    return halonet(**_numbers(10, 3, 4.0, 3.5, 26, 600, 2048) | options)


def _halos(**numbers: Any) -> Any:
    """The mixes of timm's hybrids for an activation; its numbers may be overridden."""
    return lambda activation: lambda place: halo_mix(place, activation, **numbers)


@register_classifier
def halonet26t(*, padding: str = "zero", offsets: str = "queries", **options: Any) -> ResNet:
    """timm's halonet26t, for 256 pixels, attention in the last three blocks: 12,480,288 parameters."""
    return tiered_resnet(_halos(block=8, halo=2, padding=padding, offsets=offsets), **options)


@register_classifier
def halonet50ts(*, padding: str = "zero", offsets: str = "queries", **options: Any) -> ResNet:
    """timm's halonet50ts, for 256 pixels, attention in five blocks, SiLU: 22,733,280 parameters."""

    def attention(activation: Activation) -> Mix:
        return lambda place: halo_mix(
            place,
            activation,
            heads=4 if place.stage == 1 else HEADS,
            block=8,
            halo=3,
            padding=padding,
            offsets=offsets,
        )

    return tiered_resnet(attention, DEPTHS_50, ATTENTION_50, **{"activation": "silu"} | options)


@register_classifier
def eca_halonext26ts(*, padding: str = "zero", offsets: str = "queries", **options: Any) -> ResNet:
    """timm's eca_halonext26ts, for 256 pixels: groups of 16 channels, ECA, SiLU; 10,756,885 parameters."""
    attention = _halos(block=8, halo=2, head_size=16, padding=padding, offsets=offsets)
    numbers: dict[str, Any] = {"activation": "silu", "group_size": 16, "gate": ChannelConvolution}
    return tiered_resnet(attention, **numbers | options)
