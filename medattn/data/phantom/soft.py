"""Soft tissue below and around the bones: skin, muscles, throat, vessels, glands, eyes and nose."""

from __future__ import annotations

import numpy as np

from medattn.data.phantom.anatomy import GLANDS, SIDES, VALUES, Anatomy
from medattn.data.phantom.bones import SKULL_MM, canal_y, ear_canal, mastoid
from medattn.data.phantom.canvas import Canvas
from medattn.data.phantom.shapes import (
    Points,
    blend,
    capsule,
    column,
    ellipsoid,
    intersection,
    mirrored,
    profile,
    rounded_box,
)
from medattn.geometry import Array

STANDARD_GLANDS = {
    "P": ((57.5, 0.5, -29.0), (19.0, 21.5, 31.0)),
    "G": ((31.5, -41.0, -81.0), (11.0, 16.5, 13.5)),
}
"""Centre on the left and radii, in mm, by the first letter of Parotid and Glnd_Submand."""


def body(points: Points, inside: Array, jaw: Array, anatomy: Anatomy) -> Array:
    """The skin: layers over skull and jaw, face, nose, neck and shoulders in one smooth surface."""
    z = points[2]
    scalp = inside - SKULL_MM - 5
    face = ellipsoid(points, (0, -48, -14), (66, 57, 80))
    nose = capsule(points, (0, -98, 22), (0, -112, -10), (8, 13))
    wide = profile(z, (0, 58), (-60, 58), (-110, 64)) + 0.6 * anatomy.fat_mm
    neck = intersection(column(points, (0.0, profile(z, (0, 10), (-120, 2))), (wide, wide * 1.02)), z - 10)
    shoulders = ellipsoid(points, (0, 12, -196), (185, 88, 100))
    outline = blend(blend(scalp, face, 14), blend(jaw - 9 - 0.4 * anatomy.fat_mm, nose, 4), 14)
    return blend(outline, blend(neck, shoulders, 40), 24)


def gland(canvas: Canvas, name: str, anatomy: Anatomy) -> Array:
    """An ellipsoid with one bump, kept off the bones and muscles beside it and the skin.

    The shape is the same on both sides, mirrored; only the patient's own factors and shifts differ.
    """
    points, skin, jaw = canvas.points, canvas.fields["skin"], canvas.fields["jaw"]
    (cx, cy, cz), radii = STANDARD_GLANDS[name[0]]
    dx, dy, dz = anatomy.gland_shift_mm[name]
    rx, ry, rz = (r * s for r, s in zip(radii, anatomy.gland_scale[name], strict=True))
    both = (SIDES[name[-1]] * points[0], points[1], points[2])
    here = (both[0] - cx - dx, both[1] - cy - dy, both[2] - cz - dz)
    if name[0] == "P":
        main = ellipsoid(
            (here[0] - 0.10 * here[2], here[1] + 0.25 * here[2], here[2]), (0, 0, 0), (rx, ry, rz)
        )
        shape = blend(main, ellipsoid(here, (-11, 3, 4), (10, 9, 14)), 6)
        others = [masseter(both), sternomastoid(both), mastoid(both), ear_canal(both) - 2]
        base = SKULL_MM + 1 - canvas.fields["cavity"]
        return intersection(shape, 0.5 - np.minimum.reduce(others), base, 1.5 - jaw, skin + 4)
    main = ellipsoid((here[0], here[1] + 0.15 * here[2], here[2]), (0, 0, 0), (rx, ry, rz))
    shape = blend(main, ellipsoid(here, (-5, -12, 3), (6, 7, 6)), 6)
    return intersection(shape, 1.5 - jaw, skin + 4)


def masseter(both: Points) -> Array:
    """The chewing muscle outside the ramus; x counted from the midline."""
    return ellipsoid(both, (57, -37, -36), (7.5, 16, 30))


def sternomastoid(both: Points) -> Array:
    """From the mastoid to the breastbone; x counted from the midline."""
    share = np.clip((-12 - both[2]) / 130, 0, 1)
    tube = column(both, (59 - 34 * share, 26 - 70 * share), (7.0, 13.0))
    return np.asarray(tube + np.maximum(both[2] + 8, 0))


