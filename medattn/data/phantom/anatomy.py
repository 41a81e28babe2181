"""One patient's random build and one scan's random pose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medattn.data.phantom.shapes import Points
from medattn.geometry import Array

ORGANS = {
    1: "Brainstem",
    2: "SpinalCord",
    3: "Bone_Mandible",
    4: "Parotid_L",
    5: "Parotid_R",
    6: "Glnd_Submand_L",
    7: "Glnd_Submand_R",
}
"""Label values and TG-263 names."""
VALUES = {name: value for value, name in ORGANS.items()}
GLANDS = ("Parotid_L", "Parotid_R", "Glnd_Submand_L", "Glnd_Submand_R")
SIDES = {"L": 1.0, "R": -1.0}
"""Sign of x on a side: LPS, so the patient's left is positive."""

Triple = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A patient in the anatomical frame: LPS axes in mm, origin at the front of the foramen magnum.

    scale: size relative to the standard adult along x, y, z. fat_mm: depth of fat under the skin.
    lordosis_mm: how far the cervical spine bows forward. canal_mm: added to the spinal canal's radii.
    ventricles: their size relative to the standard. gland_scale, gland_shift_mm: radii and place of each
    gland relative to the standard. removed: glands that surgery took. tone: HU of materials that differ
    between patients. waves: [M, 7] of a smooth warp: wave vector (3), phase, displacement in mm (3).
    missing_teeth: numbers 0 to 27. fillings_mm: metal in teeth. nodes_mm: centre and radii of lymph nodes.
    """

    scale: Triple
    fat_mm: float
    lordosis_mm: float
    canal_mm: float
    ventricles: float
    gland_scale: dict[str, Triple]
    gland_shift_mm: dict[str, Triple]
    removed: frozenset[str]
    tone: dict[str, float]
    waves: Array
    missing_teeth: frozenset[int]
    fillings_mm: tuple[Triple, ...]
    nodes_mm: tuple[tuple[Triple, Triple], ...]

    @classmethod
    def draw(cls, rng: np.random.Generator, removed: frozenset[str]) -> Anatomy:
        """A random adult."""
        common = {
            "P": np.clip(rng.normal(1, 0.07), 0.88, 1.13),
            "G": np.clip(rng.normal(1.03, 0.06), 0.92, 1.14),
        }
        return cls(
            scale=_triple(rng.normal(1, 0.025) * rng.normal(1, 0.02, 3)),
            fat_mm=float(rng.uniform(3, 9)),
            lordosis_mm=float(rng.normal(0, 3)),
            canal_mm=float(rng.normal(0, 0.5)),
            ventricles=float(rng.uniform(0.75, 1.3)),
            gland_scale={name: _triple(common[name[0]] * rng.normal(1, 0.035, 3)) for name in GLANDS},
            gland_shift_mm={name: _triple(rng.normal(0, 1.2, 3)) for name in GLANDS},
            removed=removed,
            tone=_tone(rng),
            waves=_waves(rng),
            missing_teeth=frozenset(int(n) for n in rng.choice(28, rng.integers(0, 10), replace=False)),
            fillings_mm=_fillings(rng),
            nodes_mm=tuple(_node(rng) for _ in range(rng.integers(4, 12))),
        )

    def warp(self, points: Points) -> Points:
        """World -> anatomical coordinates: undo the patient's size, then add a smooth displacement."""
        scaled = [p / s for p, s in zip(points, self.scale, strict=True)]
        moved = [p.copy() for p in scaled]
        for wave in self.waves.tolist():
            swing = np.cos(scaled[0] * wave[0] + scaled[1] * wave[1] + scaled[2] * wave[2] + wave[3])
            for axis in range(3):
                moved[axis] += wave[4 + axis] * swing
        return moved[0], moved[1], moved[2]


