"""One practice case: a patient, a pose, a scan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from medattn.data.phantom import bones, brain, soft
from medattn.data.phantom.acquisition import grain, noise, store, store_geometry, streaks
from medattn.data.phantom.anatomy import Anatomy, Pose
from medattn.data.phantom.canvas import Canvas
from medattn.data.phantom.shapes import Points, ellipsoid, intersection, rounded_box
from medattn.geometry import Array, Geometry

FIELD_MM = 288.0
SLICE_MM = (3.0, 3.0, 2.5)
TOP_MM = 162.0
FRONT_MM = -152.0
HU_RANGE = (-1024, 3071)
CODES = ("LPS", "LPS", "LPS", "RAS", "LAS", "LPI", "PSR")


@dataclass(frozen=True, eq=False)
class Phantom:
    """A case in its storage order; arrays [i, j, k] on `geometry`.

    image: int16 HU. label: uint8, values of ORGANS. material: uint8, values of canvas.NUMBER.
    anatomy, pose: the truth behind them.
    """

    image: Array
    label: Array
    material: Array
    geometry: Geometry
    anatomy: Anatomy
    pose: Pose


@dataclass(frozen=True, eq=False)
class Grid:
    """Voxel centres in the phantom's own scanner frame, in LPS order, and where a scanner would put them."""

    axes_mm: tuple[Array, Array, Array]
    geometry: Geometry

    @classmethod
    def draw(cls, rng: np.random.Generator, size: int) -> Grid:
        """size x size voxels in a field of 288 mm (- 3 to + 4 %), slices of 3 or 2.5 mm over 288 mm."""
        spacing, slice_mm = FIELD_MM * rng.uniform(0.97, 1.04) / size, float(rng.choice(SLICE_MM))
        counts, steps = (size, size, round(FIELD_MM / slice_mm)), (spacing, spacing, slice_mm)
        start = np.array([-FIELD_MM / 2, FRONT_MM, TOP_MM - FIELD_MM]) + np.array(steps) / 2
        affine = np.diag([*steps, 1.0])
        affine[:3, 3] = np.round(start + rng.normal(0, [5, 40, 60]), 1)
        x, y, z = (first + step * np.arange(n) for first, step, n in zip(start, steps, counts, strict=True))
        return cls((x, y, z), Geometry(counts, affine))

    def points(self) -> Points:
        """Coordinates of every voxel, float32."""
        x, y, z = np.meshgrid(*(axis.astype(np.float32) for axis in self.axes_mm), indexing="ij")
        return x, y, z


def phantom(
    seed: int,
    size: int = 96,
    *,
    scan: int = 0,
    removed: frozenset[str] = frozenset(),
    codes: str | None = None,
) -> Phantom:
    """Draw patient `seed` and scan them: size x size voxels in plane, about a hundred slices.

    scan: changes pose, grid, noise and storage, never the anatomy. removed: glands that surgery took.
    codes: axis codes of storage, drawn if None. The field of view does not depend on the size.
    """
    anatomy = Anatomy.draw(np.random.default_rng([seed, 0]), removed)
    rng = np.random.default_rng([seed, 1, scan])
    pose, grid = Pose.draw(rng), Grid.draw(rng, size)
    codes = codes or str(rng.choice(CODES))
    points, spacing_mm = grid.points(), grid.geometry.spacing_mm()
    edge_mm = float(np.prod(spacing_mm)) ** (1 / 3)
    canvas = Canvas.empty(anatomy.warp(pose.to_patient(points)), edge_mm, anatomy.tone)
    texture = grain(rng, grid.geometry.size, [3.0 / mm for mm in spacing_mm])
    _paint_patient(canvas, anatomy, texture)
    _paint_couch(canvas, points, masked=bool(rng.random() < 0.5))
    image = _scan(rng, canvas, grid, anatomy, pose)
    arrays = [store(array, codes) for array in (image, canvas.label, canvas.material)]
    return Phantom(arrays[0], arrays[1], arrays[2], store_geometry(grid.geometry, codes), anatomy, pose)


def _paint_patient(canvas: Canvas, anatomy: Anatomy, texture: Array) -> None:
    """Everything inside the skin, from the outside in."""
    points = canvas.points
    cavity, jaw = bones.cavity(points), bones.mandible(points)
    skin = soft.body(points, cavity, jaw, anatomy)
    canvas.fields |= {"cavity": cavity, "jaw": jaw, "skin": skin, "texture": texture}
    soft.paint_body(canvas, anatomy)
    soft.paint_throat(canvas)
    soft.paint_glands(canvas, anatomy)
    soft.paint_vessels(canvas, anatomy)
    bones.paint_shoulder_bones(canvas)
    bones.paint_skull(canvas)
    bones.paint_spine(canvas, anatomy)
    bones.paint_face(canvas, anatomy)
    soft.paint_cavities(canvas)
    brain.paint_brain(canvas, anatomy)
    brain.paint_cord(canvas, anatomy)
    canvas.hu += 4 * texture * (np.abs(canvas.hu) < 150)


def _paint_couch(canvas: Canvas, points: Points, *, masked: bool) -> None:
    """The couch and a head rest, shells around foam that yield to the patient, and a thermoplastic mask."""
    x, y, z = points
    skin = canvas.fields["skin"]
    outside = 0.5 - skin
    couch = rounded_box((x, y - 122, z * 0), (190, 9, 400), 6)
    rest = rounded_box((x, y - 90, z + 20), (75, 26, 75), 12)
    hollow = ellipsoid(points, (0, -8, 52), (84, 103, 92))
    for shape in (intersection(rest, -hollow), couch):
        canvas.paint(intersection(shape, outside), "couch")
        canvas.paint(intersection(shape + 1.5, outside), "foam")
    if masked:
        canvas.paint(intersection(np.abs(skin - 1.8) - 0.9, y - 30, -110 - z), "mask")


def _scan(rng: np.random.Generator, canvas: Canvas, grid: Grid, anatomy: Anatomy, pose: Pose) -> Array:
    """Blur, noise that grows in the shoulders, and streaks on the painted HU; int16."""
    spacing_mm = grid.geometry.spacing_mm()
    metals = pose.to_scanner(np.array(anatomy.fillings_mm).reshape(-1, 3) * anatomy.scale)
    for metal in metals:
        x, y, z = (axis - m for axis, m in zip(grid.axes_mm, metal, strict=True))
        reach = np.sqrt(x[:, None, None] ** 2 + y[None, :, None] ** 2 + z**2)
        canvas.paint(reach.astype(np.float32) - 3, "metal")
    hu = gaussian_filter(canvas.hu, [0.9 / mm for mm in spacing_mm], mode="nearest")
    thick = np.interp(grid.axes_mm[2], [-135, -90], [1.8, 1.0]).astype(np.float32)
    hu += rng.uniform(6, 13) * thick * noise(rng, hu.shape, spacing_mm)
    hu += streaks(rng, grid.axes_mm, metals, float(rng.uniform(60, 150))) * (canvas.hu > -500)
    return np.clip(np.rint(hu), *HU_RANGE).astype(np.int16)
