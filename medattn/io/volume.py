"""A volume is an array on a grid; reading chooses the format by content, writing by the file's name."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

from medattn.errors import InputError
from medattn.geometry import Array, Geometry
from medattn.io.nifti import read_nifti, read_nifti_geometry, write_nifti
from medattn.io.nrrd import read_nrrd, read_nrrd_header, write_nrrd

SUFFIXES = (".nii.gz", ".nii", ".nrrd")


@dataclass(frozen=True, eq=False)
class Volume:
    """One scalar per voxel: `array[i, j, k]` on `geometry`, in the file's own axis order."""

    array: Array
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.array.shape != self.geometry.size:
            raise InputError(f"array of shape {self.array.shape} on a grid of size {self.geometry.size}")


def read_volume(path: str | Path) -> Volume:
    """Read a NIfTI or NRRD file, compressed or not, recognised by its content.

    A `.seg.nrrd` of 3D Slicer reads as its label map. Raises InputError where the file is missing, empty,
    truncated, not of a known format, or not one scalar volume on a rectangular grid.
    """
    path = Path(path)
    array, geometry = read_nrrd(path) if _format_of(path) == "nrrd" else read_nifti(path)
    return Volume(array, geometry)


def read_geometry(path: str | Path) -> Geometry:
    """The grid of a volume file, from its header alone."""
    path = Path(path)
    return read_nrrd_header(path)[0] if _format_of(path) == "nrrd" else read_nifti_geometry(path)


def write_volume(path: str | Path, volume: Volume) -> None:
    """Write `.nii`, `.nii.gz` or `.nrrd`, whole or not at all."""
    path = Path(path)
    if path.name.endswith((".nii", ".nii.gz")):
        write_nifti(path, volume.array, volume.geometry)
    elif path.suffix == ".nrrd":
        write_nrrd(path, volume.array, volume.geometry)
    else:
        raise InputError(f"{path}: unknown file type, expected one of {', '.join(SUFFIXES)}")


def volume_stem(path: Path) -> str:
    """A volume file's name without its suffix: `a.b.nii.gz` -> `a.b`."""
    for suffix in (".seg.nrrd", *SUFFIXES):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem


def _format_of(path: Path) -> str:
    """'nifti' or 'nrrd', from the first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(348)
        packed = head[:2] == b"\x1f\x8b"
        if packed:
            with gzip.open(path) as file:
                head = file.read(348)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, expected a volume file ({', '.join(SUFFIXES)})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: truncated or corrupt ({error}); copy the file again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not head:
        raise InputError(f"{path}: empty file; copy it again")
    if head.startswith(b"NRRD") and packed:
        raise InputError(f"{path}: a NRRD file packed with gzip; unpack it first (gunzip)")
    if head.startswith(b"NRRD"):
        return "nrrd"
    if head[344:347] == b"ni1":
        raise InputError(
            f"{path}: a NIfTI header whose voxels are in another file; expected a single .nii file"
        )
    if head[344:347] == b"n+1" or head[4:7] == b"n+2":
        return "nifti"
    raise InputError(
        f"{path}: neither NIfTI nor NRRD (it begins with {head[:8]!r}); expected {', '.join(SUFFIXES)}"
    )
