"""Volume files, read back by other libraries: nibabel, SimpleITK, pynrrd."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medattn.geometry import Array, Geometry
from medattn.io import Volume, read_geometry, read_volume, write_volume
from medattn.io.volume import volume_stem

SUFFIXES = (".nii", ".nii.gz", ".nrrd")
DTYPES = (
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float32",
    "float64",
)
LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def oblique() -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [100, -20, 35], degrees=True).as_matrix() * [0.9, 1.3, -2.5]
    affine[:3, 3] = [-249.5, 130.25, -871.0]
    return Geometry((4, 5, 6), affine)


def voxels(dtype: str = "int16") -> Array:
    """Different everywhere, with the extremes of the type."""
    array = np.arange(120).reshape(4, 5, 6)
    if dtype == "bool":
        return array % 3 == 0
    array = array.astype(dtype)
    limits = np.finfo(dtype) if np.dtype(dtype).kind == "f" else np.iinfo(dtype)
    array[0, 0, 0], array[3, 4, 5] = limits.min, limits.max
    return array


def with_itk(path: Path) -> tuple[Array, Geometry]:
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, Geometry(image.GetSize(), affine)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_type_and_position_survive_a_file(tmp_path: Path, suffix: str, dtype: str) -> None:
    path = tmp_path / f"volume{suffix}"
    write_volume(path, Volume(voxels(dtype), oblique()))
    back = read_volume(path)
    assert back.array.dtype == ("uint8" if dtype == "bool" else dtype)
    np.testing.assert_array_equal(back.array, voxels(dtype))
    assert oblique().difference(back.geometry) is None
    assert back.geometry.difference(read_geometry(path)) is None
    assert back.array.flags.writeable


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_we_write_lie_where_simpleitk_sees_them(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"volume{suffix}"
    write_volume(path, Volume(voxels(), oblique()))
    array, geometry = with_itk(path)
    np.testing.assert_array_equal(array, voxels())
    assert oblique().difference(geometry) is None


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_files_we_write_lie_where_nibabel_sees_them_by_sform_and_by_qform(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"volume{suffix}"
    write_volume(path, Volume(voxels(), oblique()))
    image = nibabel.load(path)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), voxels())
    for form in (image.affine, image.get_sform(), image.get_qform()):
        np.testing.assert_allclose(form, LPS_FROM_RAS @ oblique().affine, atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header["sform_code"] == image.header["qform_code"] == 1


def test_nrrd_files_we_write_lie_where_pynrrd_sees_them(tmp_path: Path) -> None:
    path = tmp_path / "volume.nrrd"
    write_volume(path, Volume(voxels(), oblique()))
    array, header = nrrd.read(str(path))
    np.testing.assert_array_equal(array, voxels())
    assert header["space"] == "left-posterior-superior"
    np.testing.assert_allclose(header["space directions"].T, oblique().affine[:3, :3], atol=1e-9)
    np.testing.assert_allclose(header["space origin"], oblique().affine[:3, 3], atol=1e-9)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    mirrored=st.booleans(),
    spacing_mm=st.tuples(*[st.floats(0.3, 6)] * 3),
    origin_mm=st.tuples(*[st.floats(-900, 900)] * 3),
)
def test_the_same_scan_in_nifti_and_nrrd_reads_identically(
    tmp_path: Path,
    angles: tuple[float, float, float],
    mirrored: bool,
    spacing_mm: tuple[float, float, float],
    origin_mm: tuple[float, float, float],
) -> None:
    image = sitk.GetImageFromArray(voxels().T.copy())
    direction = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(
        [1, 1, -1 if mirrored else 1]
    )
    image.SetDirection(direction.ravel().tolist())
    image.SetSpacing(spacing_mm)
    image.SetOrigin(origin_mm)
    volumes = []
    for suffix in SUFFIXES:
        sitk.WriteImage(image, str(tmp_path / f"scan{suffix}"))
        volumes.append(read_volume(tmp_path / f"scan{suffix}"))
    for volume in volumes:
        np.testing.assert_array_equal(volume.array, voxels())
        # float32 headers of NIfTI: 1e-7 of 900 mm, and of the quaternion
        assert volumes[-1].geometry.difference(volume.geometry, tol_mm=2e-3) is None
        np.testing.assert_allclose(volume.geometry.to_lps([0, 0, 0]), origin_mm, atol=1e-3)
        np.testing.assert_allclose(
            volume.geometry.to_lps([3, 4, 5]), image.TransformIndexToPhysicalPoint((3, 4, 5)), atol=2e-3
        )


@pytest.mark.parametrize("form", ["sform", "qform"])
def test_a_nifti_file_with_one_form_only_keeps_its_place(tmp_path: Path, form: str) -> None:
    image = nibabel.Nifti1Image(voxels(), None)
    getattr(image, f"set_{form}")(LPS_FROM_RAS @ oblique().affine, code=1)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    assert oblique().difference(read_geometry(tmp_path / "scan.nii.gz")) is None


def test_integers_stay_integers_and_scaled_integers_become_their_values(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(voxels("uint8"), np.eye(4))
    image.header.set_slope_inter(1, 0)
    nibabel.save(image, tmp_path / "plain.nii.gz")
    assert read_volume(tmp_path / "plain.nii.gz").array.dtype == np.uint8

    scaled = nibabel.Nifti1Image(voxels("uint8"), np.eye(4))
    scaled.header.set_data_dtype(np.uint8)
    scaled.dataobj[...] = voxels("uint8")
    nibabel.save(scaled, tmp_path / "scaled.nii")
    raw = bytearray((tmp_path / "scaled.nii").read_bytes())
    raw[112:120] = np.array([0.5, -1024], "<f4").tobytes()  # scl_slope and scl_inter of the NIfTI-1 header
    (tmp_path / "scaled.nii").write_bytes(raw)
    values = read_volume(tmp_path / "scaled.nii").array
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, nibabel.load(tmp_path / "scaled.nii").get_fdata())
    assert values[0, 0, 1] == 0.5 * 1 - 1024


def test_bytes_in_the_other_order_are_turned(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header(endianness=">")
    nibabel.save(nibabel.Nifti1Image(voxels(), np.eye(4), header), tmp_path / "scan.nii")
    assert (tmp_path / "scan.nii").read_bytes()[:4] == b"\x00\x00\x01\x5c"
    back = read_volume(tmp_path / "scan.nii")
    np.testing.assert_array_equal(back.array, voxels())
    assert back.array.dtype.isnative
    for suffix in SUFFIXES:
        write_volume(tmp_path / f"turned{suffix}", Volume(voxels().astype(">i2"), back.geometry))
        np.testing.assert_array_equal(read_volume(tmp_path / f"turned{suffix}").array, voxels())


def test_nifti_2_reads_like_nifti_1(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti2Image(voxels(), LPS_FROM_RAS @ oblique().affine), tmp_path / "scan.nii.gz")
    back = read_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(back.array, voxels())
    assert oblique().difference(back.geometry) is None


@pytest.mark.parametrize(("unit", "factor"), [("meter", 0.001), ("micron", 1000.0)])
def test_other_units_of_length_become_millimetres(tmp_path: Path, unit: str, factor: float) -> None:
    affine = LPS_FROM_RAS @ oblique().affine
    affine[:3] *= factor
    image = nibabel.Nifti1Image(voxels(), affine)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    assert oblique().difference(read_geometry(tmp_path / "scan.nii.gz")) is None
    assert oblique().difference(with_itk(tmp_path / "scan.nii.gz")[1]) is None


def test_a_misnamed_file_is_read_by_its_content(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        write_volume(tmp_path / f"scan{suffix}", Volume(voxels(), oblique()))
    packed, plain = (tmp_path / f"scan{suffix}" for suffix in (".nii.gz", ".nii"))
    for name, content in {
        "packed.nii": packed.read_bytes(),
        "plain.nii.gz": plain.read_bytes(),
        "nrrd.nii.gz": (tmp_path / "scan.nrrd").read_bytes(),
        "nifti.nrrd": packed.read_bytes(),
        "no_suffix": plain.read_bytes(),
    }.items():
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, voxels())
        assert oblique().difference(read_geometry(tmp_path / name)) is None


def test_a_fourth_axis_of_one_is_dropped(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(voxels()[..., None, None], np.eye(4)), tmp_path / "scan.nii.gz")
    back = read_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(back.array, voxels())
    assert back.geometry.size == (4, 5, 6)


def test_a_right_anterior_superior_nrrd_lies_where_its_header_says(tmp_path: Path) -> None:
    header = {
        "space": "right-anterior-superior",
        "space directions": np.diag([2.0, 3.0, 4.0]),
        "space origin": [10.0, 20.0, 30.0],
    }
    nrrd.write(str(tmp_path / "scan.nrrd"), voxels(), header)
    back = read_volume(tmp_path / "scan.nrrd")
    assert back.geometry.axis_codes() == "RAS"
    assert back.geometry.to_lps([1, 1, 1]).tolist() == [-12.0, -23.0, 34.0]
    np.testing.assert_array_equal(back.array, voxels())


def test_reading_the_grid_needs_no_voxels(tmp_path: Path) -> None:
    for suffix in (".nii", ".nrrd"):
        path = tmp_path / f"scan{suffix}"
        write_volume(path, Volume(voxels(), oblique()))
        path.write_bytes(path.read_bytes()[:-20])
        assert oblique().difference(read_geometry(path)) is None
    packed = gzip.compress((tmp_path / "scan.nii").read_bytes())
    (tmp_path / "packed.nii.gz").write_bytes(packed[:-9])
    assert oblique().difference(read_geometry(tmp_path / "packed.nii.gz")) is None


def test_a_volume_is_called_by_its_file_without_the_suffix() -> None:
    names = {"a.b.nii.gz": "a.b", "a.nii": "a", "x.seg.nrrd": "x", "y.nrrd": "y", "z.dcm": "z"}
    assert {name: volume_stem(Path(name)) for name in names} == names
