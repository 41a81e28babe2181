"""What a user is told about a file that cannot be used: one sentence that names it."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest

from medattn.errors import InputError
from medattn.geometry import Array, Geometry
from medattn.io import Volume, read_geometry, read_volume, write_volume

VOXELS = np.random.default_rng(0).integers(0, 255, (20, 20, 20)).astype(np.uint8)
GRID = Geometry((20, 20, 20), np.eye(4))


def refused(path: Path, *words: str) -> None:
    """Reading says one sentence with the file's name and these words."""
    with pytest.raises(InputError) as caught:
        read_volume(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: ")
    assert "\n" not in problem
    for word in words:
        assert word in problem


def written(path: Path) -> Path:
    write_volume(path, Volume(VOXELS, GRID))
    return path


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none.nii.gz", "no such file")
    refused(tmp_path, "is a folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file" / "scan.nii", "cannot be read")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = written(tmp_path / "scan.nii")
    path.chmod(0)
    refused(path, "cannot be read", "Permission denied")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd"])
def test_an_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(b"")
    refused(path, "empty file")
    path.write_bytes(gzip.compress(b""))
    refused(path, "empty file")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_a_truncated_file(tmp_path: Path, suffix: str, kept: float) -> None:
    path = written(tmp_path / f"scan{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refused(path)


def test_a_packed_file_without_its_last_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "scan.nii.gz")
    path.write_bytes(path.read_bytes()[:-4])
    refused(path, "truncated or corrupt", "copy the file again")


def test_a_flipped_bit_in_a_packed_file(tmp_path: Path) -> None:
    path = written(tmp_path / "scan.nii.gz")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # of the checksum: the voxels unpack, but not to what was packed
    path.write_bytes(content)
    refused(path, "truncated or corrupt")


@pytest.mark.parametrize(
    "content",
    [
        b"x",
        b"not an image",
        b"\x1f\x8b",
        b"\x1f\x8bgarbage",
        b"NRRD",
        b"NRRD0004\n\n",
        b"\0" * 4000,
        b"%PDF-1.7",
    ],
    ids=lambda content: content[:12].hex(),
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd"])
def test_a_file_that_is_no_image(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(content)
    refused(path)


def test_a_broken_nifti_header(tmp_path: Path) -> None:
    path = written(tmp_path / "scan.nii")
    content = bytearray(path.read_bytes())
    content[70:72] = b"\x77\x77"  # datatype
    path.write_bytes(content)
    refused(path)


RGB = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (nibabel.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)), "4 axes (4, 4, 4, 3)"),
        (nibabel.Nifti1Image(np.zeros((4, 4), np.int16), np.eye(4)), "2 axes"),
        (nibabel.Nifti1Image(RGB, np.eye(4)), "one number per voxel"),
        (nibabel.Nifti1Image(np.zeros((4, 4, 4), np.complex64), np.eye(4)), "one number per voxel"),
        (nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), None), "left and right are unknown"),
    ],
    ids=["4d", "2d", "rgb", "complex", "no-orientation"],
)
def test_a_nifti_file_of_another_kind(tmp_path: Path, image: nibabel.Nifti1Image, words: str) -> None:
    nibabel.save(image, tmp_path / "scan.nii.gz")
    refused(tmp_path / "scan.nii.gz", words)


@pytest.mark.parametrize(
    ("affine", "word"),
    [
        (np.diag([1.0, 0, 1, 1]), "singular"),
        (np.diag([1.0, np.nan, 1, 1]), "finite"),
        (np.array([[1, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "sheared"),
    ],
    ids=["singular", "nan", "sheared"],
)
def test_a_nifti_file_on_an_impossible_grid(tmp_path: Path, affine: Array, word: str) -> None:
    path = written(tmp_path / "scan.nii")
    content = bytearray(path.read_bytes())
    content[280:328] = affine[:3].astype("<f4").tobytes()  # srow_x, srow_y, srow_z of the NIfTI-1 header
    path.write_bytes(content)
    refused(path, word)


@pytest.mark.parametrize(
    ("array", "header", "words"),
    [
        (np.zeros((4, 4, 4)), {"spacings": [1.0, 1.0, 1.0]}, "left and right are unknown"),
        (
            np.zeros((3, 4, 4, 4)),
            {
                "space": "left-posterior-superior",
                "kinds": ["vector", "domain", "domain", "domain"],
                "space directions": np.vstack([[np.nan] * 3, np.eye(3)]),
            },
            "3 values per voxel",
        ),
        (np.zeros((4, 4)), {}, "2 axes"),
        (
            np.zeros((4, 4, 4)),
            {
                "space": "left-posterior-superior",
                "space directions": np.array([[1, 0, 0], [0, 1, 0], [0, 0.3, 1.0]]),
            },
            "sheared",
        ),
    ],
    ids=["no-space", "vector", "2d", "sheared"],
)
def test_a_nrrd_file_of_another_kind(
    tmp_path: Path, array: Array, header: dict[str, object], words: str
) -> None:
    nrrd.write(str(tmp_path / "scan.nrrd"), array, header)
    refused(tmp_path / "scan.nrrd", words)


def test_a_nrrd_packed_once_more_and_a_header_without_voxels(tmp_path: Path) -> None:
    (tmp_path / "scan.nrrd.gz").write_bytes(gzip.compress(written(tmp_path / "scan.nrrd").read_bytes()))
    refused(tmp_path / "scan.nrrd.gz", "gunzip")
    nibabel.save(nibabel.Nifti1Pair(VOXELS, np.eye(4)), tmp_path / "pair.img")
    refused(tmp_path / "pair.hdr", "voxels are in another file")


def test_an_unknown_suffix_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"scan.mha: unknown file type, expected one of .nii.gz, .nii, .nrrd"
    ):
        write_volume(tmp_path / "scan.mha", Volume(VOXELS, GRID))
    assert list(tmp_path.iterdir()) == []


def test_an_array_must_fit_its_grid() -> None:
    with pytest.raises(InputError, match=r"\(20, 20, 20\) on a grid of size \(20, 20, 19\)"):
        Volume(VOXELS, Geometry((20, 20, 19), np.eye(4)))


def test_the_grid_of_a_bad_file_is_refused_as_its_voxels_are(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").write_bytes(written(tmp_path / "whole.nii").read_bytes()[:100])
    for path in (tmp_path / "none.nii", tmp_path / "scan.nii"):
        with pytest.raises(InputError, match=path.name):
            read_geometry(path)
