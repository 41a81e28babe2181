"""Voxel grids in patient space: values without files.

Coordinates are LPS millimetres (x grows to the patient's left, y to posterior, z to superior), as in DICOM.
`array[i, j, k]` follows the affine's axis order, which is the file's order. Formats that speak another
convention are converted where they are read and written, in `medattn.io`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medattn.errors import InputError

Array = npt.NDArray[Any]
Size = tuple[int, int, int]

# per patient axis: towards smaller, towards larger LPS
AXIS_NAMES = (("R", "L"), ("A", "P"), ("I", "S"))
# largest |cosine| between two index axes; float32 headers reach 1e-6, a tilted gantry 1e-2
SHEAR_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Geometry:
    """A voxel grid in patient space.

    size: voxels per index axis (i, j, k).
    affine: [4, 4], index (i, j, k) -> LPS mm, voxel centres at whole indices.
    frame_of_reference: DICOM UID of the coordinate system, or None where the format has none.

    Raises InputError for a size below 1 and for a singular, non-finite or sheared affine.
    """

    size: Size
    affine: Array
    frame_of_reference: str | None = None

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        size = tuple(int(n) for n in self.size)
        if len(size) != 3 or min(size) < 1:
            raise InputError(f"a volume needs three axes with at least one voxel each, found size {size}")
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise InputError(f"affine is not a finite 4 x 4 matrix: {affine.tolist()}")
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if lengths.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 0.5:
            raise InputError(f"affine is singular: its axes have lengths {lengths.tolist()} mm")
        cosines = (affine[:3, :3] / lengths).T @ (affine[:3, :3] / lengths)
        if np.abs(cosines - np.eye(3)).max() > SHEAR_TOLERANCE:
            worst = np.abs(cosines - np.eye(3)).max()
            raise InputError(
                f"affine is sheared: two axes have cosine {worst:.4f}, expected below {SHEAR_TOLERANCE} "
                "(a tilted gantry? resample the scan to a rectangular grid first)"
            )
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "size", size)

    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along each index axis."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(np.prod(self.spacing_mm())) / 1000.0

    def patient_axes(self) -> tuple[int, int, int]:
        """For each index axis, the patient axis (0 left-right, 1 front-back, 2 up-down) nearest to it."""
        cosines = np.abs(self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0))
        # the best of the six assignments: a column-wise maximum would give one axis twice at 45 degrees
        assignments = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
        return max(
            assignments,
            key=lambda axes: cosines[axes[0], 0] + cosines[axes[1], 1] + cosines[axes[2], 2],
        )

    def axis_codes(self) -> str:
        """Where each index axis points, in patient letters.

        >>> Geometry((4, 4, 4), np.diag([1.0, -1.0, 2.0, 1.0])).axis_codes()
        'LAS'
        """
        return "".join(
            AXIS_NAMES[patient][int(self.affine[patient, index] > 0)]
            for index, patient in enumerate(self.patient_axes())
        )

    def to_lps(self, index: npt.ArrayLike) -> Array:
        """Index coordinates [..., 3] -> LPS mm [..., 3]."""
        moved = np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]
        return np.asarray(moved)

    def canonical(self) -> tuple[Geometry, Reorientation]:
        """The same voxels with index axes turned and flipped to run L, P, S, and the way there."""
        axes = tuple(self.patient_axes().index(patient) for patient in range(3))
        flips = tuple(bool(self.affine[patient, axes[patient]] < 0) for patient in range(3))
        turn = Reorientation((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, axes]
        size = [self.size[axis] for axis in axes]
        for axis in np.flatnonzero(flips):
            affine[:3, 3] += affine[:3, axis] * (size[axis] - 1)
            affine[:3, axis] *= -1
        return Geometry((size[0], size[1], size[2]), affine, self.frame_of_reference), turn

    def resized(self, size: Sequence[int]) -> Geometry:
        """Another number of voxels over exactly the same field of view (voxel edges, not centres)."""
        ratio = np.array(self.size) / np.array(size)
        affine = self.affine.copy()
        affine[:3, :3] *= ratio
        affine[:3, 3] += self.affine[:3, :3] @ ((ratio - 1) / 2)
        return Geometry((int(size[0]), int(size[1]), int(size[2])), affine, self.frame_of_reference)

    def size_at(self, spacing_mm: Sequence[float]) -> Size:
        """Voxels per axis that bring this field of view closest to a spacing in mm."""
        i, j, k = (
            max(1, round(n * mm / wanted))
            for n, mm, wanted in zip(self.size, self.spacing_mm(), spacing_mm, strict=True)
        )
        return i, j, k

    def difference(self, other: Geometry, tol_mm: float = 1e-3) -> str | None:
        """None where both grids are the same, else one sentence that says how they differ.

        Positions are compared at all eight corners, so that a small rotation counts by what it moves.
        Frames of reference differ only where both are known.
        """
        if self.size != other.size:
            return f"size {_voxels(self.size)} vs {_voxels(other.size)} voxels"
        for axis, (a, b) in enumerate(zip(self.spacing_mm(), other.spacing_mm(), strict=True)):
            if abs(a - b) * max(1, self.size[axis] - 1) > tol_mm:
                return f"spacing {a:.6g} vs {b:.6g} mm on axis {axis}"
        if self.axis_codes() != other.axis_codes():
            return f"orientation {self.axis_codes()} vs {other.axis_codes()}"
        corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (
            np.array(self.size) - 1
        )
        moved = np.linalg.norm(self.to_lps(corners) - other.to_lps(corners), axis=1)
        if moved[0] > tol_mm:
            mine, theirs = (np.round(g.affine[:3, 3], 4).tolist() for g in (self, other))
            return f"origin {mine} vs {theirs} mm (LPS)"
        if moved.max() > tol_mm:
            return f"direction: the far corner lies {moved.max():.4g} mm away"
        frames = (self.frame_of_reference, other.frame_of_reference)
        if None not in frames and frames[0] != frames[1]:
            return f"frame of reference {frames[0]} vs {frames[1]}"
        return None


@dataclass(frozen=True)
class Reorientation:
    """A change of index axes: first transposed by `axes`, then flipped along the new axes where `flips`."""

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    def apply(self, array: Array) -> Array:
        """A view of `array` [i, j, k] in the new axis order."""
        return np.flip(array.transpose(self.axes), self._flipped())

    def undo(self, array: Array) -> Array:
        """The inverse of `apply`, also a view."""
        back: Array = np.flip(array, self._flipped())
        return back.transpose(tuple(int(a) for a in np.argsort(self.axes)))

    def _flipped(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(3) if self.flips[axis])


def _voxels(size: Size) -> str:
    return " x ".join(str(n) for n in size)