def paint_body(canvas: Canvas, anatomy: Anatomy) -> None:
    """Skin, fat, ears, and the muscles that fill most of a head and neck."""
    skin, both = canvas.fields["skin"], mirrored(canvas.points)
    ear = ellipsoid((both[0] - 0.3 * (both[1] - 4), *both[1:]), (76, 6, 4), (3.5, 14, 27))
    canvas.paint(intersection(ear, skin - 14), "skin")
    canvas.paint(skin, "skin")
    canvas.paint(skin + 2, "fat")
    paint_neck(canvas.near((-75, -60, -200), (75, 80, 5)), anatomy)
    paint_jaw_muscles(canvas.near((-85, -110, -100), (85, 5, 75)))
    paint_shoulders(canvas.near((-200, -60, -200), (200, 120, -95)), anatomy)


def paint_neck(canvas: Canvas, anatomy: Anatomy) -> None:
    """Muscles behind, beside and in front of the spine, and the sternomastoids."""
    both = mirrored(canvas.points)
    z = both[2]
    deep = canvas.fields["skin"] + 2 + anatomy.fat_mm
    spine = canal_y(z, anatomy)
    for x, back, radii in ((17, 27, (15, 14)), (26, 14, (13, 13)), (14, 45, (16, 6)), (38, 22, (9, 17))):
        canvas.paint(intersection(column(both, (float(x), spine + back), radii), deep + 1, z + 2), "muscle")
    canvas.paint(intersection(column(both, (9.0, spine - 32), (8.0, 5.0)), z + 6), "muscle")
    for x, back in ((33, -6), (41, 3)):
        canvas.paint(intersection(column(both, (float(x), spine + back), (6.0, 7.0)), z + 45), "muscle")
    canvas.paint(intersection(sternomastoid(both), deep), "muscle")


def paint_jaw_muscles(canvas: Canvas) -> None:
    """Masseter, both pterygoids, temporalis, cheek and lips."""
    skin, both = canvas.fields["skin"], mirrored(canvas.points)
    canvas.paint(masseter(both), "muscle")
    canvas.paint(ellipsoid(both, (37, -30, -36), (7, 14, 27)), "muscle")
    canvas.paint(ellipsoid(both, (36, -30, -2), (13, 15, 9)), "muscle")
    canvas.paint(intersection(ellipsoid(both, (66, -38, 26), (13, 34, 40)), skin + 3), "muscle")
    canvas.paint(intersection(ellipsoid(both, (45, -66, -40), (6, 22, 26)), skin + 4), "muscle")
    lips = intersection(np.abs(skin + 7) - 2.5, both[0] - 30, both[1] + 60, np.abs(both[2] + 50) - 20)
    canvas.paint(lips, "muscle")


def paint_shoulders(canvas: Canvas, anatomy: Anatomy) -> None:
    """Trapezius, rhomboids, deltoid and chest muscles, with fat between them."""
    both, deep = mirrored(canvas.points), canvas.fields["skin"] + 2 + anatomy.fat_mm
    for centre, radii in (
        ((52, 44, -146), (62, 14, 34)),
        ((34, 60, -150), (38, 12, 42)),
        ((112, 14, -158), (46, 30, 44)),
        ((62, 18, -158), (22, 16, 30)),
        ((60, -26, -164), (50, 16, 26)),
    ):
        canvas.paint(intersection(ellipsoid(both, centre, radii), deep), "muscle")


def paint_throat(canvas: Canvas) -> None:
    """Tongue, floor of the mouth, pharynx, hyoid, voice box, windpipe, gullet and thyroid."""
    canvas = canvas.near((-62, -100, -200), (62, 25, 10))
    points = canvas.points
    y, z = points[1:]
    both = mirrored(points)
    canvas.paint(ellipsoid(points, (0, -50, -55), (30, 33, 22)), "muscle")
    canvas.paint(ellipsoid(points, (0, -56, -78), (26, 26, 10)), "muscle")
    canvas.paint(capsule(both, (9, -76, -82), (16, -46, -90), (6, 5)), "muscle")
    canvas.paint(capsule(both, (54, 6, -22), (40, -12, -72), (4, 4)), "muscle")
    front = profile(z, (0, -33), (-45, -24), (-70, -24), (-95, -36), (-130, -30))
    wide = profile(z, (4, 10), (-25, 13), (-50, 10), (-75, 15), (-92, 9), (-104, 5), (-112, 8), (-140, 9))
    deep = profile(z, (4, 9), (-25, 8), (-50, 7), (-75, 8), (-92, 9), (-104, 9), (-112, 9), (-140, 9))
    tube = intersection(column(points, (0.0, front), (wide, deep)), z - 4)
    canvas.paint(intersection(tube - 5, z - 2), "mucosa")
    shield = intersection(np.abs(tube - 5) - 1.8, np.abs(z + 104) - 11, y - front - 6)
    canvas.paint(shield, "cartilage", hu=220)
    hyoid = intersection(np.abs(tube - 7) - 2.2, np.abs(z + 88) - 3, y - front - 4)
    canvas.paint(hyoid, "bone", hu=420)
    lobe = column(both, (15.0, front + 3), (8.0, 11.0)) + np.maximum(np.abs(z + 122) - 9, 0)
    canvas.paint(lobe, "thyroid")
    canvas.paint(tube, "air")
    canvas.paint(ellipsoid(points, (0, -62, -38), (22, 24, 2.5)), "air")
    canvas.paint(column(points, (0.0, front + 20), (9.0, 4.5)) + np.maximum(z + 100, 0), "mucosa")


