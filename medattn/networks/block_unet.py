"""The published 2D U-Net with local block-wise self attention (Jiang et al. 2019), to the integer."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.errors import InputError
from medattn.layers.attention import RasterBlockAttention
from medattn.networks.registry import register
from medattn.networks.unet import padding_to_multiple

WIDTHS = (64, 128, 256, 512, 512)
PLACEMENTS = {"penultimate": 3, "last": 4, "none": 0}  # after this step up
MULTIPLE = 16


class BlockUNet2d(nn.Module):
    """[B, in_channels, h, w] -> [B, out_channels, h, w]; padded to multiples of 16 and cropped back.

    Four steps down by max pooling and up by bilinear interpolation (corners aligned), two 3x3 convolutions
    with batch norm per level, 512 channels at the two coarsest. `layers` block attentions follow the third
    step up (placement "penultimate", the published default: half the resolution), the fourth ("last") or
    none ("none").

    Parameters with one input channel: 13,394,112 + 65 out_channels, and 12,481 per attention. The authors'
    code (cerr/CT_HeadAndNeck_OARs) builds a third one that it never calls; state dicts with its names load,
    without that one.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 7,
        placement: str = "penultimate",
        layers: int = 2,
        block: int = 24,
        halo: int = 12,
    ) -> None:
        super().__init__()
        if spatial_dims != 2:
            raise InputError(
                f"block_unet_2d is a network for images: spatial_dims is {spatial_dims}, expected 2"
            )
        if placement not in PLACEMENTS:
            raise InputError(f"placement is {placement!r}, expected {', '.join(map(repr, PLACEMENTS))}")
        self.step = PLACEMENTS[placement]
        self.inc = _double_conv(in_channels, WIDTHS[0])
        self.down = nn.ModuleList(_double_conv(a, b) for a, b in pairwise(WIDTHS))
        self.up = nn.ModuleList(_double_conv(2 * a, max(a // 2, 64)) for a in reversed(WIDTHS[:-1]))
        self.attention = nn.Sequential(
            *(RasterBlockAttention(64, block=block, halo=halo) for _ in range(layers if self.step else 0))
        )
        self.outc = nn.Conv2d(WIDTHS[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, h, w] -> logits [B, out_channels, h, w]."""
        h, w = x.shape[2:]
        if any(padding := padding_to_multiple((h, w), (MULTIPLE, MULTIPLE))):
            x = F.pad(x, padding, mode="replicate")
        skips = [self.inc(x)]
        for stage in self.down:
            skips.append(stage(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for step, stage in enumerate(self.up, start=1):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = stage(torch.cat([skips.pop(), x], 1))
            if step == self.step:
                x = self.attention(x)
        out: Tensor = self.outc(x)[..., :h, :w]
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            ours = our_name(name.removeprefix(prefix), len(self.attention))
            value = state_dict.pop(name)
            if ours:
                state_dict[prefix + ours] = value
        super()._load_from_state_dict(state_dict, prefix, *args)


def _double_conv(inputs: int, width: int) -> nn.Sequential:
    steps: list[nn.Module] = []
    for channels in (inputs, width):
        steps += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*steps)


def our_name(name: str, layers: int) -> str:
    """Our name for one of the authors', empty for what is not kept; any other name as it is.

    Theirs: inc.conv.conv.N, downN.mpconv.1.conv.N, upN.conv.conv.N, outc.conv, Block_SAN.inter_block_SA.
    """
    if found := re.fullmatch(r"Block_SA(\d)\.inter_block_SA\.(.+)", name):
        index = int(found[1]) - 1
        part = found[2].replace("_conv.", ".")
        return f"attention.{index}.{part}" if index < layers else ""
    if found := re.fullmatch(r"(down|up)(\d)\.(?:mpconv\.1|conv)\.conv\.(.+)", name):
        return f"{found[1]}.{int(found[2]) - 1}.{found[3]}"
    return name.replace("inc.conv.conv.", "inc.").replace("outc.conv.", "outc.")


@register
def block_unet_2d(**options: Any) -> BlockUNet2d:
    """The published head-and-neck U-Net with two layers of block attention (Jiang et al. 2019), 2D."""
    return BlockUNet2d(**options)
