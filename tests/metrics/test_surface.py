"""Surface metrics against DeepMind's package and closed forms."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medattn.io import read_volume
from medattn.metrics import (
    average_surface_distance,
    dice,
    hausdorff95,
    surface_dice,
    surface_distances,
    volume_ml,
)
from medattn.metrics.surfels import neighbour_codes, surfel_areas_mm2

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    deepmind = pytest.importorskip("surface_distance")
    from surface_distance import lookup_tables

SPACINGS = st.tuples(*[st.sampled_from([0.5, 0.98, 1.0, 2.5, 3.7])] * 3)
STEPS = st.tuples(*[st.integers(-3, 3)] * 3)


def theirs(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Any) -> dict[str, np.ndarray]:
    """DeepMind's distances; its deprecated scipy names are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return deepmind.compute_surface_distances(reference, prediction, spacing_mm)


def assert_equal_to_deepmind(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Any) -> None:
    mine, other = (
        surface_distances(prediction, reference, spacing_mm),
        theirs(prediction, reference, spacing_mm),
    )
    for tolerance_mm in (0.0, 1.0, 2.43):
        expected = deepmind.compute_surface_dice_at_tolerance(other, tolerance_mm)
        assert mine.surface_dice(tolerance_mm) == pytest.approx(expected, abs=1e-12)
    for percent in (50, 95, 100):
        # where a share of the area ends exactly at the percentile, the last digit of a sum decides
        low, high = (deepmind.compute_robust_hausdorff(other, percent + e) for e in (-1e-9, 1e-9))
        assert low - 1e-12 <= mine.hausdorff_mm(percent) <= high + 1e-12
    for distances, areas, direction in (
        (mine.reference_mm, mine.reference_mm2, 0),
        (mine.prediction_mm, mine.prediction_mm2, 1),
    ):
        expected = deepmind.compute_average_surface_distance(other)[direction]
        assert (distances * areas).sum() / areas.sum() == pytest.approx(expected, abs=1e-12)


def box(shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))] = True
    return mask


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (0.98, 0.98, 2.5), (3.1, 1.37, 2.11)], ids=str)
def test_derived_area_table_is_deepminds_for_all_256_cells(spacing_mm: tuple[float, ...]) -> None:
    kernel = lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL
    expected = lookup_tables.create_table_neighbour_code_to_surface_area(spacing_mm)
    areas = surfel_areas_mm2(spacing_mm)
    for code in range(256):
        cell = np.array([code >> bit & 1 for bit in range(8)], bool).reshape(2, 2, 2)
        assert neighbour_codes(cell)[1, 1, 1] == code
        assert areas[code] == pytest.approx(expected[(cell * kernel).sum()], abs=1e-12)


@pytest.mark.parametrize("density", [0.02, 0.3, 0.7])
@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (0.7, 1.9, 2.5)], ids=str)
def test_noise_agrees_with_deepmind(density: float, spacing_mm: tuple[float, ...]) -> None:
    rng = np.random.default_rng(7)
    assert_equal_to_deepmind(
        rng.random((13, 11, 17)) < density, rng.random((13, 11, 17)) < density, spacing_mm
    )


@given(spacing_mm=SPACINGS, shift=STEPS, size=st.tuples(*[st.integers(1, 5)] * 3))
@settings(max_examples=40, deadline=None)
def test_boxes_anywhere_agree_with_deepmind_in_both_orders(
    spacing_mm: tuple[float, ...], shift: tuple[int, ...], size: tuple[int, ...]
) -> None:
    one = box((12, 12, 12), (4, 3, 5), (3, 4, 2))
    two = box((12, 12, 12), tuple(4 + s for s in shift), size)
    assert_equal_to_deepmind(one, two, spacing_mm)
    assert average_surface_distance(one, two, spacing_mm) == pytest.approx(
        average_surface_distance(two, one, spacing_mm)
    )
    assert hausdorff95(one, two, spacing_mm) == hausdorff95(two, one, spacing_mm)


def test_masks_at_the_border_of_the_array_have_closed_surfaces() -> None:
    full = np.ones((6, 5, 4), bool)
    padded = np.pad(full, 2)
    assert surface_distances(full, full, (1, 1, 1)).prediction_mm2.sum() == pytest.approx(
        surface_distances(padded, padded, (1, 1, 1)).prediction_mm2.sum()
    )
    assert_equal_to_deepmind(full, box((6, 5, 4), (0, 0, 0), (6, 5, 2)), (1.0, 2.0, 3.0))


def test_a_plate_moved_by_three_voxels_is_three_spacings_away() -> None:
    """Wide plates: nearly all area lies on the two faces, whose distance is the shift."""
    one, two = box((80, 80, 12), (2, 2, 2), (76, 76, 4)), box((80, 80, 12), (2, 2, 5), (76, 76, 4))
    assert hausdorff95(one, two, (1, 1, 0.98)) == pytest.approx(3 * 0.98, abs=1e-12)
    assert surface_dice(one, two, spacing_mm=(1, 1, 2.5), tolerance_mm=7.5) == pytest.approx(1.0)


