"""ResNets with locally enhanced self-attention (LESA: Yang, Qiao, Kortylewski, Yuille, arXiv 2107.05637)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from medattn.errors import InputError
from medattn.layers.companions.lesa import LESA
from medattn.networks.published import resnet_name
from medattn.networks.registry import register_classifier
from medattn.networks.resnet import STEM, WIDTHS, Place, ResNet, convolution_mix, plain_stem, relu

DEPTHS = (3, 4, 6, 3)
STRIDES = (1, 2, 2, 1)  # stages 3 and 4 both work at 1/16 of the image's side
OUTPUTS = (256, 512, 1024, 2048)
FORMS = ("flat", "axes")


class LesaResNet(ResNet):
    """ResNet-50 with LESA in stages 3 and 4, but for the block where stage 3 begins.

    [B, in_channels, h, w] -> [B, num_classes].

    wide: factor of the width inside the bottlenecks, 2 in the wide form (WRN-50). depths, strides: per stage.

    form: position of keys, of `LESA`. The published "flat" has one table over flattened offsets, whose
    meaning depends on the width of the map; so the network takes images whose maps in stages 3 and 4 have the
    side that image_size gives, and none above 4096 positions (1024 pixels). "axes" has a table per axis and
    takes any image; offsets beyond the tables share their end rows.

    As the authors start it, no batch norm starts at zero and all 2D convolutions are drawn for ReLU.
    Raises InputError for an unknown form and, from the flat form, for an image of another size.
    """

    def __init__(
        self,
        *,
        wide: int = 1,
        depths: Sequence[int] = DEPTHS,
        strides: Sequence[int] = STRIDES,
        num_classes: int = 1000,
        image_size: int = 224,
        in_channels: int = 3,
        drop_path: float = 0.0,
        form: str = "flat",
    ) -> None:
        if form not in FORMS:
            raise InputError(f"form is {form!r}, expected {', '.join(map(repr, FORMS))}")

        def mix(place: Place) -> nn.Module:
            return convolution_mix(place) if place.stage < 2 else lesa_mix(place, form)

        super().__init__(
            plain_stem(in_channels),
            STEM,
            depths=depths,
            widths=[wide * width for width in WIDTHS],
            outputs=OUTPUTS,
            strides=strides,
            mix=mix,
            num_classes=num_classes,
            image_size=image_size,
            drop_path=drop_path,
        )
        self.form, self.image_size = form, image_size
        self.reach = 4 * strides[1] * strides[2]  # pixels per position of stage 3
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.ones_(layer.weight)

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps after each stage, finest first."""
        made_for = -(-self.image_size // self.reach)
        side = tuple(-(-n // self.reach) for n in x.shape[2:])
        if self.form == "flat" and side != (made_for, made_for):
            raise InputError(
                f"{x.shape[2]} x {x.shape[3]} pixels give attention a map of {side[0]} x {side[1]}, "
                f"and flat tables are made for {made_for} x {made_for}; resize it to {self.image_size} "
                "pixels, or build the network with its image_size or with form='axes'"
            )
        return super().features(x)


def lesa_mix(place: Place, form: str) -> nn.Module:
    """LESA with 8 heads, an average over stride x stride, ReLU; where stage 3 begins, a convolution."""
    if (place.stage, place.block) == (2, 0):
        return convolution_mix(place)
    layers: list[nn.Module] = [LESA(place.width, 2, heads=8, length=place.side, form=form)]
    if place.stride > 1:
        layers.append(nn.AvgPool2d(place.stride, ceil_mode=True, count_include_pad=False))
    return nn.Sequential(*layers, relu())


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Names in the authors' state dicts (Chenglin-Yang/LESA_classification) -> ours, but for `flatten_index`.

    Theirs are torchvision's; a LESA is the conv2 of its block, with its attention's parts at its top level.
    """
    ours = {name: resnet_name(name) for name in names if not name.endswith(".flatten_index")}
    for name, own in ours.items():
        before, mix, part = own.partition(".mix.0.")
        if part.split(".")[0] in LESA.CONTEXT:
            ours[name] = f"{before}{mix}context.{part}"
    return ours


def from_published(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of this source as `network.load_state_dict` takes them; their forms are ours."""
    return {ours: weights[theirs] for theirs, ours in our_names(weights).items()}


@register_classifier
def lesa_resnet50(**options: Any) -> LesaResNet:
    """ResNet-50 with 8 LESA layers: 23,777,512 parameters at 224 pixels."""
    return LesaResNet(**options)


@register_classifier
def lesa_wrn50(**options: Any) -> LesaResNet:
    """Wide ResNet-50 with 8 LESA layers: 61,145,896 parameters at 224 pixels."""
    return LesaResNet(wide=2, **options)
