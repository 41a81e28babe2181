"""Panoptic-DeepLab (Cheng et al., CVPR 2020) on any backbone, and Axial-DeepLab (Wang et al., ECCV 2020).

A backbone is a classifier that gives `features`, with `feature_channels` and `feature_strides`, and names as
`head_parts` what it classifies with and `features` does without; these parts are taken out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor, nn

from medattn.errors import InputError
from medattn.networks.axial_resnet import DEPTHS_50, axial_resnet, resized_tables
from medattn.networks.panoptic_decoder import ASPP, Decoder, conv_norm_relu, enlarged, head
from medattn.networks.registry import create, family, register_panoptic, task_of
from medattn.panoptic import PanopticOutput
from medattn.weights import fit_weights

CLASSES = 133  # of COCO panoptic
IMAGE = 641
WIDTH = 256
FINE, MIDDLE = 4, 8  # strides of the maps that the coarse one is fused with
OFFSET_UNIT = 4.0  # image pixels per unit of the offset head, one position of its map, as in Detectron2
SPAN, ROWS = 65, 509
STRIDES = (1, 2, 2, 1)  # output stride 16
STEM = (64, 64, 128)
INTERFACE = ("features", "feature_channels", "feature_strides", "head_parts")
STRIDED: Mapping[str, Any] = {"strides": STRIDES}
BACKBONES: Mapping[str, Mapping[str, Any]] = {  # family -> options that dense prediction needs
    "resnet": STRIDED,
    "halonet": STRIDED,
    "lambda_resnet": STRIDED,
    "axial_resnet": STRIDED,
    "lesa": {"strides": STRIDES, "form": "axes"},  # the flat form takes images of one size
    "xcit": {"pyramid": True},
}


class Features(Protocol):
    """What makes a classifier a backbone."""

    feature_channels: Sequence[int]
    feature_strides: Sequence[int]
    head_parts: Sequence[str]

    def features(self, x: Tensor) -> list[Tensor]:
        """x [B, 3, h, w] -> maps [B, feature_channels[n], ceil(h / feature_strides[n]), ...]."""
        ...


class PanopticDeepLab(nn.Module):
    """[B, 3, h, w] -> PanopticOutput with maps of ceil(h / 4) x ceil(w / 4), for images of any size.

    Two decoders take the backbone's maps at strides 4 and 8 and its last one: the semantic one of `width`
    channels with a head as wide, the instance one of half the width with two heads of an eighth of it. No
    head ends in an activation: the losses are on numbers as they are.

    What the last map goes through before the first fusion: ASPP with `aspp`, a 1x1 convolution with
    `projection`, in both decoders to `width` channels; else nothing. Parameters and multiply-adds that
    Axial-DeepLab's paper gives for networks without ASPP are those without projection; google-research/
    deeplab2 projects. depthwise: separable convolutions in ASPP, which the paper's numbers have; False for
    the full ones of deeplab2. dropout: after ASPP.

    Raises InputError for a backbone without maps of these strides.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_classes: int = CLASSES,
        width: int = WIDTH,
        aspp: bool = False,
        projection: bool = False,
        depthwise: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if aspp and projection:
            raise InputError("aspp and projection are alternatives, expected one of them at most")
        if width < 16 or width % 16:  # the instance decoder is half as wide, and has an eighth of that
            raise InputError(f"width is {width}, expected a multiple of 16")
        self.levels, channels = _levels(backbone)
        for name in cast(Features, backbone).head_parts:
            delattr(backbone, name)
        self.backbone, self.shared = backbone, not (aspp or projection)

        def context() -> tuple[nn.Module, int] | None:
            if aspp:
                return ASPP(channels[-1], width, depthwise=depthwise, dropout=dropout), width
            return (nn.Sequential(*conv_norm_relu(channels[-1], width)), width) if projection else None

        self.semantic_decoder = Decoder(channels, width, context())
        self.instance_decoder = Decoder(channels, width // 2, context())
        self.semantic_head = head(width, width, num_classes)
        self.centre_head = head(width // 2, width // 8, 1, float32=True)
        self.offset_head = head(width // 2, width // 8, 2, float32=True)

    def forward(self, x: Tensor) -> PanopticOutput:
        """x [B, 3, h, w] -> semantic [B, classes, ...], centre [B, 1, ...], offset [B, 2, ...]."""
        maps = cast(Features, self.backbone).features(x)
        fine, middle, coarse = (maps[level] for level in self.levels)
        if self.shared:  # both decoders begin by enlarging the same map
            coarse = enlarged(coarse, middle)
        semantic = self.semantic_decoder(fine, middle, coarse)
        instance = self.instance_decoder(fine, middle, coarse)
        return PanopticOutput(
            self.semantic_head(semantic),
            self.centre_head(instance),
            OFFSET_UNIT * self.offset_head(instance),
        )


def _levels(backbone: nn.Module) -> tuple[tuple[int, int, int], list[int]]:
    """Which of a backbone's maps are used, and their channels: at 1/4, at 1/8 and the last."""
    name = type(backbone).__name__
    if not all(hasattr(backbone, part) for part in INTERFACE):
        raise InputError(
            f"{name} gives no maps of several resolutions and is no backbone; expected a network with "
            "`features`, such as a ResNet, XCiT or Focal Transformer"
        )
    source = cast(Features, backbone)
    strides = list(source.feature_strides)
    if FINE not in strides or MIDDLE not in strides:
        raise InputError(
            f"{name} gives maps with strides {strides}, expected some with {FINE} and {MIDDLE}; choose "
            "another backbone or its options (`strides`, for XCiT `pyramid`)"
        )
    levels = strides.index(FINE), strides.index(MIDDLE), len(strides) - 1
    return levels, [source.feature_channels[level] for level in levels]


def load_backbone(
    network: nn.Module, weights: Mapping[str, Tensor], *, path: Path = Path("the backbone's weights")
) -> None:
    """Load the weights of a classifier of ours into a network's backbone, all of them or none.

    What the classifier classifies with is left out. Axial tables of another length are interpolated, see
    `resized_tables`; layers that classifiers lack (XCiT's pyramid) keep their start. path: where the weights
    are from, for messages.

    Raises InputError with the first five names that do not fit, and their shapes.
    """
    if not isinstance(network, PanopticDeepLab):
        raise InputError(f"{type(network).__name__} has no backbone that weights could be loaded into")
    backbone = network.backbone
    left_out = cast(Features, backbone).head_parts
    kept = {name: value for name, value in weights.items() if name.split(".")[0] not in left_out}
    dense = getattr(backbone, "dense_parts", ())
    own = {name: value for name, value in backbone.state_dict().items() if name.split(".")[0] in dense}
    fitted = own | resized_tables(kept, backbone)
    fit_weights(backbone, fitted, path, name=f"the backbone, a {type(backbone).__name__}", theirs={})


@register_panoptic
def panoptic_deeplab(
    *,
    backbone: str = "resnet50",
    backbone_options: Mapping[str, Any] | None = None,
    num_classes: int = CLASSES,
    image_size: int | Sequence[int] = IMAGE,
    **decoder: Any,
) -> PanopticDeepLab:
    """Panoptic-DeepLab on any classifier with maps of several resolutions: 24.7 M parameters on ResNet-50.

    backbone: its name. backbone_options: of it; by default ResNets of all kinds have output stride 16, XCiT
    its pyramid and LESA tables for any image. image_size: what tables of positions are made for, a side or
    (height, width), of which the longer counts; images of any size are taken. decoder: options of
    `PanopticDeepLab`.
    """
    if task_of(backbone) != "classification":
        raise InputError(f"backbone {backbone!r} does not classify images, expected a network that does")
    options = {"image_size": _side(image_size)} | dict(BACKBONES.get(family(backbone), {}))
    network = create(backbone, **options | dict(backbone_options or {}))
    return PanopticDeepLab(network, num_classes=num_classes, **decoder)


@register_panoptic
def panoptic_deeplab_resnet50(
    *, backbone_options: Mapping[str, Any] | None = None, aspp: bool = True, **options: Any
) -> PanopticDeepLab:
    """The baseline of Axial-DeepLab: ResNet-50 with a stem of three convolutions, ASPP: 30.1 M parameters."""
    stem = {"deep": True, "deep_widths": STEM}
    return panoptic_deeplab(
        backbone="resnet50", backbone_options=stem | dict(backbone_options or {}), aspp=aspp, **options
    )


def axial_deeplab(
    scale: float,
    *,
    depths: Sequence[int] = DEPTHS_50,
    num_classes: int = CLASSES,
    image_size: int | Sequence[int] = IMAGE,
    span: int | None = SPAN,
    rows: int | None = ROWS,
    striding: str = "each",
    strides: Sequence[int] = STRIDES,
    drop_path: float = 0.0,
    **decoder: Any,
) -> PanopticDeepLab:
    """Axial-DeepLab: an Axial-ResNet of output stride 16 without ASPP, for images of any size.

    scale: of the backbone's widths; the decoders' do not change. depths, span, rows, striding, strides and
    drop_path: of `axial_resnet`; span is None for attention along whole lines. The published multiply-adds
    are those of span 65, also where the paper's text has attention along whole lines: their table for spans
    ends in the same number. image_size: matters only with rows=None. decoder: options of `PanopticDeepLab`.
    """
    backbone = axial_resnet(
        depths,
        scale,
        image_size=_side(image_size),
        rows=rows,
        stem="three_convs",
        span=span,
        strides=strides,
        striding=striding,
        drop_path=drop_path,
    )
    return PanopticDeepLab(backbone, num_classes=num_classes, **decoder)


def _side(image_size: int | Sequence[int]) -> int:
    """The longer side of images given by one side or two."""
    sides = (image_size,) if isinstance(image_size, int) else tuple(image_size)
    if not 1 <= len(sides) <= 2 or any(side < 1 for side in sides):
        raise InputError(f"image_size is {image_size!r}, expected a side or (height, width) in pixels")
    return max(sides)


@register_panoptic
def axial_deeplab_s(*, scale: float = 0.5, **options: Any) -> PanopticDeepLab:
    """Axial-DeepLab-S; published: 12.1 M parameters."""
    return axial_deeplab(scale, **options)


@register_panoptic
def axial_deeplab_m(*, scale: float = 0.75, **options: Any) -> PanopticDeepLab:
    """Axial-DeepLab-M; published: 25.9 M parameters."""
    return axial_deeplab(scale, **options)


@register_panoptic
def axial_deeplab_l(*, scale: float = 1, **options: Any) -> PanopticDeepLab:
    """Axial-DeepLab-L; published: 44.9 M parameters."""
    return axial_deeplab(scale, **options)


@register_panoptic
def axial_deeplab_xl(*, scale: float = 2, **options: Any) -> PanopticDeepLab:
    """Axial-DeepLab-XL; published: 173.0 M parameters."""
    return axial_deeplab(scale, **options)
