"""Bones of the head and neck: the skull, the spine, the face, the jaw and its teeth."""

from __future__ import annotations

import numpy as np

from medattn.data.phantom.anatomy import VALUES, Anatomy
from medattn.data.phantom.canvas import Canvas
from medattn.data.phantom.shapes import (
    Points,
    capsule,
    column,
    ellipsoid,
    intersection,
    mirrored,
    profile,
    rounded_box,
)
from medattn.geometry import Array

SKULL_MM = 7.0
VERTEBRA_MM = 18.0
TEETH_PER_JAW = 14


def cavity(points: Points) -> Array:
    """The inside of the skull: an ellipsoid cut by the base, which rises from the back to the front."""
    x, y, z = points
    middle = profile(y, (60, -18), (25, -8), (0, -2), (-24, 27), (-34, 20), (-46, 24), (-60, 32), (-100, 36))
    lateral = profile(y, (60, -18), (10, -4), (-4, 14), (-14, 9), (-52, 8), (-62, 30), (-100, 38))
    side = np.clip((np.abs(x) - 12) / 14, 0, 1)
    base = middle + (lateral - middle) * (side * side * (3 - 2 * side))
    steep = (z - 52) * np.where(z < 52, 0.8, 1.0).astype(np.float32)
    return intersection(ellipsoid((x, y, steep), (0, -8, 0), (67, 86, 82)), base - z)


def mandible(points: Points) -> Array:
    """Horseshoe body, two rami, condyles; no teeth."""
    wide, y, z = mirrored(points)
    arch = np.abs(column(points, (0.0, -22.0), (46.0, 60.0)))
    height = z - profile(y, (-82, -71), (-50, -65), (-22, -55))
    body = rounded_box((arch, np.maximum(y + 22, 0), height), (5.4, 8.0, 13.0), 5.0)
    rise = (z + 54) / 60
    ramus = rounded_box((wide - 46.5 - 5 * rise, y + 29 - 9 * rise, z + 29), (4.6, 15.0, 27.0), 4.2)
    notch = ellipsoid((wide, y, z), (51, -26, 2), (12, 7, 12))
    condyle = ellipsoid((wide, y, z), (51, -14, -6), (9.5, 5.5, 7))
    return np.minimum(np.minimum(body, intersection(ramus, -notch)), condyle)


def mastoid(both: Points) -> Array:
    """The bone behind the ear; x counted from the midline."""
    return ellipsoid(both, (59, 14, -4), (9, 10, 16))


def ear_canal(both: Points) -> Array:
    """From the ear drum to the skin; x counted from the midline."""
    return capsule(both, (44, -4, 10), (80, -3, 8), (3.2, 3.6))


def canal_y(z: Array, anatomy: Anatomy) -> Array:
    """Where the middle of the spinal canal lies, front to back, at each height."""
    knots = ((24, 9), (0, 14), (-20, 13), (-55, 7), (-85, 7), (-115, 13), (-150, 24))
    bow = np.clip(-z / 150, 0, 1)
    return np.asarray(profile(z, *knots) - anatomy.lordosis_mm * np.sin(np.pi * bow))


def canal(points: Points, anatomy: Anatomy) -> Array:
    """The spinal canal, from the foramen magnum down."""
    z = points[2]
    wide = profile(z, (4, 14), (-18, 12.5), (-45, 11.5), (-120, 11.5)) + anatomy.canal_mm
    deep = profile(z, (4, 14), (-18, 10.5), (-45, 9), (-120, 9)) + anatomy.canal_mm
    return intersection(column(points, (0.0, canal_y(z, anatomy)), (wide, deep)), z - 3)


def paint_skull(canvas: Canvas) -> None:
    """Two dense tables with the diploe between them, petrous bone, mastoid air cells and ear canals."""
    canvas = canvas.near((-100, -120, -35), (100, 110, 160))
    both, inside = mirrored(canvas.points), canvas.fields["cavity"]
    canvas.paint(inside - SKULL_MM, "bone")
    canvas.paint(np.abs(inside - SKULL_MM / 2) - 1.4, "diploe")
    canvas.paint(capsule(both, (18, -8, 8), (56, 2, 10), (7, 9)), "bone")
    canvas.paint(mastoid(both), "bone", hu=900)
    canvas.paint(ellipsoid(both, (59, 14, 0), (6, 7, 11)), "air cells")
    canvas.paint(ear_canal(both), "air")
    canvas.paint(intersection(ellipsoid(both, (9, -92, 34), (11, 7, 9)), 2 - inside), "air")


