"""XCiT: cross-covariance image transformers (El-Nouby et al. 2021, arXiv 2106.09681), all 14 of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from medattn.errors import InputError
from medattn.layers.xcit import (
    NORM_EPS,
    ClassBlock,
    CrossCovarianceAttention,
    FourierPosition,
    LocalPatchInteraction,
    Residual,
    perceptron,
)
from medattn.networks.registry import register_classifier

INIT_STD = 0.02  # of linear layers and the class token
CLASS_BLOCKS = 2
PYRAMID_STRIDES = (4, 8, 16, 32)


class XCiT(nn.Module):
    """[B, 3, h, w] -> logits [B, num_classes]; nothing depends on the image's size.

    width: C. depth: blocks of cross-covariance attention, local patch interaction and perceptron. patch: 8 or
    16, the stride of the map. eta: of LayerScale at the start. tokens_norm: see `ClassBlock`. drop_path: of
    all blocks alike, as published. pyramid: with the layers that bring `features` to several resolutions.

    The published network returns its logits twice in training, for a distillation without a token of its own;
    here they come once.

    Parameters: depth (12 C^2 + 40 C + heads) + 2 (12 C^2 + 15 C) + 68 C + (C + 1) num_classes + stem; the
    stem with p = 16: 27 C / 8 + 9 (C^2 / 32 + C^2 / 8 + C^2 / 2) + 15 C / 4, with p = 8: 27 C / 4
    + 9 (C^2 / 8 + C^2 / 2) + 7 C / 2.
    """

    head_parts = ("cls_token", "class_blocks", "norm", "head")  # what `features` does without
    dense_parts = ("pyramid",)  # what it alone needs

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        eta: float = 1.0,
        tokens_norm: bool = True,
        num_classes: int = 1000,
        image_size: int = 224,  # like every classifier; nothing here depends on it
        drop_path: float = 0.0,
        pyramid: bool = False,
    ) -> None:
        super().__init__()
        if patch not in (8, 16):
            raise InputError(f"the stem of XCiT is for patches of 8 or 16 pixels, got patch={patch}")
        self.patch = patch
        self.stem = _stem(width, patch)
        self.position = FourierPosition(width)
        self.blocks = nn.ModuleList(_block(width, heads, eta, drop_path) for _ in range(depth))
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=INIT_STD))
        self.class_blocks = nn.ModuleList(
            ClassBlock(width, heads, eta=eta, tokens_norm=tokens_norm) for _ in range(CLASS_BLOCKS)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, num_classes)
        # the published detectors take the maps after these blocks
        self.feature_blocks = [depth * part // 6 - 1 for part in (2, 3, 4, 6)]
        self.feature_channels = [width] * 4
        self.feature_strides = list(PYRAMID_STRIDES) if pyramid else [patch] * 4
        self.pyramid = nn.ModuleList(_rescale(width, s / patch) for s in PYRAMID_STRIDES if pyramid)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.position.project:
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)

    def embed(self, image: Tensor) -> Tensor:
        """image [B, 3, h, w] -> [B, ceil(h / patch), ceil(w / patch), C] with positions."""
        x = self.stem(image).movedim(1, -1).contiguous()
        out: Tensor = x + self.position((x.shape[1], x.shape[2]))
        return out

    def features(self, x: Tensor) -> list[Tensor]:
        """Four maps [B, C, ceil(h / s), ceil(w / s)], finest first, after a third, half, two thirds and all.

        The strides s are `feature_strides`: 4, 8, 16 and 32 with the pyramid, else the patch for all.
        """
        size, maps = x.shape[2:], []
        x = self.embed(x)
        for index, block in enumerate(self.blocks):
            x = block(x)
            maps += [x.movedim(-1, 1)] * self.feature_blocks.count(index)
        if self.pyramid:
            maps = [rescale(y) for rescale, y in zip(self.pyramid, maps, strict=True)]
        sides = [[-(-n // stride) for n in size] for stride in self.feature_strides]
        # where the patch does not divide the image, a map scaled up is larger than the image
        return [y[..., :h, :w] for y, (h, w) in zip(maps, sides, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, h, w] -> [B, num_classes]."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], 1, -1), x.flatten(1, 2)], 1)
        for block in self.class_blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


def _stem(width: int, patch: int) -> nn.Sequential:
    """3x3 convolutions of stride 2 with batch norm, GELU between; twice as wide each, the last of `width`."""
    steps = round(math.log2(patch))
    widths = [3, *(width >> n for n in reversed(range(steps)))]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        conv = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        layers += [nn.Sequential(conv, nn.BatchNorm2d(outputs)), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def _block(width: int, heads: int, eta: float, drop_path: float) -> nn.Sequential:
    parts = (CrossCovarianceAttention(width, heads), LocalPatchInteraction(width), perceptron(width))
    return nn.Sequential(*(Residual(width, part, eta, drop_path) for part in parts))


def _rescale(width: int, factor: float) -> nn.Module:
    """What brings a map to `factor` times its stride in the published detectors; no pixel is left out."""
    if factor >= 1:
        side = int(factor)
        return nn.MaxPool2d(side, side, ceil_mode=True) if side > 1 else nn.Identity()
    double = [nn.ConvTranspose2d(width, width, 2, 2) for _ in range(round(-math.log2(factor)))]
    between = [nn.BatchNorm2d(width), nn.GELU()] * (len(double) - 1)
    return nn.Sequential(double[0], *between, *double[1:])


RENAMED = (  # from the names of facebookresearch/xcit and timm, which differ in what is optional here
    (r"^patch_embed\.proj\.", "stem."),
    (r"^pos_embed(?:er)?\.token_projection\.", "position.project."),
    (r"^(blocks\.\d+)\.(norm|gamma)1\b", r"\1.0.\2"),
    (r"^(blocks\.\d+)\.(norm|gamma)3\b", r"\1.1.\2"),
    (r"^(blocks\.\d+)\.(norm|gamma)2\b", r"\1.2.\2"),
    (r"^(blocks\.\d+)\.attn\.temperature$", r"\1.0.inner.operator.temperature"),
    (r"^(blocks\.\d+)\.attn\.", r"\1.0.inner."),
    (r"^(blocks\.\d+)\.local_mp\.", r"\1.1.inner."),
    (r"^(blocks\.\d+)\.mlp\.", r"\1.2.inner."),
    (r"^cls_attn_blocks\.", "class_blocks."),
)
FPN = re.compile(r"^fpn([1-4])\.")


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Names in a state dict of facebookresearch/xcit or timm -> ours; names that are none of theirs stay.

    The authors' detectors have further layers, fpn1 to fpn4, which are the pyramid here.
    """
    return {name: _our_name(name) for name in names}


