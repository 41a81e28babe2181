"""Signed distances in millimetres, negative inside, of the shapes that a head is made of.

A point set is a triple (x, y, z) of arrays that broadcast together, in mm. Distances are exact near the
surface and good enough further away. Sources: I. Quilez, "Distance functions",
https://iquilezles.org/articles/distfunctions, and "Smooth minimum", https://iquilezles.org/articles/smin.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medattn.geometry import Array

Points = tuple[Array, Array, Array]
Triple = Sequence[float]


def ellipsoid(points: Points, centre: Triple, radii: Triple) -> Array:
    """Distance to an ellipsoid with semi-axes `radii` along x, y, z."""
    q = [(p - c) / r for p, c, r in zip(points, centre, radii, strict=True)]
    k0 = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2)
    k1 = np.sqrt(sum((a / r) ** 2 for a, r in zip(q, radii, strict=True)))
    return np.asarray(k0 * (k0 - 1) / (k1 + 1e-6))


def column(
    points: Points, centre: tuple[Array | float, Array | float], radii: Sequence[Array | float]
) -> Array:
    """Distance to an upright tube of elliptical cross-section; centre and radii may depend on z."""
    x, y = (points[0] - centre[0]) / radii[0], (points[1] - centre[1]) / radii[1]
    k0 = np.sqrt(x**2 + y**2)
    k1 = np.sqrt((x / radii[0]) ** 2 + (y / radii[1]) ** 2)
    return np.asarray(k0 * (k0 - 1) / (k1 + 1e-6))


def capsule(points: Points, start: Triple, end: Triple, radii: tuple[float, float]) -> Array:
    """Distance to a round rod whose radius runs linearly from radii[0] at `start` to radii[1] at `end`."""
    along = np.subtract(end, start)
    to = [p - s for p, s in zip(points, start, strict=True)]
    share = sum(a * float(b) for a, b in zip(to, along, strict=True)) / float(along @ along)
    share = np.clip(share, 0, 1)
    square = sum((a - share * float(b)) ** 2 for a, b in zip(to, along, strict=True))
    return np.asarray(np.sqrt(square) - (radii[0] + (radii[1] - radii[0]) * share))


def rounded_box(offsets: Points, half: Triple, radius: float) -> Array:
    """Distance to a box of half-sizes `half` with rounded edges; `offsets` are measured from its centre."""
    q = [np.abs(o) - (h - radius) for o, h in zip(offsets, half, strict=True)]
    outside = np.sqrt(sum(np.maximum(a, 0) ** 2 for a in q))
    return np.asarray(outside + np.minimum(np.maximum(np.maximum(q[0], q[1]), q[2]), 0) - radius)


def blend(first: Array, second: Array, reach_mm: float) -> Array:
    """Union whose seam is rounded over `reach_mm`: a polynomial smooth minimum."""
    share = np.clip(0.5 + 0.5 * (second - first) / reach_mm, 0, 1)
    return np.asarray(second + (first - second) * share - reach_mm * share * (1 - share))


def profile(at: Array, *knots: tuple[float, float]) -> Array:
    """A piecewise linear curve through (position, value) knots, constant beyond its ends; float32."""
    positions, values = zip(*sorted(knots), strict=True)
    return np.asarray(np.interp(at, positions, values), np.float32)


def mirrored(points: Points) -> Points:
    """The points with x counted from the midline: a shape on the left then stands on both sides."""
    return np.abs(points[0]), points[1], points[2]


def intersection(*distances: Array) -> Array:
    """Inside all of the shapes."""
    return np.asarray(np.maximum.reduce(np.broadcast_arrays(*distances)))
