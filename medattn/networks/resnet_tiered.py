"""timm's small ResNets with attention in some of the last blocks: a stem of three widths, any operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from medattn.networks.resnet import (
    Activation,
    Make,
    Mix,
    ResNet,
    activation_named,
    convolution_mix,
    deep_stem,
    mix_at,
)

TIERED = (24, 32, 64)  # channels of the stem's convolutions
DEPTHS_26, DEPTHS_50 = (2, 2, 2, 2), (3, 4, 6, 3)
ATTENTION_26 = {2: (1,), 3: (0, 1)}  # stage -> blocks
ATTENTION_50 = {1: (3,), 2: (1, 3, 5), 3: (1,)}


def tiered_resnet(
    attention: Callable[[Activation], Mix],
    depths: Sequence[int] = DEPTHS_26,
    where: Mapping[int, Sequence[int]] = ATTENTION_26,
    *,
    activation: str = "relu",
    group_size: int | None = None,
    gate: Make | None = None,
    in_channels: int = 3,
    image_size: int = 256,
    **options: Any,
) -> ResNet:
    """A ResNet, [B, in_channels, h, w] -> [B, num_classes].

    attention: makes the mix of the blocks `where` (stage -> blocks, from 0), for an activation. group_size,
    gate: of the 3x3 convolutions of the other blocks, see `convolution_mix`. options: of `ResNet`.
    """
    act = activation_named(activation)
    convolution = partial(convolution_mix, activation=act, group_size=group_size, gate=gate)
    return ResNet(
        deep_stem(TIERED, in_channels, act),
        TIERED[-1],
        depths=depths,
        mix=mix_at(where, attention(act), convolution),
        activation=act,
        image_size=image_size,
        **options,
    )