def test_surface_of_a_box_is_that_of_the_box_with_its_edges_cut() -> None:
    """n^3 voxels: 6 (n - 1)^2 flat mm2, 12 (n - 1) edges of sqrt(2)/2 and 8 corners of sqrt(3)/8."""
    for n in (2, 5, 9):
        cube = box((n + 2,) * 3, (1, 1, 1), (n, n, n))
        area = surface_distances(cube, cube, (1, 1, 1)).prediction_mm2.sum()
        expected = 6 * (n - 1) ** 2 + 12 * (n - 1) * np.sqrt(0.5) + 8 * np.sqrt(3) / 8
        assert area == pytest.approx(expected, abs=1e-9)


def test_concentric_spheres_lie_the_difference_of_their_radii_apart() -> None:
    """To about a voxel: the nearest corner of a stepped surface is a little nearer than the smooth one."""
    grid = np.indices((67, 67, 67)) - 33
    radius = np.sqrt((grid**2).sum(axis=0))
    for mm in (1.0, 0.25):
        small, large = radius <= 18, radius <= 30
        assert average_surface_distance(small, large, (mm, mm, mm)) == pytest.approx(12 * mm, abs=mm)
        assert hausdorff95(small, large, (mm, mm, mm)) == pytest.approx(12 * mm, abs=mm)
        assert surface_dice(small, large, (mm, mm, mm), 10 * mm) == 0.0
        assert surface_dice(small, large, (mm, mm, mm), 14 * mm) == 1.0


@given(factor=st.floats(0.1, 10), shift=STEPS)
@settings(max_examples=25, deadline=None)
def test_scaled_voxels_scale_distances_and_moving_both_masks_changes_nothing(
    factor: float, shift: tuple[int, ...]
) -> None:
    one, two = box((14, 14, 14), (4, 4, 4), (5, 4, 3)), box((14, 14, 14), (5, 3, 5), (4, 4, 5))
    spacing = np.array([1.0, 1.5, 2.5])
    before = surface_distances(one, two, spacing)
    after = surface_distances(one, two, spacing * factor)
    assert after.hausdorff_mm() == pytest.approx(factor * before.hausdorff_mm())
    assert after.average_mm() == pytest.approx(factor * before.average_mm())
    moved = surface_distances(np.roll(one, shift, (0, 1, 2)), np.roll(two, shift, (0, 1, 2)), spacing)
    assert moved.average_mm() == pytest.approx(before.average_mm(), abs=1e-12)
    assert moved.hausdorff_mm() == before.hausdorff_mm()


def test_empty_masks_follow_the_one_rule() -> None:
    empty, full = np.zeros((4, 4, 4), bool), box((4, 4, 4), (1, 1, 1), (2, 2, 2))
    mm = (1.0, 1.0, 2.0)
    assert (dice(empty, empty), surface_dice(empty, empty, mm, 1)) == (1.0, 1.0)
    assert (hausdorff95(empty, empty, mm), average_surface_distance(empty, empty, mm)) == (0.0, 0.0)
    for pair in ((empty, full), (full, empty)):
        assert (dice(*pair), surface_dice(*pair, mm, 1e9)) == (0.0, 0.0)
        assert (hausdorff95(*pair, mm), average_surface_distance(*pair, mm)) == (np.inf, np.inf)


def test_dice_and_volume_by_hand() -> None:
    one, two = box((4, 4, 4), (0, 0, 0), (2, 2, 2)), box((4, 4, 4), (0, 0, 1), (2, 2, 3))
    assert dice(one, two) == 2 * 4 / (8 + 12)
    assert dice(one, ~one) == 0.0
    assert volume_ml(two, (2, 2, 2.5)) == pytest.approx(0.12)


def test_mistakes_in_the_call_raise() -> None:
    mask = np.ones((3, 3, 3), bool)
    with pytest.raises(ValueError, match=r"\(3, 3, 3\) vs \(3, 3, 2\)"):
        dice(mask, mask[:, :, :2])
    with pytest.raises(TypeError, match="boolean"):
        dice(mask.astype(np.uint8), mask)
    with pytest.raises(ValueError, match="3D"):
        hausdorff95(mask[0], mask[0], (1, 1))
    for tolerance_mm in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="tolerance"):
            surface_dice(mask, mask, (1, 1, 1), tolerance_mm)


@pytest.mark.shared
def test_two_readers_agree_as_published_and_as_deepminds_package_says(shared_data: Path) -> None:
    """Brain, parotids and mandible of a real anisotropic scan; the human agreement is known to be high."""
    root = shared_data / "hn_oar_two_readers"
    value = {name: int(number) for number, name in json.loads((root / "labels.json").read_text()).items()}
    oncologist, radiographer = (
        read_volume(root / "0522c0017" / f"{who}.nii.gz") for who in ("oncologist", "radiographer")
    )
    spacing_mm = oncologist.geometry.spacing_mm()
    for organ, least in (("Mandible", 0.90), ("Parotid-Lt", 0.75), ("Spinal-Cord", 0.75), ("Orbit-Rt", 0.85)):
        one, two = radiographer.array == value[organ], oncologist.array == value[organ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert dice(one, two) == deepmind.compute_dice_coefficient(two, one)
        assert least < dice(one, two) < 1
        assert_equal_to_deepmind(one, two, spacing_mm)
