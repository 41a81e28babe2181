"""Areas of the surface elements of a voxel mask, by marching cubes.

A surface element ("surfel") sits at each corner point between eight voxels that are not all in or all out.
Its area is that of the marching-cubes surface (Lorensen and Cline 1987) that cuts the cell of the eight
voxel centres through the middle of its edges. This is the definition of DeepMind's `surface-distance`
(Nikolov et al. 2018, arXiv:1809.04430); its table of 256 cells is derived here from three rules:

1. a cell and its complement have the same surface; the minority (at most four voxels) is cut off;
2. on a face whose diagonal voxels alone are inside, the two are cut off one by one;
3. a loop of more than three points becomes the fan of triangles with the largest area on cubic voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np

from medattn.geometry import Array

CORNERS = tuple(product((0, 1), repeat=3))
FULL = 255
Point = tuple[float, ...]


def neighbour_codes(mask: Array) -> Array:
    """[I, J, K] bool -> [I + 1, J + 1, K + 1] uint8: the voxels around each corner point, as eight bits.

    Bit n is the voxel at CORNERS[n] of the cell; outside the array all is empty.
    """
    padded = np.pad(mask, 1).view(np.uint8)
    i, j, k = (n + 1 for n in mask.shape)
    codes = np.zeros((i, j, k), np.uint8)
    for bit, (a, b, c) in enumerate(CORNERS):
        codes |= padded[a : a + i, b : b + j, c : c + k] << np.uint8(bit)
    return codes


def surfel_areas_mm2(spacing_mm: Sequence[float]) -> Array:
    """[256] areas in mm2, by neighbour code, on voxels of this spacing."""
    x, y, z = spacing_mm
    return np.asarray(np.linalg.norm(_triangles() * [y * z, x * z, x * y], axis=-1).sum(axis=-1))


@cache
def _triangles() -> Array:
    """[256, 4, 3]: per code at most four triangles as normals of their area's length, on cubic voxels."""
    normals = np.zeros((FULL + 1, 4, 3))
    for code in range(1, FULL):
        minority = code if code.bit_count() <= 4 else FULL - code
        triangles = [triangle for loop in _loops(minority) for triangle in _widest_fan(loop)]
        normals[code, : len(triangles)] = triangles
    normals.setflags(write=False)
    return normals


def _loops(code: int) -> list[list[Point]]:
    """The closed lines in which the surface of a cell cuts its faces, as edge midpoints in order."""
    links: dict[Point, list[Point]] = {}
    for axis, side in product(range(3), (0, 1)):
        for a, b in _cuts(code, axis, side):
            links.setdefault(a, []).append(b)
            links.setdefault(b, []).append(a)
    loops, seen = [], set[Point]()
    for start in links:
        loop = [start] if start not in seen else []
        while loop and (ahead := [point for point in links[loop[-1]] if point not in loop]):
            loop.append(ahead[0])
        seen.update(loop)
        loops += [loop] if loop else []
    return loops


def _cuts(code: int, axis: int, side: int) -> list[tuple[Point, Point]]:
    """The lines that part the inside from the outside on one face of the cell, as pairs of midpoints."""
    ring = [tuple(np.insert(corner, axis, side).tolist()) for corner in ((0, 0), (0, 1), (1, 1), (1, 0))]
    inside = [bool(code >> CORNERS.index(corner) & 1) for corner in ring]
    middle = [tuple(((np.array(ring[n]) + ring[(n + 1) % 4]) / 2).tolist()) for n in range(4)]
    cut = [n for n in range(4) if inside[n] != inside[(n + 1) % 4]]
    if len(cut) == 4:
        return [(middle[n - 1], middle[n]) for n in range(4) if inside[n]]
    return [(middle[cut[0]], middle[cut[1]])] if cut else []


def _widest_fan(loop: list[Point]) -> Array:
    """[n - 2, 3] area normals of the triangle fan with the largest area, of a loop of n points."""
    fans = []
    for start in range(len(loop)):
        hub, *rim = np.roll(np.array(loop), -start, axis=0)
        spokes = np.array(rim) - hub
        fans.append(np.cross(spokes[:-1], spokes[1:]) / 2)
    areas = [round(float(np.linalg.norm(fan, axis=-1).sum()), 9) for fan in fans]
    return np.asarray(fans[areas.index(max(areas))])
