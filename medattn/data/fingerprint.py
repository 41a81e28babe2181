"""What a plan needs to know of a case: its grid, the CT numbers inside its organs and the organs' sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medattn.geometry import Array, Size
from medattn.io import Volume

PERCENTILES = (0.5, 99.5)
CHUNK_VOXELS = 1 << 22  # np.bincount widens its input to eight bytes a voxel; a chunk keeps that small


@dataclass(frozen=True)
class Fingerprint:
    """One case in numbers.

    size, spacing_mm: the grid with its axes in canonical order L, P, S. hu_range: 0.5th and 99.5th percentile
    of the CT numbers inside any labelled organ, None where the label map is empty. organ_voxels: organ name
    -> voxels, 0 included, for every organ of the data set's labels.
    """

    case: str
    size: Size
    spacing_mm: tuple[float, float, float]
    hu_range: tuple[float, float] | None
    organ_voxels: Mapping[str, int]


def fingerprint(case: str, image: Volume, label: Volume, labels: Mapping[int, str]) -> Fingerprint:
    """Measure a case whose image and integer label map share one grid.

    labels: voxel value -> organ name; other values count as background.
    """
    grid, _ = image.geometry.canonical()
    counts = voxel_counts(label.array)
    strangers = counts.keys() - {0} - labels.keys()
    inside = np.isin(label.array, list(labels)) if strangers else label.array != 0
    return Fingerprint(
        case=case,
        size=grid.size,
        spacing_mm=grid.spacing_mm(),
        hu_range=_hu_range(image.array[inside]),
        organ_voxels={name: counts.get(value, 0) for value, name in labels.items()},
    )


def voxel_counts(label: Array) -> dict[int, int]:
    """Voxels per value of an integer label map of any size; values that do not occur are left out."""
    flat = label.ravel(order="K")
    if label.dtype != np.uint8:
        values, numbers = np.unique(flat, return_counts=True)
        return {int(value): int(number) for value, number in zip(values, numbers, strict=True)}
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, flat.size, CHUNK_VOXELS):
        counts += np.bincount(flat[start : start + CHUNK_VOXELS], minlength=256)
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def _hu_range(hu: Array) -> tuple[float, float] | None:
    if not hu.size:
        return None
    low, high = np.percentile(hu, PERCENTILES)
    return float(low), float(high)
