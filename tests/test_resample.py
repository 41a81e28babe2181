"""Resampling against torch's own interpolation, and what must hold for any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from medattn.resample import linear_weights, resample, resample_labels

SIZES = st.tuples(*[st.integers(1, 13)] * 3)


@given(SIZES, st.tuples(*[st.integers(1, 3)] * 3))
def test_enlarging_equals_torch_trilinear(size: tuple[int, ...], factor: tuple[int, ...]) -> None:
    volume = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    target = [n * f for n, f in zip(size, factor, strict=True)]
    expected = F.interpolate(volume[None], size=target, mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(resample(volume, target), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("before", "after"), [((31, 17), (10, 17)), ((12, 9), (5, 4)), ((20, 7), (30, 3))])
def test_shrinking_equals_torch_antialiased_bilinear(before: tuple[int, int], after: tuple[int, int]) -> None:
    image = torch.randn(1, 1, *before, generator=torch.Generator().manual_seed(2))
    expected = F.interpolate(image, size=after, mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(
        resample(image[0, ..., None], [*after, 1])[..., 0], expected[0], atol=1e-5, rtol=1e-5
    )


@given(st.integers(1, 40), st.integers(1, 40))
def test_weights_keep_constants_and_are_never_negative(n_in: int, n_out: int) -> None:
    weights = linear_weights(n_in, n_out)
    assert weights.shape == (n_out, n_in)
    assert float(weights.min()) >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(n_out))


@given(st.integers(2, 20))
def test_a_linear_ramp_stays_linear_inside(n: int) -> None:
    """Voxel centres of the fine grid lie where the ramp says, away from the continued border."""
    ramp = torch.arange(n, dtype=torch.float32).reshape(1, n, 1, 1)
    fine = resample(ramp, [3 * n, 1, 1]).flatten()
    centres = (torch.arange(3 * n) + 0.5) / 3 - 0.5
    inside = (centres >= 0) & (centres <= n - 1)
    torch.testing.assert_close(fine[inside], centres[inside], atol=1e-5, rtol=1e-5)


def test_labels_take_the_value_that_covers_most_of_a_voxel() -> None:
    labels = torch.zeros(4, 4, 4, dtype=torch.uint8)
    labels[:2] = 7
    labels[2:, :, 3] = 2
    small = resample_labels(labels, (2, 2, 2), (2, 7))
    assert small[0].unique().tolist() == [7]
    assert small[1, :, 0].unique().tolist() == [0]


def test_labels_on_the_same_grid_are_untouched() -> None:
    labels = torch.randint(0, 9, (5, 6, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(resample_labels(labels, (5, 6, 7), range(1, 9)).long(), labels)


def test_a_thin_cord_survives_a_coarser_grid() -> None:
    """3 x 3 voxels at a third of the resolution would vanish or double with nearest-neighbour picking."""
    labels = torch.zeros(30, 30, 30, dtype=torch.uint8)
    labels[12:15, 15:18] = 1
    small = resample_labels(labels, (10, 10, 30), (1,))
    assert int(small.sum()) == 30
