"""From a file to a network input: orientation, spacing, intensity. Used by training and prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from medattn.data.plan import Plan
from medattn.errors import InputError
from medattn.geometry import Array, Geometry, Reorientation
from medattn.io import Volume
from medattn.resample import resample, resample_labels

AIR = -1.0  # a prepared voxel at or below the window: what lies outside a volume


def prepared_geometry(geometry: Geometry, spacing_mm: Sequence[float]) -> tuple[Geometry, Reorientation]:
    """The grid of the prepared volume: axes L, P, S, the file's field of view, nearest to the spacing."""
    canonical, turn = geometry.canonical()
    return canonical.resized(canonical.size_at(spacing_mm)), turn


def prepare_image(volume: Volume, plan: Plan) -> Tensor:
    """CT volume in HU -> [i, j, k] float32 on the planned grid, the window mapped to [-1, 1].

    Raises InputError for voxels that are not finite, which a window would not tell from air.
    """
    grid, turn = prepared_geometry(volume.geometry, plan.spacing_mm)
    hu = torch.from_numpy(np.ascontiguousarray(turn.apply(volume.array), dtype=np.float32))
    if not bool(hu.isfinite().all()):
        wrong = int((~hu.isfinite()).sum())
        raise InputError(f"{wrong} voxels are not finite, expected CT numbers in HU; export the scan again")
    low, high = plan.window_hu
    windowed = resample(hu.clamp(low, high), grid.size)  # a copy: hu may share the volume's memory
    return windowed.sub((low + high) / 2).div_((high - low) / 2)


def prepare_labels(volume: Volume, plan: Plan, labels: Mapping[int, str]) -> Tensor:
    """Label map with the file's values -> [i, j, k] uint8 on the planned grid: 1 + place in plan.organs."""
    grid, turn = prepared_geometry(volume.geometry, plan.spacing_mm)
    channels = np.ascontiguousarray(turn.apply(channel_map(volume.array, labels, plan.organs)))
    return resample_labels(torch.from_numpy(channels), grid.size, range(1, len(plan.organs) + 1))


def channel_map(label: Array, labels: Mapping[int, str], organs: Sequence[str]) -> Array:
    """Renumber a label map: 1 + position in `organs`, 0 for everything else."""
    table = np.zeros(256, dtype=np.uint8)
    for value, name in labels.items():
        table[value] = organs.index(name) + 1 if name in organs else 0
    renumbered: Array = table[label.astype(np.uint8)]
    return renumbered