def paint_spine(canvas: Canvas, anatomy: Anatomy) -> None:
    """Vertebral bodies and discs, arches with processes, the first two vertebrae, and the canal's fluid."""
    canvas = canvas.near((-38, -40, -200), (38, 75, 10))
    points = canvas.points
    wide, y, z = mirrored(points)
    centre = canal_y(z, anatomy)
    level = (z + 24) / VERTEBRA_MM
    within = (level - np.floor(level) - 0.5) * VERTEBRA_MM
    below_axis = z + 20
    tube = canal(points, anatomy)
    front = centre - profile(z, (-18, 19), (-45, 18), (-120, 19))
    body = column(points, (0.0, front), (profile(z, (-20, 10), (-60, 12.5), (-130, 15.5)), 8.5))
    canvas.paint(intersection(body, below_axis), "disc")
    vertebra = intersection(body, np.abs(within) - 6.6, below_axis)
    canvas.paint(vertebra, "bone", hu=650)
    canvas.paint(vertebra + 1.6, "spongy bone")
    arch = intersection(tube - 4.5, np.abs(within) - 5.5)
    spine = rounded_box((wide, y - centre - 24, within + 2), (3.2, 14, 4), 2)
    process = rounded_box((wide - 19, y - centre + 9, within), (8, 6, 4.5), 3)
    facet = rounded_box((wide - 17, y - centre - 2, within), (6, 6.5, 7.5), 4)
    behind = intersection(np.minimum.reduce([arch, spine, process, facet]), below_axis)
    canvas.paint(behind, "bone", hu=700)
    canvas.paint(behind + 2.2, "spongy bone")
    ring = intersection(np.abs(column(points, (0.0, centre - 3), (21.0, 20.0))) - 3.5, np.abs(z + 12) - 5)
    mass = rounded_box((wide - 21, y - centre + 6, z + 11), (8, 9, 8), 5)
    canvas.paint(np.minimum(ring, mass), "bone", hu=750)
    canvas.paint(capsule(points, (0, -4, -26), (0, -4, -7), (6.5, 4.5)), "bone", hu=800)
    canvas.paint(tube, "csf")


def paint_face(canvas: Canvas, anatomy: Anatomy) -> None:
    """Palate and upper jaw, walls of sinuses and orbits, cheek bones, nose, mandible and teeth."""
    canvas = canvas.near((-75, -110, -100), (75, 5, 55))
    points, jaw = canvas.points, canvas.fields["jaw"]
    x, y, z = points
    both = mirrored(points)
    arch = np.abs(column(points, (0.0, -26.0), (38.0, 55.0)))
    canvas.paint(rounded_box((arch, np.maximum(y + 26, 0), z + 36), (6, 6, 9), 4), "spongy bone", hu=480)
    inner = intersection(column(points, (0.0, -30.0), (36.0, 50.0)), y + 30)
    canvas.paint(intersection(inner, np.abs(z + 29) - 2.2), "bone", hu=700)
    canvas.paint(ellipsoid(both, (28, -62, -8), (17.5, 19, 18)), "bone", hu=650)
    canvas.paint(ellipsoid(both, (31, -70, 24), (20.5, 26, 19.5)), "bone", hu=600)
    canvas.paint(capsule(both, (48, -72, -2), (63, -38, 1), (6, 3.5)), "bone", hu=800)
    canvas.paint(capsule(both, (63, -38, 1), (62, -12, 6), (3.5, 4)), "bone", hu=800)
    canvas.paint(capsule(both, (16, -36, -2), (15, -38, -28), (2.5, 2.5)), "bone", hu=700)
    canvas.paint(rounded_box((x, y + 94, z - 22), (6, 6, 14), 4), "bone", hu=700)
    canvas.paint(intersection(jaw - 2, -14 - z), "cartilage")
    canvas.paint(jaw, "bone")
    canvas.paint(jaw + 2.6, "spongy bone", hu=430)
    canvas.mark(jaw, VALUES["Bone_Mandible"])
    paint_teeth(canvas, anatomy)


def paint_teeth(canvas: Canvas, anatomy: Anatomy) -> None:
    """Two arches of fourteen teeth, crowns of enamel over roots of dentine; some teeth are gone."""
    canvas = canvas.near((-50, -95, -80), (50, -10, -20))
    x, y, z = canvas.points
    arch = np.abs(column(canvas.points, (0.0, -26.0), (40.0, 57.0)))
    place = (np.arctan2(x / 40, -(y + 26) / 57) / 1.35 + 1) * (TEETH_PER_JAW / 2)
    between_mm = (np.abs(place - np.floor(place) - 0.5) * 2 - 0.86) * 4
    for jaw, (crown, root) in enumerate(((-55.0, -62.0), (-45.0, -37.0))):
        standing = [n for n in range(TEETH_PER_JAW) if n + TEETH_PER_JAW * jaw not in anatomy.missing_teeth]
        outside = np.where(np.isin(np.floor(place), standing), between_mm, 9.0).astype(np.float32)
        for height, half, material in ((root, (2.6, 3, 8), "dentine"), (crown, (3.9, 3, 4.2), "enamel")):
            canvas.paint(intersection(rounded_box((arch, arch * 0, z - height), half, 2), outside), material)


def paint_shoulder_bones(canvas: Canvas) -> None:
    """Collar bones, first ribs and the upper edge of the shoulder blades, which enter the lowest slices."""
    canvas = canvas.near((-200, -60, -200), (200, 80, -105))
    both = mirrored(canvas.points)
    canvas.paint(capsule(both, (14, -38, -152), (150, 18, -122), (7, 6)), "bone", hu=700)
    canvas.paint(capsule(both, (22, 34, -136), (62, 20, -150), (5, 5)), "bone", hu=500)
    canvas.paint(capsule(both, (95, 62, -140), (150, 30, -126), (5, 9)), "bone", hu=500)
