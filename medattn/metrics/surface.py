"""Surface distances between two masks, as DeepMind's `surface-distance` defines them.

Surface elements and their areas: `medattn.metrics.surfels`. The distance of an element is that to the nearest
element of the other surface, between corner points; every mean, share and percentile weighs by area.
Empties as in `medattn.metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import KDTree

from medattn.geometry import Array
from medattn.metrics.overlap import check_masks
from medattn.metrics.surfels import FULL, neighbour_codes, surfel_areas_mm2


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """What all surface metrics of a pair of masks are computed from.

    prediction_mm, reference_mm: [n] distance of each element of that surface to the other surface,
    infinite where the other mask is empty. prediction_mm2, reference_mm2: [n] their areas.
    """

    prediction_mm: Array
    prediction_mm2: Array
    reference_mm: Array
    reference_mm2: Array

    def surface_dice(self, tolerance_mm: float) -> float:
        """The share of both surfaces that lies within a tolerance of the other (Nikolov et al. 2018)."""
        if not 0 <= tolerance_mm < np.inf:
            raise ValueError(f"expected a tolerance of at least 0 mm, found {tolerance_mm}")
        near = _sum(self.prediction_mm2[self.prediction_mm <= tolerance_mm]) + _sum(
            self.reference_mm2[self.reference_mm <= tolerance_mm]
        )
        total = _sum(self.prediction_mm2) + _sum(self.reference_mm2)
        return near / total if total else 1.0

    def hausdorff_mm(self, percent: float = 95.0) -> float:
        """The larger of the two directed distances below which `percent` of the surface's area lies."""
        return max(
            _percentile(self.prediction_mm, self.prediction_mm2, percent),
            _percentile(self.reference_mm, self.reference_mm2, percent),
        )

    def average_mm(self) -> float:
        """The mean distance over both surfaces together (Heimann et al. 2009, with areas as weights)."""
        total = _sum(self.prediction_mm2) + _sum(self.reference_mm2)
        weighted = _sum(self.prediction_mm * self.prediction_mm2) + _sum(
            self.reference_mm * self.reference_mm2
        )
        return weighted / total if total else 0.0


def surface_distances(prediction: Array, reference: Array, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Distances both ways between the surfaces of two boolean arrays [I, J, K] on one grid."""
    check_masks(prediction, reference)
    if prediction.ndim != 3 or len(spacing_mm) != 3:
        raise ValueError(f"expected 3D masks and three spacings, found {prediction.shape}, {spacing_mm}")
    areas_mm2 = surfel_areas_mm2(spacing_mm)
    box = _box(prediction | reference)
    points_p, mm2_p = _surface(prediction[box], areas_mm2)
    points_r, mm2_r = _surface(reference[box], areas_mm2)
    return SurfaceDistances(
        _nearest_mm(points_p, points_r, spacing_mm), mm2_p, _nearest_mm(points_r, points_p, spacing_mm), mm2_r
    )


def surface_dice(
    prediction: Array, reference: Array, spacing_mm: Sequence[float], tolerance_mm: float
) -> float:
    """Surface Dice at a tolerance in mm of two boolean arrays [I, J, K], from 0 to 1."""
    return surface_distances(prediction, reference, spacing_mm).surface_dice(tolerance_mm)


def hausdorff95(prediction: Array, reference: Array, spacing_mm: Sequence[float]) -> float:
    """95 % Hausdorff distance in mm of two boolean arrays [I, J, K]."""
    return surface_distances(prediction, reference, spacing_mm).hausdorff_mm(95.0)


def average_surface_distance(prediction: Array, reference: Array, spacing_mm: Sequence[float]) -> float:
    """Average symmetric surface distance in mm of two boolean arrays [I, J, K]."""
    return surface_distances(prediction, reference, spacing_mm).average_mm()


def _surface(mask: Array, areas_mm2: Array) -> tuple[Array, Array]:
    """Corner points [n, 3] (index units) and areas [n] of the surface elements."""
    codes = neighbour_codes(mask)
    points = np.argwhere((codes != 0) & (codes != FULL))
    return points, areas_mm2[codes[tuple(points.T)]]


def _nearest_mm(points: Array, others: Array, spacing_mm: Sequence[float]) -> Array:
    """Distance of each point to the nearest of the others."""
    if not len(points) or not len(others):
        return np.full(len(points), np.inf)
    _, nearest = KDTree(others * np.array(spacing_mm)).query(points * np.array(spacing_mm))
    # from whole index steps, so that a shift by n voxels is exactly n times the spacing, wherever it lies
    return np.asarray(np.linalg.norm((points - others[nearest]) * np.array(spacing_mm), axis=1))


def _percentile(distances_mm: Array, areas_mm2: Array, percent: float) -> float:
    if not len(distances_mm):
        return 0.0  # nothing here to be far away; the other surface, if there is one, is infinitely far
    order = np.lexsort((areas_mm2, distances_mm))  # by distance, ties by area: no trace of the points' order
    share = np.cumsum(areas_mm2[order]) / areas_mm2.sum()
    position = int(np.searchsorted(share, percent / 100))
    return float(distances_mm[order][min(position, len(order) - 1)])


def _box(mask: Array) -> tuple[slice, ...]:
    """The smallest box that holds the mask; of an empty mask, an empty box."""
    filled = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return tuple(slice(n[0], n[-1] + 1) if len(n) else slice(0, 0) for n in filled)


def _sum(values: Array) -> float:
    return float(values.sum())
