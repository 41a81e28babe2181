"""EANet (Guo, Liu, Mu, Hu, arXiv 2105.02358): external attention on a dilated ResNet, for images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from medattn.errors import InputError
from medattn.layers.companions.external import ExternalAttention
from medattn.networks.published import resnet_name
from medattn.networks.registry import register
from medattn.networks.resnet import EXPANSION, WIDTHS, Place, ResNet, conv_norm, deep_stem, relu

STRIDES = (1, 2, 1, 1)  # maps of 1/8 of the image's side from stage 2 on
GRIDS = (1, 2, 4)  # of the dilation in the last stage
STEM = (64, 64, 128)
DEPTHS_50, DEPTHS_101 = (3, 4, 6, 3), (3, 4, 23, 3)
EXTRACTOR = {"0": "stem", "1": "stem.7", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def dilated_mix(place: Place) -> nn.Module:
    """3x3 convolution, norm, ReLU; dilated where stages 3 and 4 lost their stride.

    The first block of a stage has the dilation of the stage before: 1, 2, 2, ... and 2, 8, 16.
    """
    dilation = 1
    if place.stage == 2 and place.block > 0:
        dilation = 2
    elif place.stage == 3:
        dilation = 4 * GRIDS[place.block % len(GRIDS)] if place.block > 0 else 2
    conv, norm = conv_norm(place.width, place.width, 3, place.stride)
    assert isinstance(conv, nn.Conv2d)
    conv.dilation = conv.padding = (dilation, dilation)
    return nn.Sequential(conv, norm, relu())


class EANet(nn.Module):
    """Dilated ResNet, external attention, upsampling: [B, in_channels, h, w] -> [B, out_channels, h, w].

    After stage 4: 3x3 to `channels`, external attention (591,360 parameters at 512), 3x3 to half of them,
    dropout of whole channels, 1x1 to the classes, bilinear with corners aligned. The stem is three 3x3
    convolutions. depths, widths: of the ResNet's stages. Batch norms keep torch's momentum; the authors'
    training sets its own.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 21,
        depths: Sequence[int] = DEPTHS_50,
        widths: Sequence[int] = WIDTHS,
        channels: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if spatial_dims != 2:
            raise InputError(f"eanet is a network for images: spatial_dims is {spatial_dims}, expected 2")
        stem = deep_stem(STEM, in_channels)
        self.extractor = ResNet(
            stem, STEM[-1], depths=depths, widths=widths, strides=STRIDES, mix=dilated_mix, num_classes=1
        )
        self.extractor.head = nn.Identity()  # type: ignore[assignment]  # only its features are used
        self.fc0 = nn.Sequential(*conv_norm(EXPANSION * widths[-1], channels, 3), relu())
        self.linu = ExternalAttention(channels, 2)
        self.fc1 = nn.Sequential(*conv_norm(channels, channels // 2, 3), relu(), nn.Dropout2d(dropout))
        self.fc2 = nn.Conv2d(channels // 2, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, h, w] -> logits [B, out_channels, h, w]."""
        logits = self.fc2(self.fc1(self.linu(self.fc0(self.extractor.features(x)[-1]))))
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=True)


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Names in the authors' state dicts (MenghaoGuo/EANet, PyTorch) -> ours.

    Theirs number the extractor's parts and have `conv` and `bn` in a convolution with norm.
    """
    ours = {}
    for name in names:
        head, _, rest = name.partition(".")
        if head == "extractor":
            number, _, part = rest.partition(".")
            ours[name] = f"extractor.{resnet_name(f'{EXTRACTOR.get(number, number)}.{part}')}"
        elif head in ("fc0", "fc1"):
            part = rest.removeprefix("0.") if head == "fc1" else rest
            ours[name] = f"{head}.{part.replace('conv.', '0.').replace('bn.', '1.')}"
        else:
            ours[name] = name
    return ours


def from_published(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of this source as `network.load_state_dict` takes them; their forms are ours."""
    return {ours: weights[theirs] for theirs, ours in our_names(weights).items()}


@register
def eanet_resnet50(**options: Any) -> EANet:
    """EANet on a ResNet-50 with stride 8, 2D."""
    return EANet(**options)


@register
def eanet_resnet101(**options: Any) -> EANet:
    """EANet on a ResNet-101 with stride 8, 2D: the published one."""
    return EANet(**{"depths": DEPTHS_101} | options)