def from_published(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of one of these sources as `network.load_state_dict` takes them.

    The authors project the class attention's queries, keys and values together, timm separately as here.
    Axes of length 1 (of temperatures, the class token, a 1x1 convolution) are those of the network. What does
    not fit it keeps the shape that it has there, so that loading names it.
    """
    expected, ours = network.state_dict(), {}
    for theirs, name in our_names(weights).items():
        value = weights[theirs]
        if name.startswith("class_blocks.") and ".qkv." in name and value.ndim:
            parts = zip("qkv", value.chunk(3), strict=False)
            ours.update({name.replace(".qkv.", f".{letter}."): part for letter, part in parts})
        elif name in expected and value.squeeze().shape == expected[name].squeeze().shape:
            ours[name] = value.reshape(expected[name].shape)
        else:
            ours[name] = value
    return ours


def _our_name(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return FPN.sub(lambda found: f"pyramid.{int(found[1]) - 1}.", name)


NANO_12: dict[str, Any] = {"width": 128, "depth": 12, "heads": 4, "tokens_norm": False}
TINY_12: dict[str, Any] = {"width": 192, "depth": 12, "heads": 4}
TINY_24: dict[str, Any] = {"width": 192, "depth": 24, "heads": 4, "eta": 1e-5}
SMALL_12: dict[str, Any] = {"width": 384, "depth": 12, "heads": 8}
SMALL_24: dict[str, Any] = {"width": 384, "depth": 24, "heads": 8, "eta": 1e-5}
MEDIUM_24: dict[str, Any] = {"width": 512, "depth": 24, "heads": 8, "eta": 1e-5}
LARGE_24: dict[str, Any] = {"width": 768, "depth": 24, "heads": 16, "eta": 1e-5}


@register_classifier
def xcit_nano_12_p16(**options: Any) -> XCiT:
    """XCiT of 128 channels, 12 blocks and patches of 16 pixels, 3,053,224 parameters."""
    return XCiT(**(NANO_12 | {"patch": 16} | options))


@register_classifier
def xcit_nano_12_p8(**options: Any) -> XCiT:
    """XCiT of 128 channels, 12 blocks and patches of 8 pixels, 3,049,016 parameters."""
    return XCiT(**(NANO_12 | {"patch": 8} | options))


@register_classifier
def xcit_tiny_12_p16(**options: Any) -> XCiT:
    """XCiT of 192 channels, 12 blocks and patches of 16 pixels, 6,716,272 parameters."""
    return XCiT(**(TINY_12 | {"patch": 16} | options))


@register_classifier
def xcit_tiny_12_p8(**options: Any) -> XCiT:
    """XCiT of 192 channels, 12 blocks and patches of 8 pixels, 6,706,504 parameters."""
    return XCiT(**(TINY_12 | {"patch": 8} | options))


@register_classifier
def xcit_tiny_24_p16(**options: Any) -> XCiT:
    """XCiT of 192 channels, 24 blocks and patches of 16 pixels, 12,116,896 parameters."""
    return XCiT(**(TINY_24 | {"patch": 16} | options))


@register_classifier
def xcit_tiny_24_p8(**options: Any) -> XCiT:
    """XCiT of 192 channels, 24 blocks and patches of 8 pixels, 12,107,128 parameters."""
    return XCiT(**(TINY_24 | {"patch": 8} | options))


@register_classifier
def xcit_small_12_p16(**options: Any) -> XCiT:
    """XCiT of 384 channels, 12 blocks and patches of 16 pixels, 26,253,304 parameters."""
    return XCiT(**(SMALL_12 | {"patch": 16} | options))


@register_classifier
def xcit_small_12_p8(**options: Any) -> XCiT:
    """XCiT of 384 channels, 12 blocks and patches of 8 pixels, 26,213,032 parameters."""
    return XCiT(**(SMALL_12 | {"patch": 8} | options))


@register_classifier
def xcit_small_24_p16(**options: Any) -> XCiT:
    """XCiT of 384 channels, 24 blocks and patches of 16 pixels, 47,671,384 parameters."""
    return XCiT(**(SMALL_24 | {"patch": 16} | options))


@register_classifier
def xcit_small_24_p8(**options: Any) -> XCiT:
    """XCiT of 384 channels, 24 blocks and patches of 8 pixels, 47,631,112 parameters."""
    return XCiT(**(SMALL_24 | {"patch": 8} | options))


@register_classifier
def xcit_medium_24_p16(**options: Any) -> XCiT:
    """XCiT of 512 channels, 24 blocks and patches of 16 pixels, 84,395,752 parameters."""
    return XCiT(**(MEDIUM_24 | {"patch": 16} | options))


@register_classifier
def xcit_medium_24_p8(**options: Any) -> XCiT:
    """XCiT of 512 channels, 24 blocks and patches of 8 pixels, 84,323,624 parameters."""
    return XCiT(**(MEDIUM_24 | {"patch": 8} | options))


@register_classifier
def xcit_large_24_p16(**options: Any) -> XCiT:
    """XCiT of 768 channels, 24 blocks and patches of 16 pixels, 189,096,136 parameters."""
    return XCiT(**(LARGE_24 | {"patch": 16} | options))


@register_classifier
def xcit_large_24_p8(**options: Any) -> XCiT:
    """XCiT of 768 channels, 24 blocks and patches of 8 pixels, 188,932,648 parameters."""
    return XCiT(**(LARGE_24 | {"patch": 8} | options))