def paint_vessels(canvas: Canvas, anatomy: Anatomy) -> None:
    """Carotid artery and jugular vein on both sides, the vein through the parotid, and lymph nodes."""
    canvas = canvas.near((-65, -85, -200), (65, 25, 10))
    points = canvas.points
    z = points[2]
    both = mirrored(points)
    x = profile(z, (10, 26), (-60, 27), (-130, 24))
    y = profile(z, (10, -6), (-60, -10), (-130, -12))
    for right, back, radius in ((0, 0, 3.2), (7, 5, 5.0)):
        tube = column(both, (x + right, y + back), (radius, radius))
        canvas.paint(tube + np.maximum(z, 0), "vessel")
    canvas.paint(capsule(both, (53, -8, -4), (46, -14, -62), (2.2, 2.6)), "vessel")
    for centre, radii in anatomy.nodes_mm:
        canvas.paint(ellipsoid(points, centre, radii), "node")


def paint_cavities(canvas: Canvas) -> None:
    """Eyes in their fat, nose with septum and turbinates, and the sinuses."""
    canvas = canvas.near((-55, -110, -30), (55, -25, 50))
    points, skin, inside = canvas.points, canvas.fields["skin"], canvas.fields["cavity"]
    x, y, z = points
    both = mirrored(points)
    canvas.paint(intersection(ellipsoid(both, (31, -72, 24), (18, 27, 17)), skin + 2), "fat")
    canvas.paint(capsule(both, (32, -68, 24), (18, -42, 26), (2.4, 2.2)), "muscle")
    canvas.paint(capsule(both, (40, -72, 26), (20, -44, 27), (2.4, 2.4)), "muscle")
    canvas.paint(capsule(both, (20, -74, 25), (17, -44, 26), (2.4, 2.4)), "muscle")
    canvas.paint(ellipsoid(both, (32, -80, 24), (13, 13, 13)), "mucosa")
    canvas.paint(ellipsoid(both, (32, -80, 24), (11.5, 11.5, 11.5)), "vitreous")
    canvas.paint(ellipsoid(both, (32, -88, 24), (4.5, 2.2, 4.5)), "lens")
    canvas.paint(rounded_box((x, y + 70, z + 4), (15, 32, 22), 10), "air")
    canvas.paint(rounded_box((x, y + 68, z + 4), (1.2, 30, 22), 1), "mucosa")
    canvas.paint(ellipsoid(both, (9, -66, -12), (3.4, 24, 5)), "mucosa")
    canvas.paint(ellipsoid(both, (9, -64, 4), (3, 20, 4)), "mucosa")
    canvas.paint(ellipsoid(both, (28, -62, -8), (15, 17, 16)), "air")
    ethmoid = rounded_box((both[0] - 7, y + 66, z - 24), (5.5, 20, 14), 4)
    canvas.paint(intersection(ethmoid, 2 - inside), "air cells")
    canvas.paint(ellipsoid(points, (0, -42, 13), (13, 11, 8)), "air")


def paint_glands(canvas: Canvas, anatomy: Anatomy) -> None:
    """Glands with lobules; where surgery took one, fat stays."""
    for name in GLANDS:
        side = SIDES[name[-1]]
        here = canvas.near((min(side * 8, side * 90), -75, -110), (max(side * 8, side * 90), 35, 20))
        distance = gland(here, name, anatomy)
        if name in anatomy.removed:
            here.paint(distance, "fat")
            continue
        material, swing_hu = ("parotid", 10.0) if name[0] == "P" else ("submandibular", 6.0)
        here.paint(distance, material, hu=canvas.tone[material] + swing_hu * here.fields["texture"])
        here.mark(distance, VALUES[name])
