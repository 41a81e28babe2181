"""Residual networks for images, and the seam through which attention replaces their 3x3 convolutions.

What mixes positions inside a bottleneck is a value: a function from a place in the network to a module. The
families `axial_resnet`, `halonet`, `lambda_resnet` and `lesa` differ in it, in their stems and in numbers.
Plain ResNets, to compare with, are here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any

from torch import Tensor, nn

from medattn.errors import InputError
from medattn.layers.channels import SqueezeExcitation
from medattn.layers.drop_path import DropPath
from medattn.networks.registry import register_classifier

Activation = Callable[[], nn.Module]

STRIDES = (1, 2, 2, 2)  # of the first block of each stage
WIDTHS = (64, 128, 256, 512)
EXPANSION = 4
STEM = 64  # channels
STEM_D = (32, 32, 64)  # of the three convolutions of ResNet-D's stem


@dataclass(frozen=True)
class Place:
    """Where a bottleneck stands.

    stage and block count from 0. width: channels of its middle. stride: of its middle. side: of the map that
    enters it, at the image size that the network is made for.
    """

    stage: int
    block: int
    width: int
    stride: int
    side: int


Mix = Callable[[Place], nn.Module]
Make = Callable[[int], nn.Module]


def relu() -> nn.Module:
    """The activation of the plain ResNet."""
    return nn.ReLU(inplace=True)


def silu() -> nn.Module:
    """x sigmoid(x), also called swish."""
    return nn.SiLU(inplace=True)


ACTIVATIONS: Mapping[str, Activation] = {"relu": relu, "silu": silu}


def activation_named(name: str) -> Activation:
    """What makes an activation, for the name that an option gives. Raises InputError for an unknown one."""
    if name not in ACTIVATIONS:
        raise InputError(f"activation is {name!r}, expected {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[name]


def convolution_mix(
    place: Place, activation: Activation = relu, *, group_size: int | None = None, gate: Make | None = None
) -> nn.Module:
    """The middle of a plain bottleneck: 3x3 convolution with the stride, norm, activation.

    group_size: channels per group, all of them if None. gate: on the channels that come out; none if None.
    """
    groups = 1 if group_size is None else place.width // group_size
    layers = [*conv_norm(place.width, place.width, 3, place.stride, groups=groups), activation()]
    return nn.Sequential(*layers) if gate is None else nn.Sequential(*layers, gate(place.width))


def attention_mix(attention: nn.Module, channels: int, activation: Activation = relu) -> nn.Module:
    """The middle of a bottleneck with attention in it, from which [B, channels, h, w] comes."""
    return nn.Sequential(attention, nn.BatchNorm2d(channels), activation())


def mix_at(blocks: Mapping[int, Sequence[int]], mix: Mix, elsewhere: Mix) -> Mix:
    """One mix in some blocks (stage -> blocks, counted from 0), another one in all others."""
    return lambda place: (mix if place.block in blocks.get(place.stage, ()) else elsewhere)(place)


def conv_norm(inputs: int, outputs: int, side: int, stride: int = 1, *, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias, padded to keep the map, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(outputs)]


class Bottleneck(nn.Module):
    """act(shortcut(x) + drop(excite(norm(conv(mix(act(norm(conv(x)))))))))), both convolutions 1x1.

    [B, inputs, h, w] -> [B, outputs, h / stride, w / stride]. mix: keeps the channels, takes the stride and
    brings its own norm and activation. between: channels after mix, where it changes them. excite: on the
    outputs; none if None. drop_path: probability that a sample takes the shortcut alone, in training. The
    last norm starts at zero, so that a block starts as its shortcut.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        place: Place,
        mix: Mix,
        *,
        activation: Activation = relu,
        excite: Make | None = None,
        average_shortcut: bool = False,
        between: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        middle = place.width if between is None else between
        self.reduce = nn.Sequential(*conv_norm(inputs, place.width, 1), activation())
        self.mix = mix(place)
        self.expand = nn.Sequential(*conv_norm(middle, outputs, 1))
        self.excite = nn.Identity() if excite is None else excite(outputs)
        self.drop_path = DropPath(drop_path)
        nn.init.zeros_(self.expand[1].weight)  # type: ignore[arg-type]
        self.shortcut: nn.Module = nn.Identity()
        if place.stride > 1 or inputs != outputs:
            self.shortcut = _shortcut(inputs, outputs, place.stride, average_shortcut)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, h, w] -> [B, outputs, h / stride, w / stride]."""
        residual = self.drop_path(self.excite(self.expand(self.mix(self.reduce(x)))))
        residual += self.shortcut(x)  # no pass backward reads what a norm, a gate or drop path gave
        out: Tensor = self.act(residual)
        return out


def _shortcut(inputs: int, outputs: int, stride: int, average: bool) -> nn.Module:
    if average:  # ResNet-D: nothing is thrown away
        pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        return nn.Sequential(pool, *conv_norm(inputs, outputs, 1))
    return nn.Sequential(*conv_norm(inputs, outputs, 1, stride))


class ResNet(nn.Module):
    """[B, 3, h, w] -> logits [B, num_classes].

    stem: image -> map of 1 / stem_stride of its side with stem_channels. depths, widths, outputs, strides:
    one number per stage. mix: see the module. between: channels after mix for a width, where it changes them.
    last: further layers between the last stage and the mean over positions, with their channels. image_size:
    what tables of positions are made for. drop_path: of the last block; it grows in equal steps from zero.
    block: further options of every `Bottleneck`.

    `features` gives the maps after each stage, for other heads. feature_channels, feature_strides: of these
    maps. head_parts: what `features` does without.
    """

    head_parts = ("last", "head")

    def __init__(
        self,
        stem: nn.Module,
        stem_channels: int,
        *,
        stem_stride: int = 4,
        depths: Sequence[int],
        widths: Sequence[int] = WIDTHS,
        outputs: Sequence[int] | None = None,
        strides: Sequence[int] = STRIDES,
        mix: Mix = convolution_mix,
        between: Callable[[int], int] | None = None,
        num_classes: int = 1000,
        image_size: int = 224,
        last: tuple[nn.Module, int] | None = None,
        drop_path: float = 0.0,
        **block: Any,
    ) -> None:
        super().__init__()
        drops = (drop_path * n / max(1, sum(depths) - 1) for n in count())
        self.stem, self.stages = stem, nn.ModuleList()
        outputs = outputs or [EXPANSION * width for width in widths]
        channels, side, stride = stem_channels, -(-image_size // stem_stride), stem_stride
        self.feature_channels, self.feature_strides = list(outputs), []
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                place = Place(stage, index, widths[stage], strides[stage] if index == 0 else 1, side)
                middle = between(place.width) if between else None
                options = block | {"between": middle, "drop_path": next(drops)}
                blocks.append(Bottleneck(channels, outputs[stage], place, mix, **options))
                channels, side = outputs[stage], -(-side // place.stride)
            self.stages.append(nn.Sequential(*blocks))
            stride *= strides[stage]
            self.feature_strides.append(stride)
        self.last, channels = last or (nn.Identity(), channels)
        self.head = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps after each stage, finest first; usually at 1/4, 1/8, 1/16 and 1/32 of the image's sides."""
        maps = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, h, w] -> [B, num_classes]."""
        logits: Tensor = self.head(self.last(self.features(x)[-1]).mean((2, 3)))
        return logits


def plain_stem(in_channels: int = 3, activation: Activation = relu) -> nn.Module:
    """[B, in_channels, h, w] -> [B, 64, h / 4, w / 4]: 7x7 convolution and 3x3 max pooling, both strided."""
    return nn.Sequential(*conv_norm(in_channels, STEM, 7, 2), activation(), nn.MaxPool2d(3, 2, 1))


def deep_stem(
    widths: Sequence[int] = STEM_D, in_channels: int = 3, activation: Activation = relu
) -> nn.Module:
    """[B, in_channels, h, w] -> [B, widths[-1], h / 4, w / 4]: 3x3 convolutions, the first one strided."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise((in_channels, *widths))):
        layers += [*conv_norm(inputs, outputs, 3, 1 if index else 2), activation()]
    return nn.Sequential(*layers, nn.MaxPool2d(3, 2, 1))


