"""Axial-ResNet (Axial-DeepLab: Wang et al., ECCV 2020): attention along both axes for 3x3 convolutions.

Two published forms differ, and both are here. The authors' PyTorch code (csrhddlam/axial-deeplab), the
default, has tables of exactly the offsets that occur at 224 pixels and averages over 2 x 2 positions after
both layers. The paper and google-research/deeplab2 have tables of 509 rows and stride each axis after its own
layer: `rows=509, striding="each"`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from medattn.errors import InputError
from medattn.layers.axial import AxialAttention2d
from medattn.networks.published import resnet_name
from medattn.networks.registry import register_classifier
from medattn.networks.resnet import STRIDES, Bottleneck, Mix, Place, ResNet, conv_norm, deep_stem, relu

EXPANSION = 2
STEMS = ("conv", "three_convs", "axial")
STRIDINGS = ("both", "each")
DEPTHS_26, DEPTHS_50 = (1, 2, 4, 1), (3, 4, 6, 3)


def axial_mix(
    place: Place, *, rows: int | None = None, span: int | None = None, striding: str = "both"
) -> nn.Module:
    """Attention along the height, then along the width, and ReLU: [B, width, h, w], strided if the place is.

    rows, span: of `axial_resnet`. striding: "both" averages over stride x stride positions after both layers,
    as the authors' code does; "each" keeps every stride-th position along an axis after its own layer.
    """
    length = place.side if rows is None else (rows + 1) // 2
    layers: list[tuple[str, nn.Module]] = []
    for axis, name in enumerate(("height", "width")):
        attention = AxialAttention2d(place.width, place.width, axis=axis, length=length, span=span)
        layers.append((name, attention))
        if place.stride > 1 and striding == "each":  # a window of one position: subsampling
            layers.append(
                (f"stride_{name}", nn.AvgPool2d(1, (place.stride, 1) if axis == 0 else (1, place.stride)))
            )
    if place.stride > 1 and striding == "both":
        # the border of odd maps is kept, as by the strided shortcut; even ones are the authors'
        layers.append(("pool", nn.AvgPool2d(place.stride, ceil_mode=True, count_include_pad=False)))
    return nn.Sequential(OrderedDict([*layers, ("act", relu())]))


def axial_resnet(
    depths: Sequence[int],
    scale: float,
    *,
    num_classes: int = 1000,
    image_size: int = 224,
    in_channels: int = 3,
    rows: int | None = None,
    stem: str = "conv",
    span: int | None = None,
    strides: Sequence[int] = STRIDES,
    striding: str = "both",
    drop_path: float = 0.0,
) -> ResNet:
    """An Axial-ResNet, [B, in_channels, h, w] -> [B, num_classes]: 8 heads, widths 128 to 1024 times scale.

    depths: blocks per stage, whose outputs have twice the width. image_size: gives the side K of every map
    and with it tables of 2 K - 1 rows, unless rows (odd) is given. Images of any size are taken: offsets
    beyond a table share its end rows, as in deeplab2; `resized_tables` interpolates instead. span: keys per
    query (odd); all of the line if None. strides: of the stages; (1, 2, 2, 1) is the output stride 16 of
    Axial-DeepLab. striding: of `axial_mix`. drop_path: of `ResNet`.

    stem: "conv" is 7x7; "three_convs" is Panoptic-DeepLab's, 3x3 with 64, 64 and 128 channels times scale;
    max pooling follows both. "axial" is the stand-alone model's, three axial bottlenecks of width 64 times
    scale, the first with stride 2; the paper does not say whether max pooling follows. In deeplab2 it does
    not, and the first block of stage 1 has stride 2 instead: so it is here. The paper's has span=15.

    Parameters of a layer with c channels: 2 c^2 + 8 c + 48 + c / 4 (2 K - 1).
    Raises InputError for options that do not exist, even rows or an even span.
    """
    _check(rows, span, stem, striding)
    mix: Mix = lambda place: axial_mix(place, rows=rows, span=span, striding=striding)  # noqa: E731
    front, channels, stride = _stem(stem, in_channels, int(64 * scale), mix, image_size)
    widths = [int(128 * scale) * 2**stage for stage in range(len(depths))]
    return ResNet(
        front,
        channels,
        stem_stride=stride,
        depths=depths,
        widths=widths,
        outputs=[EXPANSION * width for width in widths],
        strides=(strides[0] * 4 // stride, *strides[1:]),
        mix=mix,
        num_classes=num_classes,
        image_size=image_size,
        drop_path=drop_path,
    )


def _check(rows: int | None, span: int | None, stem: str, striding: str) -> None:
    for option, given, known in (("stem", stem, STEMS), ("striding", striding, STRIDINGS)):
        if given not in known:
            raise InputError(f"{option} is {given!r}, expected {', '.join(map(repr, known))}")
    for option, number in (("rows", rows), ("span", span)):
        if number is not None and (number < 1 or number % 2 == 0):
            raise InputError(f"{option} is {number}, expected an odd number")


def _stem(kind: str, inputs: int, width: int, mix: Mix, image_size: int) -> tuple[nn.Module, int, int]:
    """The layers before the stages, their channels and their stride."""
    if kind == "conv":
        return nn.Sequential(*conv_norm(inputs, width, 7, 2), relu(), nn.MaxPool2d(3, 2, 1)), width, 4
    if kind == "three_convs":
        return deep_stem((width, width, 2 * width), inputs), 2 * width, 4
    blocks, channels, side = [], inputs, image_size
    for index, stride in enumerate((2, 1, 1)):
        blocks.append(Bottleneck(channels, EXPANSION * width, Place(-1, index, width, stride, side), mix))
        channels, side = EXPANSION * width, -(-side // stride)
    return nn.Sequential(*blocks), channels, 2


def resized_tables(weights: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights with their tables of relative positions interpolated to the lengths of a network's.

    For a network that is built for another image size. Linear over offsets relative to the longest one, so
    that offset 0 stays where it is.
    """
    expected = network.state_dict()
    return {
        name: F.interpolate(value[None], expected[name].shape[-1], mode="linear", align_corners=True)[0]
        if name.endswith(".relative") and name in expected and value.shape != expected[name].shape
        else value
        for name, value in weights.items()
    }


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Names in the authors' state dicts (csrhddlam/axial-deeplab) -> ours; what is not kept is left out.

    Theirs: torchvision's, and in a block conv_down, bn1, hight_block, width_block, conv_up, bn2. The buffer
    `flatten_index` of a layer says which table row a pair reads, which is computed here.
    """
    block = {
        "conv_down": "reduce.0",
        "bn1": "reduce.1",
        "hight_block": "mix.height",
        "width_block": "mix.width",
    }
    block |= {"conv_up": "expand.0", "bn2": "expand.1", "downsample": "shortcut"}
    return {name: resnet_name(name, block) for name in names if not name.endswith(".flatten_index")}


def from_published(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of this source as `network.load_state_dict` takes them; their forms are ours.

    Tables of another image size keep their length, so that loading names them; see `resized_tables`.
    """
    return {ours: weights[theirs] for theirs, ours in our_names(weights).items()}


