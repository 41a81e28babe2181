"""The voxel grid in patient space, against nibabel, known rotations and identities."""

from __future__ import annotations

import itertools

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medattn.errors import InputError
from medattn.geometry import Array, Geometry

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@st.composite
def grids(draw: st.DrawFn) -> Geometry:
    """Any rotation, order and direction of the axes, with anisotropic voxels."""
    angles = [draw(st.floats(-180, 180)) for _ in range(3)]
    directions = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    directions = directions[:, draw(st.permutations(range(3)))] * [
        draw(st.sampled_from([-1, 1])) for _ in range(3)
    ]
    affine = np.eye(4)
    affine[:3, :3] = directions * [draw(st.floats(0.3, 6)) for _ in range(3)]
    affine[:3, 3] = [draw(st.floats(-900, 900)) for _ in range(3)]
    i, j, k = (draw(st.integers(1, 9)) for _ in range(3))
    return Geometry((i, j, k), affine)


def indices(size: tuple[int, int, int]) -> Array:
    return np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), axis=-1)


@given(grids())
def test_no_voxel_moves_in_the_patient_when_the_axes_are_reordered(geometry: Geometry) -> None:
    canonical, turn = geometry.canonical()
    positions_mm = geometry.to_lps(indices(geometry.size))
    turned_mm = np.stack([turn.apply(positions_mm[..., axis]) for axis in range(3)], axis=-1)
    np.testing.assert_allclose(turned_mm, canonical.to_lps(indices(canonical.size)), atol=1e-9)


@given(grids())
def test_reordering_and_back_restores_every_array_and_needs_no_second_turn(geometry: Geometry) -> None:
    canonical, turn = geometry.canonical()
    array = np.arange(np.prod(geometry.size)).reshape(geometry.size)
    np.testing.assert_array_equal(turn.undo(turn.apply(array)), array)
    assert turn.apply(array).shape == canonical.size
    again, nothing = canonical.canonical()
    assert (nothing.axes, nothing.flips) == ((0, 1, 2), (False, False, False))
    assert canonical.difference(again) is None


@given(grids())
def test_canonical_axes_run_left_posterior_superior(geometry: Geometry) -> None:
    canonical, _ = geometry.canonical()
    assert canonical.patient_axes() == (0, 1, 2)
    assert canonical.axis_codes() == "LPS"
    # an axis along exactly the middle between two patient axes may point against one of them by rounding
    assert np.diag(canonical.affine[:3, :3]).min() > -1e-9


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("signs", list(itertools.product((-1, 1), repeat=3)), ids=str)
def test_axis_codes_agree_with_nibabel_in_all_48_orientations(
    order: tuple[int, int, int], signs: tuple[int, int, int]
) -> None:
    tilt = Rotation.from_euler("xyz", [12, -17, 9], degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = tilt @ (np.eye(3)[:, order] * signs) * [0.9, 1.1, 2.5]
    geometry = Geometry((4, 5, 6), affine)
    codes = nibabel.aff2axcodes(RAS_FROM_LPS @ affine)
    assert geometry.axis_codes() == "".join(codes)


def test_axes_at_45_degrees_still_get_three_different_patient_axes() -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [45, 45, 45], degrees=True).as_matrix()
    assert sorted(Geometry((3, 3, 3), affine).patient_axes()) == [0, 1, 2]


def test_spacing_volume_and_coordinates_of_a_known_scan() -> None:
    affine = np.array([[0, 0, -3.0, 10], [0.5, 0, 0, 20], [0, 2.0, 0, 30], [0, 0, 0, 1]])
    geometry = Geometry((7, 8, 9), affine)
    assert geometry.spacing_mm() == (0.5, 2.0, 3.0)
    assert geometry.voxel_volume_ml() == pytest.approx(0.003)
    assert geometry.to_lps([1, 2, 3]).tolist() == [1.0, 20.5, 34.0]
    assert geometry.axis_codes() == "PSR"


@given(grids(), st.tuples(*[st.integers(1, 20)] * 3))
def test_resizing_keeps_the_outer_edges_of_the_field_of_view(
    geometry: Geometry, size: tuple[int, int, int]
) -> None:
    resized = geometry.resized(size)
    assert resized.size == size
    corners = np.array(list(itertools.product((0, 1), repeat=3)))
    np.testing.assert_allclose(
        resized.to_lps(corners * size - 0.5),
        geometry.to_lps(corners * np.array(geometry.size) - 0.5),
        atol=1e-8,
    )


