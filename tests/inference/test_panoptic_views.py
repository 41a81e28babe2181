"""Several views, one answer: that of an equivariant network does not change, another's is the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medattn.errors import InputError
from medattn.inference.panoptic_resize import Placement, resized, restored
from medattn.inference.panoptic_views import over_views, unmirrored
from medattn.panoptic import PanopticOutput

SIZE = (33, 49)
IMAGE = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def equivariant(image: Tensor) -> PanopticOutput:
    """Stride 4; offsets point at the middle of the image, so they mirror and scale with it."""
    height, width = image.shape[2:]
    size = ((height - 1) // 4 + 1, (width - 1) // 4 + 1)
    y = torch.linspace((height - 1) / 2, -(height - 1) / 2, size[0])[:, None].expand(size)
    x = torch.linspace((width - 1) / 2, -(width - 1) / 2, size[1]).expand(size)
    flat = torch.stack([y.abs() / height, x.abs() / width, (x * x) / width**2]).expand(len(image), -1, -1, -1)
    return PanopticOutput(flat * 3, flat[:, :1], torch.stack([y, x]).expand(len(image), -1, -1, -1))


def other(image: Tensor) -> PanopticOutput:
    """Depends on where left is."""
    kernel = torch.linspace(-1, 1, 6 * 3 * 9).view(6, 3, 3, 3)
    maps = F.conv2d(F.pad(image, (2, 0, 1, 1)), kernel, stride=4)
    return PanopticOutput(maps[:, :3], maps[:, 3:4], maps[:, 4:])


def test_one_view_is_the_plain_result() -> None:
    for part, plain in zip(over_views(other, IMAGE), resized(other(IMAGE), SIZE), strict=True):
        assert torch.equal(part, plain)


def test_views_of_an_equivariant_network_agree() -> None:
    plain = resized(equivariant(IMAGE), SIZE)
    many = over_views(equivariant, IMAGE, scales=(1.0,), flip=True)
    torch.testing.assert_close(many.semantic, plain.semantic.log_softmax(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(many.centre, plain.centre)
    torch.testing.assert_close(many.offset, plain.offset, rtol=1e-5, atol=1e-4)
    scaled = over_views(equivariant, IMAGE, scales=(0.5, 1.0, 2.0), flip=True)
    torch.testing.assert_close(scaled.offset, plain.offset, rtol=1e-5, atol=1e-4)


def test_mirroring_twice_is_nothing_and_negates_only_what_points_right() -> None:
    output = other(IMAGE)
    for part, same in zip(unmirrored(unmirrored(output)), output, strict=True):
        assert torch.equal(part, same)
    mirrored = unmirrored(output)
    assert torch.equal(mirrored.offset[:, 0], output.offset[:, 0].flip(2))
    assert torch.equal(mirrored.offset[:, 1], -output.offset[:, 1].flip(2))


def test_views_of_another_network_are_averaged() -> None:
    mean = over_views(other, IMAGE, scales=(1.0, 1.5), flip=True)
    large = F.interpolate(IMAGE, size=(49, 73), mode="bilinear", align_corners=True)
    views = []
    for image in (IMAGE, large):
        shrink = torch.tensor([32 / (image.shape[2] - 1), 48 / (image.shape[3] - 1)])[:, None, None]
        for view in (other(image), unmirrored(other(image.flip(3)))):
            views.append(resized(view._replace(offset=view.offset * shrink), SIZE))
    probabilities = torch.stack([view.semantic.softmax(1) for view in views]).mean(0)
    torch.testing.assert_close(mean.semantic.softmax(1), probabilities)
    torch.testing.assert_close(mean.centre, torch.stack([view.centre for view in views]).mean(0))
    torch.testing.assert_close(mean.offset, torch.stack([view.offset for view in views]).mean(0))
    assert not torch.allclose(mean.offset, resized(other(IMAGE), SIZE).offset, atol=0.1)


def test_mirroring_the_image_mirrors_the_mean() -> None:
    mean, mirrored = (over_views(other, image, flip=True) for image in (IMAGE, IMAGE.flip(3)))
    for part, expected in zip(unmirrored(mirrored), mean, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)


def test_the_mean_goes_to_the_original_image_without_padding() -> None:
    placement = Placement(SIZE, (25, 49), (50, 98))
    mean = over_views(equivariant, IMAGE, flip=True, placement=placement)
    plain = restored(equivariant(IMAGE), placement)
    torch.testing.assert_close(mean.offset, plain.offset, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mean.semantic.softmax(1), plain.semantic.softmax(1), rtol=1e-5, atol=1e-5)
    assert mean.centre.shape == (2, 1, 50, 98)


def test_a_class_that_no_view_sees_has_a_finite_logit() -> None:
    def sure(image: Tensor) -> PanopticOutput:
        output = other(image)
        return output._replace(
            semantic=torch.tensor([1e4, -1e4, 0]).view(1, 3, 1, 1).expand_as(output.semantic)
        )

    assert over_views(sure, IMAGE, flip=True).semantic.isfinite().all()


def test_no_scales_and_a_foreign_placement_are_refused() -> None:
    for scales in ((), (0.0,), (1.0, -1.0)):
        with pytest.raises(InputError, match="scales"):
            over_views(other, IMAGE, scales=scales)
    with pytest.raises(InputError, match="placement"):
        over_views(other, IMAGE, placement=Placement((9, 9), (9, 9), (9, 9)))
