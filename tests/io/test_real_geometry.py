"""The geometry of every real scan: image and label on one grid, and sides where the patient has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medattn.geometry import Array
from medattn.io import read_geometry, read_volume


def centroid_mm(path: Path, value: int) -> Array:
    label = read_volume(path)
    return label.geometry.to_lps(np.argwhere(label.array == value).mean(axis=0))


@pytest.mark.shared
def test_all_images_and_labels_of_hn_ct_share_a_grid(shared_data: Path) -> None:
    cases = sorted(folder for folder in (shared_data / "hn_ct").iterdir() if folder.is_dir())
    assert len(cases) == 83
    for case in cases:
        image, label = (read_geometry(case / f"{name}.nii.gz") for name in ("image", "label"))
        assert image.difference(label) is None, case.name
        assert image.axis_codes() == "LPS", case.name


@pytest.mark.shared
@pytest.mark.slow
def test_left_parotids_of_hn_ct_lie_left_of_right_ones(shared_data: Path) -> None:
    values = {name: int(v) for v, name in json.loads((shared_data / "hn_ct/labels.json").read_text()).items()}
    for entry in json.loads((shared_data / "hn_ct/cases.json").read_text()):
        if {"LeftParotid", "RightParotid"} <= set(entry["contoured"]):
            path = shared_data / "hn_ct" / entry["case"] / "label.nii.gz"
            left, right = (centroid_mm(path, values[name]) for name in ("LeftParotid", "RightParotid"))
            assert left[0] > right[0] + 40, entry["case"]  # LPS x grows to the patient's left


@pytest.mark.shared
def test_both_readers_share_a_grid_and_see_the_left_eye_on_the_left(shared_data: Path) -> None:
    folder = shared_data / "hn_oar_two_readers"
    values = {name: int(v) for v, name in json.loads((folder / "labels.json").read_text()).items()}
    cases = sorted(case for case in folder.iterdir() if case.is_dir())
    assert len(cases) == 35
    for number, case in enumerate(cases):
        first, second = (
            read_geometry(case / f"{reader}.nii.gz") for reader in ("oncologist", "radiographer")
        )
        assert first.difference(second) is None, case.name
        if number % 12 == 0:
            left, right = (
                centroid_mm(case / "oncologist.nii.gz", values[name]) for name in ("Orbit-Lt", "Orbit-Rt")
            )
            assert left[0] > right[0] + 40, case.name
