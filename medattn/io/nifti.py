"""NIfTI files. NIfTI speaks RAS; this file turns it into LPS and back, and nothing else does."""

from __future__ import annotations

import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from medattn.atomic import atomic_path
from medattn.errors import InputError
from medattn.geometry import Array, Geometry

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
BROKEN = (
    EOFError,
    OSError,
    zlib.error,
    HeaderDataError,
    WrapStructError,
    ImageFileError,
    ValueError,
)


def read_nifti(path: Path) -> tuple[Array, Geometry]:
    """The array in the file's axis order, integers where the file stores unscaled integers, and its grid."""
    image = _open(path)
    geometry = _geometry(path, image)
    header = image.header
    slope, intercept = header.get_slope_inter()
    plain = slope in (None, 1.0) and intercept in (None, 0.0)
    try:
        array = np.asanyarray(image.dataobj) if plain else image.get_fdata(dtype=np.float32)
    except BROKEN as error:
        raise InputError(
            f"{path}: truncated or corrupt ({_first_line(error)}); copy the file again"
        ) from None
    if array.dtype.kind not in "iufb":
        raise InputError(f"{path}: voxels of type {array.dtype}, expected one number per voxel")
    return array.reshape(geometry.size), geometry


def read_nifti_geometry(path: Path) -> Geometry:
    """The grid from the header alone."""
    return _geometry(path, _open(path))


def write_nifti(path: Path, array: Array, geometry: Geometry) -> None:
    """Write both sform and qform in scanner coordinates; bool becomes uint8."""
    voxels = array.astype(np.uint8) if array.dtype == bool else array
    image = nibabel.Nifti1Image(np.asfortranarray(voxels), LPS_FROM_RAS @ geometry.affine)
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)


def _open(path: Path) -> nibabel.Nifti1Image:
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        # nibabel decides by the name; a misnamed file is read by its content
        if compressed == path.name.endswith(".gz"):
            return nibabel.Nifti1Image.from_filename(path)
        import gzip

        return nibabel.Nifti1Image.from_bytes(
            gzip.decompress(path.read_bytes()) if compressed else path.read_bytes()
        )
    except BROKEN as error:
        raise InputError(
            f"{path}: truncated or corrupt NIfTI ({_first_line(error)}); copy the file again"
        ) from None


def _geometry(path: Path, image: nibabel.Nifti1Image) -> Geometry:
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise InputError(f"{path}: {len(shape)} axes {shape}, expected one 3D volume")
    try:
        return Geometry(shape, LPS_FROM_RAS @ image.affine)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
