"""The side check in all orientations of a file."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from medattn.geometry import Geometry
from medattn.labels import Organ
from medattn.sides import side_errors

ORGANS = {
    1: Organ("Eye_L", side="left", pair="Eye_R"),
    2: Organ("Eye_R", side="right", pair="Eye_L"),
    3: Organ("Brain"),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_left_is_the_patients_left_in_every_orientation(order: tuple[int, ...], swapped: bool) -> None:
    """x of LPS grows to the left: the larger x is the left organ, however the axes are stored."""
    for signs in product((1, -1), repeat=3):
        label = np.zeros((10, 6, 5), np.uint8)
        label[7, 2, 2], label[2, 2, 2], label[4, 4, 4] = (2, 1, 3) if swapped else (1, 2, 3)
        stored = np.flip(label, [a for a in range(3) if signs[a] < 0]).transpose(order)
        affine = np.eye(4)
        for column, axis in enumerate(order):
            affine[:3, column] = 2.0 * signs[axis] * np.eye(3)[axis]
        found = side_errors(stored, Geometry(stored.shape, affine), ORGANS)
        if not swapped:
            assert found == []
            continue
        assert len(found) == 1
        assert found[0].startswith("Eye_L lies 10.0 mm to the patient's right of Eye_R")


def test_a_lone_organ_and_a_float_map_are_no_error() -> None:
    label = np.zeros((6, 3, 3), np.float32)
    label[1, 1, 1] = 1
    assert side_errors(label, Geometry((6, 3, 3), np.eye(4)), ORGANS) == []
    assert side_errors(np.zeros((6, 3, 3), np.uint8), Geometry((6, 3, 3), np.eye(4)), ORGANS) == []
