"""Largest components."""

from __future__ import annotations

import numpy as np

from medattn.inference.postprocess import keep_largest


def test_specks_go_and_the_organ_stays() -> None:
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[1:5, 1:5, 1:5] = 1
    labels[10, 10, 10] = 1
    labels[6:8, 6:8, 6:8] = 2
    labels[11, 0, 0] = 3
    before = labels.copy()
    cleaned = keep_largest(labels, (1, 3, 4))
    assert (cleaned == 1).sum() == 64
    assert cleaned[10, 10, 10] == 0
    assert (cleaned == 2).sum() == 8
    assert cleaned[11, 0, 0] == 3
    assert np.array_equal(labels, before)


def test_voxels_that_touch_by_a_corner_are_one_component() -> None:
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = 1
    assert (keep_largest(labels, (1,)) == 1).sum() == 2
