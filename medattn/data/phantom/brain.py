"""What the skull holds, and the cord below it."""

from __future__ import annotations

import numpy as np

from medattn.data.phantom.anatomy import VALUES, Anatomy
from medattn.data.phantom.bones import canal_y
from medattn.data.phantom.canvas import Canvas
from medattn.data.phantom.shapes import Points, column, ellipsoid, intersection, mirrored, profile
from medattn.geometry import Array

CORD_TOP_MM = -3.0
"""Where brainstem becomes cord, just below the foramen magnum."""


def cord(points: Points, anatomy: Anatomy) -> Array:
    """A tube in the spinal canal, wider than deep."""
    z = points[2]
    wide = profile(z, (0, 6.6), (-70, 7.2), (-130, 6.2)) + 0.4 * anatomy.canal_mm
    tube = column(points, (0.0, canal_y(z, anatomy) - 0.5), (wide, 0.84 * wide))
    return intersection(tube, z - CORD_TOP_MM)


def brainstem(points: Points, anatomy: Anatomy) -> Array:
    """Medulla, pons and midbrain on an axis that leans forward."""
    z = points[2]
    wide = profile(z, (-3, 7), (10, 9.5), (20, 15), (36, 17), (44, 14.5), (58, 16))
    deep = profile(z, (-3, 6), (10, 8), (20, 12), (34, 13), (44, 10.5), (58, 9.5))
    tube = column(points, (0.0, stem_y(z, anatomy)), (wide, deep))
    return intersection(tube, CORD_TOP_MM - z, z - 58)


def stem_y(z: Array, anatomy: Anatomy) -> Array:
    """Front-to-back position of the brainstem's axis, which continues the cord's."""
    axis = profile(z, (-3, 13.5), (20, 3), (40, -4), (58, -9))
    start = float(canal_y(np.asarray(CORD_TOP_MM), anatomy)) - 0.5
    return np.asarray(axis + (start - 13.5) * np.clip((20 - z) / 23, 0, 1))


def paint_brain(canvas: Canvas, anatomy: Anatomy) -> None:
    """Fluid, folded cortex over white matter, cerebellum, ventricles, and the brainstem in its cisterns."""
    canvas = canvas.near((-90, -110, -25), (90, 100, 150))
    x, y, z = canvas.points
    both, inside = mirrored(canvas.points), canvas.fields["cavity"]
    fold = np.sin(0.32 * x + 1.5 * np.sin(0.11 * y)) * np.sin(0.30 * y + 1.5 * np.sin(0.12 * z))
    fold = fold * np.sin(0.31 * z + 1)
    canvas.paint(inside, "csf")
    brain = intersection(inside + 2.5 + 2.5 * fold, 1.2 - both[0])
    canvas.paint(brain, "grey matter")
    canvas.paint(brain + 4.5 + 3 * fold, "white matter")
    tent = z - 26 - 0.35 * np.clip(30 - np.abs(y - 10), 0, 30)
    cerebellum = intersection(ellipsoid(canvas.points, (0, 38, 14), (50, 34, 30)), inside + 3, tent)
    canvas.paint(intersection(np.abs(cerebellum) - 1.2, inside), "csf")
    canvas.paint(cerebellum, "grey matter")
    paint_centre(canvas.near((-35, -60, -12), (35, 50, 100)), anatomy)


def paint_centre(canvas: Canvas, anatomy: Anatomy) -> None:
    """Thalami, ventricles, cisterns and brainstem."""
    points = canvas.points
    y, z = points[1:]
    both, inside = mirrored(points), canvas.fields["cavity"]
    swell = anatomy.ventricles
    canvas.paint(ellipsoid(both, (14, -12, 62), (8, 14, 7)), "grey matter")
    canvas.paint(ellipsoid(both, (11, -20, 80), (6 * swell, 30 * swell, 9 * swell)), "csf")
    canvas.paint(ellipsoid(both, (22, 22, 72), (7 * swell, 18 * swell, 8 * swell)), "csf")
    canvas.paint(ellipsoid(points, (0, -14, 66), (2.6 * swell, 14, 10)), "csf")
    stem = brainstem(points, anatomy)
    behind = y - stem_y(z, anatomy) - 2 - 4 * np.clip((z - 42) / 4, 0, 3)
    canvas.paint(intersection(stem - 5, behind, inside), "csf")
    canvas.paint(intersection(ellipsoid(points, (0, -22, 42), (18, 12, 10)), inside), "csf")
    canvas.paint(ellipsoid(points, (0, 18, 24), (8, 6, 11)), "csf")
    canvas.paint(stem, "brainstem")
    canvas.mark(stem, VALUES["Brainstem"])


def paint_cord(canvas: Canvas, anatomy: Anatomy) -> None:
    """The cord in the canal's fluid."""
    canvas = canvas.near((-15, -30, -200), (15, 60, 5))
    distance = cord(canvas.points, anatomy)
    canvas.paint(distance, "cord")
    canvas.mark(distance, VALUES["SpinalCord"])
