"""Multiply-adds of panoptic networks against the Axial-DeepLab paper (axial_deeplab.md 5.2, 5.5).

The paper names images of 1025 x 1025 and 1025 x 2049. Its two ResNets need what it says to the last digit but
one at 1024 x 2048, without anything between the last map and the first fusion, or with separable ASPP.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import medattn_kernels.flops  # noqa: F401  teaches the counter our operators
from medattn.layers.axial import AxialAttention2d
from medattn.networks import create

COCO, CITYSCAPES = (1025, 1025), (1025, 2049)
SPAN = 65


def _meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return create(name, **options).eval()


@torch.no_grad()
def _billions(network: nn.Module, size: tuple[int, int]) -> float:
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, *size, device="meta"))
    return float(counter.get_total_flops() / 2e9)


@pytest.mark.parametrize(
    ("name", "size", "published"),
    [
        ("axial_deeplab_s", COCO, 110.4),
        pytest.param("axial_deeplab_m", COCO, 209.9, marks=pytest.mark.slow),
        pytest.param("axial_deeplab_l", COCO, 343.9, marks=pytest.mark.slow),
        pytest.param("axial_deeplab_s", CITYSCAPES, 220.8, marks=pytest.mark.slow),
        pytest.param("axial_deeplab_m", CITYSCAPES, 419.6, marks=pytest.mark.slow),
        pytest.param("axial_deeplab_l", CITYSCAPES, 687.4, marks=pytest.mark.slow),
        ("axial_deeplab_xl", CITYSCAPES, 2446.8),
    ],
)
def test_axial_deeplab_needs_what_is_published(name: str, size: tuple[int, int], published: float) -> None:
    assert _billions(_meta(name), size) == pytest.approx(published, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("span", "published"), [(5, 617.4), (9, 622.1), (17, 631.5), (33, 650.2), (65, 687.4)]
)
def test_every_span_of_the_large_one_needs_what_is_published(span: int, published: float) -> None:
    found = _billions(_meta("axial_deeplab_l", num_classes=19, span=span), CITYSCAPES)
    assert found == pytest.approx(published, rel=0.015)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("axial_deeplab_s", 220.8),
        pytest.param("axial_deeplab_m", 419.6, marks=pytest.mark.slow),
        pytest.param("axial_deeplab_l", 687.4, marks=pytest.mark.slow),
        pytest.param("axial_deeplab_xl", 2446.8, marks=pytest.mark.slow),
    ],
)
def test_with_keys_outside_the_image_nineteen_classes_need_what_is_published(
    name: str, published: float
) -> None:
    """A span of 65 reaches beyond the border, where keys would be zeros; our counter leaves them out.

    Each pair is 3.5 products per channel: three of half a head's channels for logits, two of all for values.
    """
    network = _meta(name, num_classes=19)
    outside = 0.0

    def count(layer: AxialAttention2d, inputs: Any, out: torch.Tensor) -> None:
        nonlocal outside
        channels, length = out.shape[1], out.shape[2 + layer.axis]
        reach = SPAN // 2
        inside = sum(min(n + reach, length - 1) - max(n - reach, 0) + 1 for n in range(length))
        lines = out[0, 0].numel() // length
        outside += 3.5 * channels * lines * (SPAN * length - inside) / 1e9

    for layer in network.modules():
        if isinstance(layer, AxialAttention2d):
            layer.register_forward_hook(count)
    found = _billions(network, CITYSCAPES)
    assert outside > 0
    assert found + outside == pytest.approx(published, rel=0.015)


@pytest.mark.parametrize(
    ("options", "published"), [({}, 390.0), ({"aspp": False}, 374.8)], ids=["aspp", "no_aspp"]
)
def test_resnet50_needs_what_is_published(options: dict[str, Any], published: float) -> None:
    network = _meta("panoptic_deeplab_resnet50", num_classes=19, **options)
    assert _billions(network, (1024, 2048)) == pytest.approx(published, rel=0.001)
    assert _billions(network, CITYSCAPES) == pytest.approx(published, rel=0.016)


def test_without_aspp_resnet50_has_the_parameters_of_the_ablation() -> None:
    network = _meta("panoptic_deeplab_resnet50", aspp=False, num_classes=19)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == 24_812_166
    assert round(count / 1e6, 1) == 24.8


@pytest.mark.slow
def test_resnet101_needs_what_is_published() -> None:
    """43.8 M parameters, 530.0 B."""
    deeper = {"backbone_options": {"depths": (3, 4, 23, 3)}, "aspp": False, "num_classes": 19}
    network = _meta("panoptic_deeplab_resnet50", **deeper)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(43.8e6, abs=0.05e6)
    assert _billions(network, (1024, 2048)) == pytest.approx(530.0, rel=0.001)
