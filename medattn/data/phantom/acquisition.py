"""What the scanner adds: noise with a kernel's grain, dental streaks, and a storage order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

from medattn.geometry import AXIS_NAMES, Array, Geometry


def grain(rng: np.random.Generator, shape: Sequence[int], sigma: Sequence[float]) -> Array:
    """Smooth random field of mean 0 and standard deviation 1, float32; sigma in voxels per axis."""
    field = gaussian_filter(rng.standard_normal(tuple(shape), dtype=np.float32), sigma, mode="wrap")
    return np.asarray((field - field.mean()) / field.std(), np.float32)


def noise(rng: np.random.Generator, shape: Sequence[int], spacing_mm: Sequence[float]) -> Array:
    """Noise of a filtered back-projection, standard deviation 1: a band of frequencies within the slice.

    The power spectrum of a scanner falls towards frequency 0 and towards the kernel's cut-off (S. J. Riederer
    et al., Phys. Med. Biol. 23, 446, 1978): here the difference of two Gaussian blurs of white noise, 0.6 and
    2 mm wide. Neighbouring slices are independent.
    """
    white = rng.standard_normal(tuple(shape), dtype=np.float32)
    narrow, broad = (
        gaussian_filter(white, (mm / spacing_mm[0], mm / spacing_mm[1], 0), mode="wrap") for mm in (0.6, 2.0)
    )
    field = narrow - 0.8 * broad
    return np.asarray(field / field.std(), np.float32)


def streaks(
    rng: np.random.Generator, axes_mm: tuple[Array, Array, Array], metals_mm: Array, strength_hu: float
) -> Array:
    """Artefacts of metal fillings, in HU: bright and dark rays from each, and dark bands between each two.

    axes_mm: coordinates of the volume's x, y and z axis. metals_mm: [F, 3]. strength_hu: at the filling.
    Rays stay in the filling's slices. Returns [X, Y, Z].
    """
    x, y, z = axes_mm[0][:, None], axes_mm[1][None, :], axes_mm[2]
    total = np.zeros((len(axes_mm[0]), len(axes_mm[1]), len(z)), np.float32)
    for number, metal in enumerate(metals_mm):
        angle = np.arctan2(y - metal[1], x - metal[0])
        radius = np.hypot(x - metal[0], y - metal[1])
        rays = np.interp(angle, np.linspace(-np.pi, np.pi, 193), _ring(rng, 193))
        plane = strength_hu * rays / (1 + radius / 35)
        for other in metals_mm[:number]:
            if abs(other[2] - metal[2]) < 8:
                plane -= 1.5 * strength_hu * _between(x, y, metal, other)
        reach = np.exp(-((z - metal[2]) ** 2) / (2 * 4.0**2))
        total += (plane[..., None] * reach).astype(np.float32)
    return total


def store(array: Array, codes: str) -> Array:
    """An array in LPS order as a file with other axis codes holds it."""
    flips = tuple(axis for axis, letter in enumerate(codes) if letter in "RAI")
    return np.ascontiguousarray(np.flip(array.transpose(_order(codes)), flips))


def store_geometry(geometry: Geometry, codes: str) -> Geometry:
    """The grid of that file, from the grid in LPS order."""
    order = _order(codes)
    affine = geometry.affine.copy()
    affine[:3, :3] = geometry.affine[:3, order]
    i, j, k = (geometry.size[axis] for axis in order)
    for axis, (letter, count) in enumerate(zip(codes, (i, j, k), strict=True)):
        if letter in "RAI":
            affine[:3, 3] += affine[:3, axis] * (count - 1)
            affine[:3, axis] *= -1
    return Geometry((i, j, k), affine)


def _order(codes: str) -> list[int]:
    """The patient axis (0 left-right, 1 front-back, 2 up-down) of each letter."""
    return [next(axis for axis in range(3) if letter in AXIS_NAMES[axis]) for letter in codes]


def _ring(rng: np.random.Generator, count: int) -> Array:
    values = rng.normal(0, 1, count)
    values[-1] = values[0]
    return values


def _between(x: Array, y: Array, first: Array, second: Array) -> Array:
    """1 on the line through two metals, fading sideways and, slowly, beyond their ends."""
    along = second[:2] - first[:2]
    length = float(np.hypot(*along)) + 1e-6
    ux, uy = along / length
    dx, dy = x - first[0], y - first[1]
    across, share = dx * uy - dy * ux, (dx * ux + dy * uy) / length
    beyond = np.maximum(np.maximum(-share, share - 1), 0) * length
    return np.asarray(np.exp(-(across**2) / (2 * 4.0**2)) / (1 + beyond / 20))
