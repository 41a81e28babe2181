"""Tiled prediction: tiling must not show, memory must not grow, nothing may be skipped."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medattn.inference.sliding import label_map, slide
from medattn.inference.tta import with_flip
from medattn.resample import resample

EDGE = st.integers(3, 19)


def pointwise(tiles: Tensor) -> Tensor:
    """Logits that depend on each voxel alone, so that tiling can change nothing."""
    return torch.cat([tiles, 2 - tiles, tiles**2], 1)


@settings(deadline=None)
@given(
    st.tuples(EDGE, EDGE, EDGE), st.tuples(*[st.integers(2, 8)] * 3), st.sampled_from([0.0, 0.25, 0.5, 0.7])
)
def test_tiles_of_a_pointwise_network_add_up_to_the_whole(
    size: tuple[int, int, int], tile: tuple[int, int, int], overlap: float
) -> None:
    image = torch.rand(size, generator=torch.Generator().manual_seed(0))
    slabs = list(slide(image, pointwise, tile, classes=3, air=-1.0, overlap=overlap, batch_size=3))
    expected = pointwise(image[None, None])[0].softmax(0)
    torch.testing.assert_close(torch.cat(slabs, -1), expected, atol=1e-5, rtol=1e-5)


def test_tiles_of_air_are_background_and_never_computed() -> None:
    image = torch.full((24, 8, 8), -1.0)
    image[:8] = 0.5
    seen = []

    def predict(tiles: Tensor) -> Tensor:
        seen.append(tiles.max().item())
        return pointwise(tiles)

    probabilities = torch.cat(list(slide(image, predict, (8, 8, 8), classes=3, air=-1.0, overlap=0.0)), -1)
    assert seen == [0.5]
    assert probabilities[0, 8:].unique().tolist() == [1.0]
    assert probabilities[1:, 8:].unique().tolist() == [0.0]


@settings(deadline=None)
@given(
    st.tuples(EDGE, EDGE, EDGE),
    st.tuples(*[st.integers(2, 30)] * 3),
    st.lists(st.integers(1, 5), min_size=1, max_size=12),
)
def test_slab_by_slab_equals_resampling_everything_at_once(
    size: tuple[int, int, int], target: tuple[int, int, int], cuts: list[int]
) -> None:
    probabilities = torch.rand(4, *size, generator=torch.Generator().manual_seed(1)).softmax(0)

    def slabs() -> Iterator[Tensor]:
        start = 0
        for width in [*cuts, size[2]]:
            if start < size[2]:
                yield probabilities[..., start : start + width]
            start += width

    at_once = resample(probabilities, target)
    labels = label_map(slabs(), size[2], target)
    # ties between classes may fall either way; the chosen class must be as probable as the best one
    chosen = at_once.gather(0, labels[None].long())[0]
    torch.testing.assert_close(chosen, at_once.amax(0), atol=1e-6, rtol=1e-5)


def test_flip_averages_the_mirrored_view_with_paired_organs_swapped() -> None:
    def sided(x: Tensor) -> Tensor:
        """Class 1 grows along the left-right axis, class 2 against it: a perfect mirror pair."""
        ramp = torch.linspace(0, 1, x.shape[2]).reshape(1, 1, -1, 1, 1).expand_as(x)
        return torch.cat([x * 0, x + ramp, x + 1 - ramp], 1)

    x = torch.rand(1, 1, 6, 3, 3)
    torch.testing.assert_close(with_flip(sided, (1, 0))(x), sided(x))

    def always_left(x: Tensor) -> Tensor:
        return torch.cat([x * 0, x * 0 + 1, x * 0], 1)

    averaged = with_flip(always_left, (1, 0))(x)
    assert averaged[:, 1:].unique().tolist() == [0.5]
