"""Separable linear resampling between grids over the same field of view.

Each axis is one small matrix, so the way to the planned spacing and the way back use the same code, any slab
of the result costs only its own rows, and shrinking averages instead of dropping voxels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_weights(n_in: int, n_out: int) -> Tensor:
    """[n_out, n_in] weights of linear interpolation at voxel centres; rows sum to 1.

    When shrinking, the triangle widens to n_in / n_out voxels (antialiasing); at the border the nearest voxel
    continues. Equals `torch.nn.functional.interpolate(mode="linear", align_corners=False)` when enlarging and
    its `antialias=True` form when shrinking.
    """
    ratio = n_in / n_out
    centres = (torch.arange(n_out, dtype=torch.float64) + 0.5) * ratio - 0.5
    distance = (torch.arange(n_in, dtype=torch.float64)[None] - centres[:, None]).abs()
    weights = (1 - distance / max(1.0, ratio)).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).float()


def resample(volume: Tensor, size: Sequence[int]) -> Tensor:
    """[..., i, j, k] -> [..., *size], the axes that shrink most first."""
    for axis in sorted(range(3), key=lambda a: size[a] / volume.shape[a - 3]):
        if volume.shape[axis - 3] != size[axis]:
            volume = apply_along(volume, linear_weights(volume.shape[axis - 3], size[axis]), axis)
    return volume


def apply_along(volume: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Multiply a [n_out, n_in] matrix onto spatial axis 0, 1 or 2 of [..., i, j, k]."""
    weights = weights.to(volume)
    if axis == 2:
        return volume @ weights.T
    if axis == 1:
        return weights @ volume
    return torch.einsum("oi,...ijk->...ojk", weights, volume)


def resample_labels(labels: Tensor, size: Sequence[int], values: Sequence[int]) -> Tensor:
    """Label map [i, j, k] -> [*size] uint8: in each voxel the value that covers most of it.

    Each value is resampled as a mask, so thin organs keep their volume; ties go to the lower value.
    """
    if tuple(labels.shape) == tuple(size):
        return labels.to(torch.uint8)
    best = resample((labels == 0).float(), size)
    result = torch.zeros(tuple(size), dtype=torch.uint8)
    for value in values:
        share = resample((labels == value).float(), size)
        result[share > best] = value
        best = torch.maximum(best, share)
    return result
