"""Torch's layers by the number of spatial axes."""

from __future__ import annotations

from torch import nn

Convolution = type[nn.Conv2d] | type[nn.Conv3d]
BatchNorm = type[nn.BatchNorm2d] | type[nn.BatchNorm3d]


def convolution(spatial_dims: int) -> Convolution:
    """Conv2d or Conv3d; raises ValueError for other ranks."""
    check_rank(spatial_dims)
    return nn.Conv2d if spatial_dims == 2 else nn.Conv3d


def batch_norm(spatial_dims: int) -> BatchNorm:
    """BatchNorm2d or BatchNorm3d; raises ValueError for other ranks."""
    check_rank(spatial_dims)
    return nn.BatchNorm2d if spatial_dims == 2 else nn.BatchNorm3d


def check_rank(spatial_dims: int) -> None:
    """Raise ValueError unless there are two or three spatial axes."""
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims=}")