@register_classifier
def axial_resnet26_s(**options: Any) -> ResNet:
    """Axial-ResNet-26, half width (the released axial26s): 5,944,936 parameters, 6,378,792 with 509 rows."""
    return axial_resnet(DEPTHS_26, 0.5, **options)


@register_classifier
def axial_resnet50_s(**options: Any) -> ResNet:
    """Axial-ResNet-S, half width: 11,586,216 parameters, 12,481,000 with 509 rows."""
    return axial_resnet(DEPTHS_50, 0.5, **options)


@register_classifier
def axial_resnet50_m(**options: Any) -> ResNet:
    """Axial-ResNet-M, three quarters of the width: 25,179,400 parameters, 26,521,576 with 509 rows."""
    return axial_resnet(DEPTHS_50, 0.75, **options)


@register_classifier
def axial_resnet50_l(**options: Any) -> ResNet:
    """Axial-ResNet-L: 43,973,480 parameters, 45,763,048 with 509 rows."""
    return axial_resnet(DEPTHS_50, 1, **options)


@register_classifier
def axial_resnet50_xl(**options: Any) -> ResNet:
    """Axial-ResNet-XL, twice the width: 171,158,760 parameters, 174,737,896 with 509 rows."""
    return axial_resnet(DEPTHS_50, 2, **options)
