"""NRRD files, through SimpleITK, which speaks LPS as we do; its arrays have the axes reversed."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medattn.atomic import atomic_path
from medattn.errors import InputError
from medattn.geometry import Array, Geometry


def read_nrrd(path: Path) -> tuple[Array, Geometry]:
    """The array in the file's axis order, and its grid. A `.seg.nrrd` of one layer is its label map."""
    geometry, _ = read_nrrd_header(path)
    try:
        image = sitk.ReadImage(str(path), imageIO="NrrdImageIO")
    except RuntimeError as error:
        raise _broken(path, error) from None
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), geometry


def read_nrrd_header(path: Path) -> tuple[Geometry, dict[str, str]]:
    """The grid and the key/value pairs, without reading voxels."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _broken(path, error) from None
    fields = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
    axes, values = reader.GetDimension(), reader.GetNumberOfComponents()
    if "Segmentation_ContainedRepresentationNames" in fields and (axes, values) != (3, 1):
        raise InputError(
            f"{path}: a segmentation of {values} overlapping layers, expected one; "
            "export it from 3D Slicer as a label map"
        )
    if (axes, values) != (3, 1):
        raise InputError(
            f"{path}: {axes} axes with {values} values per voxel, expected one 3D volume of single numbers"
        )
    if "NRRD_space" not in fields:
        raise InputError(
            f"{path}: its header names no patient space, so left and right are unknown; "
            "expected a line such as `space: left-posterior-superior`"
        )
    affine = np.eye(4)
    affine[:3, :3] = np.array(reader.GetDirection()).reshape(3, 3) * reader.GetSpacing()
    affine[:3, 3] = reader.GetOrigin()
    try:
        return Geometry(reader.GetSize(), affine), fields
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def write_nrrd(path: Path, array: Array, geometry: Geometry, fields: Mapping[str, str] | None = None) -> None:
    """Write a compressed NRRD; `fields` become its key/value pairs. Raises OSError where the disk is full."""
    voxels = array.astype(np.uint8) if array.dtype == bool else array
    native = voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    voxels_KJI = np.ascontiguousarray(native.transpose(2, 1, 0))
    image = sitk.GetImageFromArray(voxels_KJI)
    spacing = geometry.spacing_mm()
    image.SetSpacing(spacing)
    image.SetOrigin(geometry.affine[:3, 3].tolist())
    image.SetDirection((geometry.affine[:3, :3] / spacing).ravel().tolist())
    for key, value in (fields or {}).items():
        image.SetMetaData(key, value)
    with atomic_path(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), imageIO="NrrdImageIO", useCompression=True)
        except RuntimeError as error:
            raise OSError(errno.EIO, f"cannot be written ({_reason(error)})", str(path)) from None
        # the writer does not notice a disk that fills up with its last bytes, where gzip keeps its checksum
        end = struct.pack("<2I", zlib.crc32(voxels_KJI.data), voxels_KJI.nbytes % 2**32)
        with temporary.open("rb") as file:
            file.seek(-len(end), os.SEEK_END)
            whole = file.read() == end
        if not whole:
            raise OSError(errno.ENOSPC, "cannot be written whole", str(path))


def _broken(path: Path, error: RuntimeError) -> InputError:
    return InputError(f"{path}: truncated or corrupt NRRD ({_reason(error)}); copy the file again")


def _reason(error: RuntimeError) -> str:
    """The last line of ITK's long message, without the class that says it."""
    return [line for line in str(error).splitlines() if line.strip()][-1].split("): ")[-1].strip()
