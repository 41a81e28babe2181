"""Volume overlap of two masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medattn.geometry import Array


def dice(prediction: Array, reference: Array) -> float:
    """2 |A and B| / (|A| + |B|) of two boolean arrays of one shape (Dice 1945).

    Both empty: 1; one empty: 0, as everywhere in `medattn.metrics`.
    """
    check_masks(prediction, reference)
    both = int(np.count_nonzero(prediction & reference))
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    return 2 * both / total if total else 1.0


def volume_ml(mask: Array, spacing_mm: Sequence[float]) -> float:
    """Volume of a boolean array in millilitres."""
    return float(np.count_nonzero(mask) * np.prod(spacing_mm) / 1000)


def check_masks(prediction: Array, reference: Array) -> None:
    """Raises TypeError unless both are boolean, ValueError unless they have one shape."""
    if prediction.dtype != bool or reference.dtype != bool:
        raise TypeError(f"expected boolean masks, found {prediction.dtype} and {reference.dtype}")
    if prediction.shape != reference.shape:
        raise ValueError(f"masks differ in shape: {prediction.shape} vs {reference.shape}")
