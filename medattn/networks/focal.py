"""Focal Transformers for images (Yang et al. 2021, arXiv 2107.00641): near keys fine, far keys pooled.

Attention is a layer of its own, not an operator: its softmax runs over two grids at once, positions and
pooled windows, and a neighbour's bias belongs to a pair of query and key and not to their offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from medattn.errors import InputError
from medattn.layers.companions.focal import INIT_STD, FocalBlock, WindowAttention, neighbour_offsets
from medattn.networks.registry import register_classifier

WINDOW = 7
EXPAND = 3
FOCAL_WINDOWS = (7, 5, 3, 1)  # pooled windows along an axis, by stage
PATCH = 4


class PatchEmbed(nn.Module):
    """A convolution that divides the map's sides by its stride, and a norm over channels.

    [B, inputs, h, w] -> [B, outputs, ceil(h / stride), ceil(w / stride)]; what is missing from a multiple of
    the stride at the far end is zeros. overlap: kernels of 7 (stride 4) and 3 (stride 2) instead of patches.

    Parameters: kernel^2 inputs outputs + 3 outputs.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, overlap: bool) -> None:
        super().__init__()
        self.stride = stride
        side, padding = {4: (7, 2), 2: (3, 1)}[stride] if overlap else (stride, 0)
        self.proj = nn.Conv2d(inputs, outputs, side, stride, padding)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, h, w] -> [B, outputs, ceil(h / stride), ceil(w / stride)]."""
        h, w = x.shape[2:]
        x = self.proj(F.pad(x, (0, -w % self.stride, 0, -h % self.stride)))
        out: Tensor = self.norm(x.movedim(1, -1))
        return out.movedim(-1, 1)


class FocalTransformer(nn.Module):
    """[B, 3, h, w] -> logits [B, num_classes], with the names of microsoft/Focal-Transformer.

    width: channels C of the first stage; they double with every stage. depths, heads, focal_windows: one
    number per stage. conv_embedding: overlapping convolutions before stages. drop_path: of the last block,
    growing linearly from 0. image_size: side of the images that the network is for, best a multiple of 32;
    others work. A stage whose map is then no larger than a window has windows of the map's side and no ring.

    published: as the authors' code counts keys, see `FocalBlock`: a ring of 132 neighbours, 12 of them twice,
    wraps around the map's border. Their weights need it. False: a ring of 120, inside the map
    (`from_published` brings weights into this form).

    Parameters: those of `FocalBlock` and `PatchEmbed`, 16 C + (8 C + 1) num_classes with four stages. Unlike
    the authors', whose initialisation overwrites it, pooling starts at the mean of a window.
    """

    head_parts = ("norm", "head")  # what `features` does without

    def __init__(
        self,
        *,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        focal_windows: Sequence[int] = FOCAL_WINDOWS,
        window: int = WINDOW,
        expand: int = EXPAND,
        conv_embedding: bool = False,
        published: bool = True,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        if image_size < 1:
            raise InputError(f"image_size must be at least 1, got {image_size}")
        rates = [drop_path * n / max(1, sum(depths) - 1) for n in range(sum(depths))]
        self.patch_embed = PatchEmbed(3, width, PATCH, overlap=conv_embedding)
        self.layers = nn.ModuleList()
        self.feature_channels, self.feature_strides = [], []
        side, stride = -(-image_size // PATCH), PATCH
        for stage, (depth, stage_heads, far) in enumerate(zip(depths, heads, focal_windows, strict=True)):
            whole = side <= window
            blocks = [
                FocalBlock(
                    width,
                    2,
                    heads=stage_heads,
                    window=min(side, window),
                    expand=0 if whole else expand,
                    focal_window=far,
                    drop_path=rates.pop(0),
                    published=published,
                )
                for _ in range(depth)
            ]
            last = stage == len(depths) - 1
            down = nn.Identity() if last else PatchEmbed(width, 2 * width, 2, overlap=conv_embedding)
            self.layers.append(nn.ModuleDict({"blocks": nn.Sequential(*blocks), "downsample": down}))
            self.feature_channels.append(width)
            self.feature_strides.append(stride)
            width, side, stride = width if last else 2 * width, -(-side // 2), 2 * stride
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=INIT_STD)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps after each stage, finest first, at 1/4, 1/8, 1/16 and 1/32 of the image's side, rounded up."""
        maps = []
        x = self.patch_embed(x)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            maps.append(layer["blocks"](x))
            x = layer["downsample"](maps[-1])
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, h, w] -> [B, num_classes]."""
        tokens = self.features(x)[-1].flatten(2).mT
        logits: Tensor = self.head(self.norm(tokens).mean(1))
        return logits

    def no_weight_decay(self) -> set[str]:
        """Names of the tables of positions, which the authors leave out of weight decay."""
        return {name for name, _ in self.named_parameters() if "relative_position_bias_table" in name}


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Names in a state dict of microsoft/Focal-Transformer, which are ours, without those of indices."""
    return {name: name for name in names if not name.endswith(WindowAttention.CONSTANTS)}


def from_published(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of microsoft/Focal-Transformer as `network.load_state_dict` takes them.

    A network with published=False has one bias for each key: two logits of the same key, e^a + e^b times its
    weight in the softmax, are one with the bias log(e^a + e^b). So attention is the same wherever no ring
    reaches over the map's border.
    """
    ours = {name: weights[name] for name in our_names(weights)}
    for prefix, layer in network.named_modules():
        name = f"{prefix}.relative_position_bias_table_to_neighbors"
        if isinstance(layer, WindowAttention) and not layer.published and name in ours:
            ours[name] = _one_bias_per_key(ours[name], layer.window, layer.expand)
    return ours


def _one_bias_per_key(table: Tensor, window: int, expand: int) -> Tensor:
    """[1, H, w^2, 132] -> [1, H, w^2, 120]; a table of another width as it is."""
    places = neighbour_offsets(2, window, expand)
    if table.shape[-1:] != places.shape[:1]:
        return table
    once = neighbour_offsets(2, window, expand, distinct=True)
    other = (once[:, None] != places).any(-1)  # [120, 132]
    return table[..., None, :].masked_fill(other, float("-inf")).logsumexp(-1)


TINY: dict[str, Any] = {"width": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)}
SMALL: dict[str, Any] = TINY | {"depths": (2, 2, 18, 2)}
BASE: dict[str, Any] = {"width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)}


@register_classifier
def focal_tiny(**options: Any) -> FocalTransformer:
    """Focal-T, 28,880,380 parameters; 30,825,244 with conv_embedding=True."""
    return FocalTransformer(**(TINY | options))


@register_classifier
def focal_small(**options: Any) -> FocalTransformer:
    """Focal-S, 51,141,940 parameters; 53,086,804 with conv_embedding=True."""
    return FocalTransformer(**(SMALL | options))


@register_classifier
def focal_base(**options: Any) -> FocalTransformer:
    """Focal-B, 89,815,400 parameters; 93,268,712 with conv_embedding=True."""
    return FocalTransformer(**(BASE | options))