def test_size_at_a_spacing_covers_the_field_of_view_and_never_vanishes() -> None:
    geometry = Geometry((512, 512, 3), np.diag([0.9, 0.9, 2.5, 1]))
    assert geometry.size_at((1.8, 3.6, 2.5)) == (256, 128, 3)
    assert geometry.size_at((1000, 1000, 1000)) == (1, 1, 1)


def with_frame(uid: str | None) -> Geometry:
    return Geometry((10, 10, 10), np.eye(4), uid)


def moved(row: int, column: int, by: float) -> Geometry:
    affine = np.eye(4)
    affine[row, column] += by
    return Geometry((10, 10, 10), affine)


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (Geometry((10, 11, 10), np.eye(4)), "size 10 x 10 x 10 vs 10 x 11 x 10"),
        (moved(0, 0, 0.01), "spacing 1 vs 1.01 mm on axis 0"),
        (moved(2, 2, -0.01), "spacing 1 vs 0.99 mm on axis 2"),
        (moved(0, 3, 0.01), "origin"),
        (moved(1, 3, 0.01), "origin"),
        (moved(2, 3, -0.01), "origin"),
        (Geometry((10, 10, 10), np.diag([1, -1, 1, 1])), "orientation LPS vs LAS"),
    ],
)
def test_a_change_of_one_field_is_found_and_named(other: Geometry, word: str) -> None:
    geometry = Geometry((10, 10, 10), np.eye(4))
    assert word in str(geometry.difference(other))
    assert word.split(" ")[0] in str(other.difference(geometry))


def test_a_rotation_counts_by_the_millimetres_it_moves_the_far_corner() -> None:
    def turned(degrees: float, size: int) -> Geometry:
        affine = np.eye(4)
        affine[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix()
        return Geometry((size, size, size), affine)

    # far corner at (99, 99): moved by 99 sqrt(2) 0.001 rad = 0.14 mm; with 2 voxels by 0.0014 mm
    degrees = np.degrees(0.001)
    assert "direction: the far corner lies 0.14 mm" in str(turned(0, 100).difference(turned(degrees, 100)))
    assert turned(0, 100).difference(turned(degrees, 100), tol_mm=0.15) is None
    assert turned(0, 2).difference(turned(degrees, 2), tol_mm=0.0015) is None


def test_frames_of_reference_differ_where_both_are_known() -> None:
    assert "frame of reference 1.2.3 vs 1.2.4" in str(with_frame("1.2.3").difference(with_frame("1.2.4")))
    assert with_frame("1.2.3").difference(with_frame("1.2.3")) is None
    assert with_frame("1.2.3").difference(with_frame(None)) is None


def test_reordering_and_resizing_keep_the_frame_of_reference() -> None:
    geometry = Geometry((2, 3, 4), np.diag([-1, 1, 1, 1]), "1.2.3")
    assert geometry.canonical()[0].frame_of_reference == "1.2.3"
    assert geometry.resized((4, 4, 4)).frame_of_reference == "1.2.3"


@given(grids())
def test_a_grid_equals_itself_after_a_float32_file_header(geometry: Geometry) -> None:
    stored = Geometry(geometry.size, geometry.affine.astype(np.float32))
    assert geometry.difference(stored) is None


@pytest.mark.parametrize(
    ("size", "affine", "word"),
    [
        ((0, 3, 3), np.eye(4), "at least one voxel"),
        ((3, 3), np.eye(4), "three axes"),
        ((3, 3, 3), np.eye(3), "4 x 4"),
        ((3, 3, 3), np.diag([1, 1, np.nan, 1]), "finite"),
        ((3, 3, 3), np.diag([1, np.inf, 1, 1]), "finite"),
        ((3, 3, 3), np.diag([1, 0, 1, 1]), "singular"),
        ((3, 3, 3), np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "singular"),
        # a gantry tilted by 15 degrees: the slices lie square to nothing
        ((3, 3, 3), np.array([[1, 0, 0, 0], [0, 1, 0.26, 0], [0, 0, 0.97, 0], [0, 0, 0, 1.0]]), "sheared"),
    ],
)
def test_impossible_grids_are_refused_with_a_reason(
    size: tuple[int, int, int], affine: Array, word: str
) -> None:
    with pytest.raises(InputError, match=word):
        Geometry(size, affine)


def test_rounding_of_a_header_is_no_shear() -> None:
    affine = np.eye(4)
    affine[0, 1] = 5e-4
    assert Geometry((3, 3, 3), affine).axis_codes() == "LPS"


def test_a_geometry_cannot_be_changed_from_outside() -> None:
    affine = np.eye(4)
    geometry = Geometry((3, 3, 3), affine)
    affine[0, 3] = 99
    assert geometry.affine[0, 3] == 0
    with pytest.raises(ValueError, match="read-only"):
        geometry.affine[0, 3] = 1
