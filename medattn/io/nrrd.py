"""NRRD files, through SimpleITK, which speaks LPS as we do; its arrays have the axes reversed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medattn.atomic import atomic_path
from medattn.errors import InputError
from medattn.geometry import Array, Geometry


def read_nrrd(path: Path) -> tuple[Array, Geometry]:
    """The array in the file's axis order, and its grid."""
    try:
        image = sitk.ReadImage(str(path), imageIO="NrrdImageIO")
    except RuntimeError as error:
        reason = [line for line in str(error).splitlines() if line.strip()][-1].split("): ")[-1].strip()
        raise InputError(f"{path}: truncated or corrupt NRRD ({reason}); copy the file again") from None
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(
            f"{path}: {image.GetDimension()} axes with {image.GetNumberOfComponentsPerPixel()} values per "
            "voxel, expected one 3D volume of single numbers"
        )
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    try:
        geometry = Geometry(image.GetSize(), affine)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), geometry


def write_nrrd(path: Path, array: Array, geometry: Geometry, fields: Mapping[str, str] | None = None) -> None:
    """Write a compressed NRRD; `fields` become its key/value pairs."""
    voxels = array.astype(np.uint8) if array.dtype == bool else array
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.transpose(2, 1, 0)))
    spacing = geometry.spacing_mm()
    image.SetSpacing(spacing)
    image.SetOrigin(geometry.affine[:3, 3].tolist())
    image.SetDirection((geometry.affine[:3, :3] / spacing).ravel().tolist())
    for key, value in (fields or {}).items():
        image.SetMetaData(key, value)
    with atomic_path(path) as temporary:
        sitk.WriteImage(image, str(temporary), imageIO="NrrdImageIO", useCompression=True)