def _resnet(
    blocks: Sequence[int],
    *,
    in_channels: int = 3,
    deep: bool = False,
    deep_widths: Sequence[int] = STEM_D,
    activation: str = "relu",
    **options: Any,
) -> ResNet:
    act = activation_named(activation)
    stem = deep_stem(deep_widths, in_channels, act) if deep else plain_stem(in_channels, act)
    mix = partial(convolution_mix, activation=act)
    numbers: dict[str, Any] = {"depths": blocks, "mix": mix, "activation": act}
    return ResNet(stem, deep_widths[-1] if deep else STEM, **numbers | options)


@register_classifier
def resnet26(**options: Any) -> ResNet:
    """ResNet with blocks 1, 2, 4, 1, the baseline of SASA and Axial-DeepLab: 13,696,552 parameters."""
    return _resnet((1, 2, 4, 1), **options)


@register_classifier
def resnet50(**options: Any) -> ResNet:
    """ResNet-50 (He et al. 2016), strided at 3x3 convolutions as in torchvision: 25,557,032 parameters."""
    return _resnet((3, 4, 6, 3), **options)


@register_classifier
def resnet50_d(**options: Any) -> ResNet:
    """ResNet-50-D (He et al. 2019): deep stem, shortcuts that average: 25,576,264 parameters."""
    return _resnet((3, 4, 6, 3), **{"deep": True, "average_shortcut": True} | options)


@register_classifier
def se_resnet50(**options: Any) -> ResNet:
    """ResNet-50 with squeeze-and-excitation at the end of every block: 28,088,024 parameters."""
    return _resnet((3, 4, 6, 3), **{"excite": SqueezeExcitation} | options)
