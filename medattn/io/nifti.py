"""NIfTI files. NIfTI speaks RAS; this file turns it into LPS and back, and nothing else does."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import IO, cast

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import array_from_file
from nibabel.wrapstruct import WrapStructError

from medattn.atomic import atomic_path
from medattn.errors import InputError
from medattn.geometry import Array, Geometry

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
BROKEN = (EOFError, OSError, zlib.error, HeaderDataError, WrapStructError, ImageFileError, ValueError)


def read_nifti(path: Path) -> tuple[Array, Geometry]:
    """The array in the file's axis order, integers where the file stores unscaled integers, and its grid."""
    try:
        with _open(path) as stream:
            header = _header(stream)
            geometry = _geometry(path, header)
            dtype = header.get_data_dtype()
            if dtype.kind not in "iuf":
                raise InputError(f"{path}: voxels of type {dtype}, expected one number per voxel")
            array = array_from_file(geometry.size, dtype, stream, header.get_data_offset(), mmap=False)
            stream.read()  # to the end: only there does gzip compare its checksum
    except InputError:
        raise
    except BROKEN as error:
        raise _broken(path, error) from None
    slope, intercept = header.get_slope_inter()
    if slope not in (None, 1.0) or intercept not in (None, 0.0):
        array = (array * float(slope or 1.0) + float(intercept or 0.0)).astype(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False), geometry


def read_nifti_geometry(path: Path) -> Geometry:
    """The grid from the header alone."""
    try:
        with _open(path) as stream:
            header = _header(stream)
    except BROKEN as error:
        raise _broken(path, error) from None
    return _geometry(path, header)


def write_nifti(path: Path, array: Array, geometry: Geometry) -> None:
    """Write both sform and qform in scanner coordinates; bool becomes uint8."""
    voxels = array.astype(np.uint8) if array.dtype == bool else array
    image = nibabel.Nifti1Image(np.asfortranarray(voxels), LPS_FROM_RAS @ geometry.affine, dtype=voxels.dtype)
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)


def _open(path: Path) -> IO[bytes]:
    """The unpacked bytes, whatever the file's name says about compression."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    if compressed:
        return cast(IO[bytes], gzip.open(path))
    return path.open("rb")


def _header(stream: IO[bytes]) -> nibabel.Nifti1Header:
    second_version = stream.read(7)[4:] == b"n+2"
    stream.seek(0)
    return (nibabel.Nifti2Header if second_version else nibabel.Nifti1Header).from_fileobj(stream)


def _geometry(path: Path, header: nibabel.Nifti1Header) -> Geometry:
    shape = header.get_data_shape()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise InputError(f"{path}: {len(shape)} axes {shape}, expected one 3D volume")
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        raise InputError(
            f"{path}: neither sform nor qform is set, so left and right are unknown; "
            "convert the scan again with a tool that keeps its orientation"
        )
    scale = np.diag([MM_PER_UNIT[header.get_xyzt_units()[0]]] * 3 + [1.0])
    try:
        return Geometry(shape, scale @ LPS_FROM_RAS @ header.get_best_affine())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _broken(path: Path, error: Exception) -> InputError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return InputError(f"{path}: truncated or corrupt NIfTI ({reason}); copy the file again")
