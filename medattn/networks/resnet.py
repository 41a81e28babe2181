"""Residual networks for images, and the seam through which attention takes the place of their 3x3 convolutions.

What mixes positions inside a bottleneck is a value: a function from a place in the network to a module. The
families `axial_resnet`, `halonet`, `lambda_resnet` and `lesa` differ in it, in their stems and in numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from medattn.networks.registry import register

Activation = Callable[[], nn.Module]

STRIDES = (1, 2, 2, 2)  # of the first block of each stage
WIDTHS = (64, 128, 256, 512)
EXPANSION = 4


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


def convolution_mix(place: Place) -> nn.Module:
    """The middle of a plain bottleneck: 3x3 convolution with the stride, norm, ReLU."""
    return nn.Sequential(*conv_norm(place.width, place.width, 3, place.stride), relu())


def conv_norm(inputs: int, outputs: int, side: int, stride: int = 1, *, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias, padded to keep the map, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(outputs)]


class Bottleneck(nn.Module):
    """act(shortcut(x) + norm(conv(excite(mix(act(norm(conv(x))))))))), both convolutions 1x1.

    [B, inputs, h, w] -> [B, outputs, h / stride, w / stride]. mix: keeps the channels, takes the stride and
    brings its own norm and activation. between: channels after mix, where it changes them. excite: on these
    channels; none if None. The last norm starts at zero, so that a block starts as its shortcut.
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
    ) -> None:
        super().__init__()
        middle = place.width if between is None else between
        self.reduce = nn.Sequential(*conv_norm(inputs, place.width, 1), activation())
        self.mix = mix(place)
        self.excite = nn.Identity() if excite is None else excite(middle)
        self.expand = nn.Sequential(*conv_norm(middle, outputs, 1))
        nn.init.zeros_(self.expand[1].weight)  # type: ignore[arg-type]
        self.shortcut: nn.Module = nn.Identity()
        if place.stride > 1 or inputs != outputs:
            self.shortcut = _shortcut(inputs, outputs, place.stride, average_shortcut)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, h, w] -> [B, outputs, h / stride, w / stride]."""
        out: Tensor = self.act(self.expand(self.excite(self.mix(self.reduce(x)))) + self.shortcut(x))
        return out


def _shortcut(inputs: int, outputs: int, stride: int, average: bool) -> nn.Module:
    if average and stride > 1:  # ResNet-D: nothing is thrown away
        pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        return nn.Sequential(pool, *conv_norm(inputs, outputs, 1))
    return nn.Sequential(*conv_norm(inputs, outputs, 1, stride))


class ResNet(nn.Module):
    """[B, 3, h, w] -> logits [B, num_classes].

    stem: image -> map of a quarter of its side with stem_channels. depths, widths, outputs, strides: one number
    per stage. mix: see the module. last: further layers between the last stage and the mean over positions,
    with their channels. image_size: what tables of positions are made for.

    `features` gives the maps after each stage, for other heads.
    """

    def __init__(
        self,
        stem: nn.Module,
        stem_channels: int,
        *,
        depths: Sequence[int],
        widths: Sequence[int] = WIDTHS,
        outputs: Sequence[int] | None = None,
        strides: Sequence[int] = STRIDES,
        mix: Mix = convolution_mix,
        between: Callable[[int], int] | None = None,
        num_classes: int = 1000,
        image_size: int = 224,
        last: tuple[nn.Module, int] | None = None,
        **block: Any,
    ) -> None:
        super().__init__()
        self.stem, self.stages = stem, nn.ModuleList()
        outputs = outputs or [EXPANSION * width for width in widths]
        channels, side = stem_channels, -(-image_size // 4)
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                place = Place(stage, index, widths[stage], strides[stage] if index == 0 else 1, side)
                middle = between(place.width) if between else None
                blocks.append(Bottleneck(channels, outputs[stage], place, mix, between=middle, **block))
                channels, side = outputs[stage], -(-side // place.stride)
            self.stages.append(nn.Sequential(*blocks))
        self.last, channels = last or (nn.Identity(), channels)
        self.head = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps after each stage, finest first; usually at 1/4, 1/8, 1/16 and 1/32 of the image's side."""
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