@dataclass(frozen=True, eq=False)
class Pose:
    """How the patient lies in the scanner: a rotation about the skull base [3, 3] and a shift in mm."""

    rotation: Array
    shift_mm: Array

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Pose:
        """A nod about x, a tilt about y and a turn about z of a few degrees; a shift of a few mm."""
        nod, tilt, turn = np.deg2rad(np.clip(rng.normal(0, [4.0, 2.5, 3.5]), -9, 9))
        return cls(_rotation(0, nod) @ _rotation(1, tilt) @ _rotation(2, turn), rng.normal(0, [4, 4, 3]))

    def to_patient(self, points: Points) -> Points:
        """Scanner coordinates -> the patient's own frame."""
        moved = [p - float(s) for p, s in zip(points, self.shift_mm, strict=True)]
        x, y, z = (sum(float(self.rotation[a, b]) * moved[a] for a in range(3)) for b in range(3))
        return np.asarray(x), np.asarray(y), np.asarray(z)

    def to_scanner(self, points_mm: Array) -> Array:
        """The patient's own frame [N, 3] -> scanner coordinates [N, 3]."""
        return np.asarray(points_mm @ self.rotation.T + self.shift_mm)


def _tone(rng: np.random.Generator) -> dict[str, float]:
    """HU that differ between patients: fatty glands, mineral content, contrast medium in one in two."""
    contrast = float(rng.uniform(0.6, 1.2)) if rng.random() < 0.5 else 0.0
    density = float(rng.normal(1, 0.08))
    return {
        "fat": float(rng.normal(-102, 4)),
        "muscle": float(rng.normal(55, 3)) + 6 * contrast,
        "vessel": 45 + 130 * contrast,
        "mucosa": 45 + 20 * contrast,
        "node": 42 + 30 * contrast,
        "thyroid": float(rng.normal(100, 12)) + 40 * contrast,
        "parotid": float(rng.uniform(-18, 14)) + 12 * contrast,
        "submandibular": float(rng.normal(36, 4)) + 25 * contrast,
        "brainstem": 33 + 3 * contrast,
        "spongy bone": 280 * density,
        "diploe": 520 * density,
        "bone": 1100 * density,
    }


def _waves(rng: np.random.Generator, count: int = 8) -> Array:
    length_mm = rng.uniform(90, 220, count)
    direction = rng.normal(0, 1, (count, 3))
    direction *= (2 * np.pi / length_mm / np.linalg.norm(direction, axis=1))[:, None]
    return np.hstack([direction, rng.uniform(0, 2 * np.pi, (count, 1)), rng.normal(0, 0.9, (count, 3))])


def _fillings(rng: np.random.Generator) -> tuple[Triple, ...]:
    """None in four patients of ten, else up to four, on the dental arches."""
    count = int(rng.choice([0, 0, 1, 2, 4]))
    angles, jaws = rng.uniform(0.5, 1.25, count) * rng.choice([-1, 1], count), rng.integers(0, 2, count)
    places = [
        (40 * np.sin(angle), -26 - 57 * np.cos(angle), -54.0 + 10 * jaw)
        for angle, jaw in zip(angles, jaws, strict=True)
    ]
    return tuple(_triple(place) for place in places)


def _node(rng: np.random.Generator) -> tuple[Triple, Triple]:
    """A lymph node along the jugular chain or under the jaw: a small thing that looks like a gland."""
    side = float(rng.choice([-1, 1]))
    if rng.random() < 0.3:
        centre = (side * rng.uniform(8, 22), rng.uniform(-72, -62), rng.uniform(-94, -88))
    else:
        z = rng.uniform(-125, -50)
        centre = (side * rng.uniform(36, 48), rng.uniform(-14, 4), z)
    return _triple(centre), _triple(rng.uniform(2.5, 5.5) * rng.uniform(0.8, 1.3, 3))


def _rotation(axis: int, angle: float) -> Array:
    first, second = (a for a in range(3) if a != axis)
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def _triple(values: Array | tuple[float, ...]) -> Triple:
    a, b, c = (float(v) for v in values)
    return a, b, c
