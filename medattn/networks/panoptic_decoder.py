"""The decoders and heads of Panoptic-DeepLab (Cheng et al., CVPR 2020): from maps of a backbone to one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.networks.resnet import relu

KERNEL = 5  # of depthwise convolutions, here and in the heads
RATES = (6, 12, 18)  # of dilation in ASPP, at 1/16 of the image's sides
LAST_STD = 0.01  # of a head's last weights, at the start


def conv_norm_relu(
    inputs: int, outputs: int, kernel: int = 1, *, groups: int = 1, dilation: int = 1
) -> list[nn.Module]:
    """A convolution without bias that keeps the map's size, its batch norm and ReLU."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, 1, padding, dilation, groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(outputs), relu()]


def separable(inputs: int, outputs: int, kernel: int = KERNEL, dilation: int = 1) -> nn.Sequential:
    """A depthwise convolution, then a 1x1 one, each with batch norm and ReLU.

    Parameters: inputs (kernel^2 + 2) + inputs outputs + 2 outputs.
    """
    depthwise = conv_norm_relu(inputs, inputs, kernel, groups=inputs, dilation=dilation)
    return nn.Sequential(*depthwise, *conv_norm_relu(inputs, outputs))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. 2017), [B, inputs, h, w] -> [B, outputs, h, w].

    A 1x1 convolution, three dilated 3x3 ones and the mean over the image side by side, joined by a 1x1
    convolution, then dropout. depthwise: with separable 3x3 convolutions; False for full ones. The mean's
    convolution has no norm, which could not be trained with one image.

    Parameters: inputs outputs (1 + 3 + 1) + 3 (11 inputs + 2 outputs) + 2 outputs + 5 outputs^2 + 2 outputs,
    or 27 inputs outputs + 6 outputs where it says 3 inputs outputs and 3 (11 inputs + 2 outputs).
    """

    def __init__(self, inputs: int, outputs: int, *, depthwise: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        self.near = nn.Sequential(*conv_norm_relu(inputs, outputs))
        self.atrous = nn.ModuleList(
            separable(inputs, outputs, 3, rate)
            if depthwise
            else nn.Sequential(*conv_norm_relu(inputs, outputs, 3, dilation=rate))
            for rate in RATES
        )
        self.pooled = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), relu())
        branches = 2 + len(RATES)
        self.join = nn.Sequential(*conv_norm_relu(branches * outputs, outputs), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, h, w] -> [B, outputs, h, w]."""
        whole = self.pooled(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        maps = [self.near(x), *(branch(x) for branch in self.atrous), whole]
        out: Tensor = self.join(torch.cat(maps, 1))
        return out


class Decoder(nn.Module):
    """Two fusions of a coarse map with finer ones: -> [B, width, h, w], as fine as the finest.

    Each enlarges the map, concatenates the finer one, projected, and ends in a separable 5x5 convolution.
    channels: of the maps at 1/4 and 1/8 of the image and of the coarse one, which is context's input.
    context: what the coarse map goes through, with the channels that come out; None for nothing. Projections
    have width / 4 channels at 1/8 and width / 8 at 1/4.
    """

    def __init__(
        self, channels: Sequence[int], width: int, context: tuple[nn.Module, int] | None = None
    ) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.context, inputs = context or (nn.Identity(), coarse)
        self.project8 = nn.Sequential(*conv_norm_relu(middle, width // 4))
        self.fuse8 = separable(inputs + width // 4, width)
        self.project4 = nn.Sequential(*conv_norm_relu(fine, width // 8))
        self.fuse4 = separable(width + width // 8, width)

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        """Maps [B, channels, ...], finest first -> [B, width, h, w] of the size of the finest."""
        x = enlarged(self.context(coarse), middle)
        x = self.fuse8(torch.cat([x, self.project8(middle)], 1))
        out: Tensor = self.fuse4(torch.cat([enlarged(x, fine), self.project4(fine)], 1))
        return out


class Float32Conv2d(nn.Conv2d):
    """A convolution that autocast leaves in the precision of its weights.

    In bfloat16, neighbouring positions of a heat map often get the same value; between equal values, bilinear
    resizing makes plateaus, every pixel of which is a centre: 1 of 20 instances would be found five times.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, h, w] -> [B, out_channels, h, w]."""
        if x.is_meta:  # for which autocast does not exist
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def head(inputs: int, width: int, outputs: int, *, float32: bool = False) -> nn.Sequential:
    """A separable 5x5 convolution to width channels and a 1x1 one: [B, inputs, h, w] -> [B, outputs, h, w].

    float32: whether the last convolution stays in float32 under autocast.

    Parameters: 27 inputs + inputs width + 2 width + (width + 1) outputs.
    """
    last = (Float32Conv2d if float32 else nn.Conv2d)(width, outputs, 1)
    nn.init.trunc_normal_(last.weight, std=LAST_STD)
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    return nn.Sequential(*separable(inputs, width), last)


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """A map at the size of another, the centres of their corner positions aligned."""
    size = like.shape[2:]
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=True)
