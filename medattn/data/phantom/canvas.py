"""What a voxel is made of: materials, and a canvas on which shapes are painted with soft edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from medattn.data.phantom.shapes import Points
from medattn.geometry import Array

MATERIALS = {
    "air": -1000.0,
    "couch": -250.0,
    "foam": -940.0,
    "mask": -60.0,
    "skin": 15.0,
    "fat": -100.0,
    "muscle": 55.0,
    "vessel": 45.0,
    "mucosa": 45.0,
    "cartilage": 110.0,
    "thyroid": 100.0,
    "parotid": 5.0,
    "submandibular": 40.0,
    "grey matter": 38.0,
    "white matter": 29.0,
    "brainstem": 33.0,
    "cord": 35.0,
    "node": 45.0,
    "csf": 8.0,
    "vitreous": 10.0,
    "lens": 85.0,
    "disc": 85.0,
    "spongy bone": 280.0,
    "diploe": 520.0,
    "bone": 1100.0,
    "dentine": 1500.0,
    "enamel": 2500.0,
    "metal": 3071.0,
    "air cells": -350.0,
}
"""Mean HU of each material without contrast medium; docs in data_cards/phantom.md name the sources."""

NUMBER = {name: number for number, name in enumerate(MATERIALS)}


@dataclass(eq=False)
class Canvas:
    """A volume that is being painted. All arrays are [i, j, k] on one grid.

    points: anatomical coordinates of the voxel centres in mm. edge_mm: width of a painted edge, about one
    voxel: partial volume. tone: HU that replace those of MATERIALS in this patient. hu: float32.
    material: uint8, values of NUMBER, the last material that covered more than half of the voxel.
    label: uint8, organ values. fields: what several painters need: distances to skin, cavity and jaw in mm,
    and a random texture.
    """

    points: Points
    edge_mm: float
    tone: dict[str, float]
    hu: Array
    material: Array
    label: Array
    fields: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def empty(cls, points: Points, edge_mm: float, tone: dict[str, float]) -> Canvas:
        """Air everywhere."""
        shape = points[0].shape
        hu = np.full(shape, MATERIALS["air"], dtype=np.float32)
        return cls(points, edge_mm, tone, hu, np.zeros(shape, np.uint8), np.zeros(shape, np.uint8))

    def near(self, low_mm: Sequence[float], high_mm: Sequence[float]) -> Canvas:
        """The part of the canvas that holds an anatomical box: views, so painting there paints here."""
        box = tuple(
            self._within(axis, low, high)
            for axis, (low, high) in enumerate(zip(low_mm, high_mm, strict=True))
        )
        x, y, z = (coordinate[box] for coordinate in self.points)
        fields = {name: values[box] for name, values in self.fields.items()}
        views = (self.hu[box], self.material[box], self.label[box])
        return Canvas((x, y, z), self.edge_mm, self.tone, *views, fields)

    def paint(self, distance_mm: Array, material: str, hu: Array | float | None = None) -> None:
        """Cover the inside of a signed distance with a material, `hu` in place of its mean where given."""
        value = self.tone.get(material, MATERIALS[material]) if hu is None else hu
        cover = np.clip(0.5 - distance_mm / self.edge_mm, 0, 1)
        self.hu += cover * (value - self.hu)
        self.material[distance_mm < 0] = NUMBER[material]

    def mark(self, distance_mm: Array, value: int) -> None:
        """Give the inside of a signed distance to an organ, where no other organ was before."""
        self.label[(distance_mm < 0) & (self.label == 0)] = value

    def _within(self, axis: int, low_mm: float, high_mm: float) -> slice:
        """Index range along one axis in which some voxel lies between two anatomical coordinates."""
        others = tuple(a for a in range(3) if a != axis)
        least, most = self.points[axis].min(others), self.points[axis].max(others)
        hit = np.flatnonzero((most >= low_mm) & (least <= high_mm))
        return slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else slice(0, 0)
