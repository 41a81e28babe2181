"""Clean-up of label maps."""

from __future__ import annotations

from collections.abc import Iterable

import cc3d
import numpy as np

from medattn.geometry import Array


def keep_largest(labels: Array, values: Iterable[int]) -> Array:
    """A copy of a label map in which each value keeps its largest connected component (26 neighbours)."""
    cleaned = labels.copy()
    for value in values:
        mask = labels == value
        if not mask.any():
            continue
        components = cc3d.connected_components(mask, connectivity=26)
        sizes = np.bincount(components.ravel())
        sizes[0] = 0
        cleaned[mask & (components != sizes.argmax())] = 0
    return cleaned
