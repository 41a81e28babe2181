"""The U-Net in 2D and 3D, plain and with attention in its decoder.

Which attention is a value: a function from channels to a module. The network places it and knows no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import Convolution, ResidualUnit
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.errors import InputError
from medattn.layers.attention import MakeAttention

Stride = tuple[int, ...]

BACKGROUND_LOGIT = 4.0  # nearly all voxels are background: start from that prior (Lin et al. 2017)
WIDTHS = (16, 32, 64, 128, 256, 320)  # half of nnU-Net's: more steps in the same time


class UNet(nn.Module):
    """Encoder-decoder with skip connections; [B, in_channels, *size] -> [B, out_channels, *size].

    strides: per step down, per axis. widths: channels per level, finest first. convs: convolutions per level
    in the encoder and in the decoder. residual: shortcut around each level's convolutions. norm: "instance"
    or "batch".
    attention: built with (channels, spatial_dims) and placed after the decoder levels named in
    attention_levels (0 is the finest) and the encoder levels in encoder_attention_levels. If attention_levels
    is None, the level at a quarter of the resolution: attention costs little there and still sees organs, not
    blurs.
    full_resolution: if False, the first stride is taken by the first convolution and undone by the last one,
    so that no feature map has the input's size: most of a CPU's time goes there.
    deep_supervision: in training mode, return a list of logits, finest first, one per decoder level.

    Sizes need not be multiples of the strides: inputs are padded at the far end and logits cropped back.
    Raises InputError for options that contradict each other.
    """

    def __init__(
        self,
        *,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        strides: Sequence[Stride | int] = (2, 2, 2, 2),
        widths: Sequence[int] | None = None,
        convs: Sequence[int] | None = None,
        residual: bool = False,
        norm: str = "instance",
        attention: MakeAttention | None = None,
        attention_levels: Sequence[int] | None = None,
        encoder_attention_levels: Sequence[int] = (),
        full_resolution: bool = True,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        steps = [_stride(s, spatial_dims) for s in strides]
        self.multiple = tuple(math.prod(step[axis] for step in steps) for axis in range(spatial_dims))
        stem = (1,) * spatial_dims if full_resolution else steps.pop(0)
        widths = list(widths or WIDTHS[1 - full_resolution :][: len(steps) + 1])
        if attention_levels is None:
            attention_levels = (min(1 + full_resolution, len(steps) - 1),)
        counts = list(convs or [1 if full_resolution else 2] + [2] * (len(widths) - 1))
        _check(spatial_dims, widths, steps, counts, norm, attention_levels if attention else ())
        _check_levels("encoder_attention_levels", encoder_attention_levels, len(widths))
        self.deep_supervision = deep_supervision

        def attend(level: int, levels: Sequence[int]) -> nn.Module:
            wanted = attention is not None and level in levels
            return attention(widths[level], spatial_dims) if attention and wanted else nn.Identity()

        def stage(inputs: int, width: int, count: int, stride: Stride | int = 1) -> nn.Module:
            return _stage(spatial_dims, inputs, width, count, stride, norm, residual)

        self.encoder = nn.ModuleList([stage(in_channels, widths[0], counts[0], stem)])
        for level, step in enumerate(steps, start=1):
            self.encoder.append(stage(widths[level - 1], widths[level], counts[level], step))
        self.encoder_attention = nn.ModuleList(
            attend(level, encoder_attention_levels) for level in range(len(widths))
        )
        self.up, self.decoder, self.attention, self.heads = (nn.ModuleList() for _ in range(4))
        transposed = nn.ConvTranspose3d if spatial_dims == 3 else nn.ConvTranspose2d
        for level, step in enumerate(steps):
            self.up.append(transposed(widths[level + 1], widths[level], step, step))  # type: ignore[arg-type]
            self.decoder.append(stage(2 * widths[level], widths[level], counts[level]))
            self.attention.append(attend(level, attention_levels))
            if level == 0 or deep_supervision:
                self.heads.append(transposed(widths[level], out_channels, stem, stem))  # type: ignore[arg-type]
                with torch.no_grad():
                    self.heads[-1].get_parameter("bias")[0] += BACKGROUND_LOGIT

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        size = x.shape[2:]
        if any(padding := padding_to_multiple(size, self.multiple)):
            x = F.pad(x, padding, mode="replicate")
        skips = []
        for stage, attention in zip(self.encoder, self.encoder_attention, strict=True):
            x = attention(stage(x))
            skips.append(x)
        logits = []
        for level in reversed(range(len(self.up))):
            x = self.decoder[level](torch.cat([self.up[level](x), skips[level]], 1))
            x = self.attention[level](x)
            if level == 0 or (self.deep_supervision and self.training):
                logits.append(self.heads[level](x))
        finest = logits[-1][(..., *(slice(n) for n in size))]
        return [finest, *reversed(logits[:-1])] if self.deep_supervision and self.training else finest


def _stage(
    dims: int, inputs: int, width: int, count: int, stride: Stride | int, norm: str, residual: bool
) -> nn.Module:
    settings: dict[str, Any] = {
        "norm": ("instance", {"affine": True}) if norm == "instance" else norm,
        "act": ("leakyrelu", {"negative_slope": 0.01, "inplace": True}),
        "adn_ordering": "NA",
    }
    if residual:
        unit: nn.Module = ResidualUnit(dims, inputs, width, strides=stride, subunits=count, **settings)
        return unit
    return nn.Sequential(
        *(
            Convolution(
                dims, width if n else inputs, width, strides=1 if n else stride, bias=False, **settings
            )
            for n in range(count)
        )
    )


def _stride(stride: Stride | int, dims: int) -> Stride:
    return (stride,) * dims if isinstance(stride, int) else tuple(stride)


def padding_to_multiple(size: Sequence[int], multiple: Sequence[int]) -> list[int]:
    """Arguments of F.pad that bring each axis to a multiple, last axis first."""
    return [n for s, m in zip(reversed(size), reversed(multiple), strict=True) for n in (0, -s % m)]


def _check(
    dims: int,
    widths: Sequence[int],
    steps: Sequence[Stride],
    counts: Sequence[int],
    norm: str,
    levels: Sequence[int],
) -> None:
    if dims not in (2, 3):
        raise InputError(f"spatial_dims is {dims}, expected 2 or 3")
    if not steps:
        raise InputError("a U-Net needs a stride beyond that of its first convolution; give more strides")
    if len(steps) != len(widths) - 1 or len(counts) != len(widths):
        raise InputError(
            f"{len(widths)} widths need {len(widths) - 1} strides and {len(widths)} convs, "
            f"found {len(steps)} and {len(counts)}"
        )
    if norm not in ("instance", "batch"):
        raise InputError(f"norm is {norm!r}, expected 'instance' or 'batch'")
    _check_levels("attention_levels", levels, len(steps))


def _check_levels(name: str, levels: Sequence[int], count: int) -> None:
    if outside := [level for level in levels if not 0 <= level < count]:
        part = "encoder" if name.startswith("encoder") else "decoder"
        raise InputError(f"{name} {outside} do not exist: the {part} has levels 0 to {count - 1}")
