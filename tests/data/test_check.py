"""The dataset doctor: each fault is found with file, found and expected, all of them in one run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medattn.data.cases import read_cases
from medattn.data.check import DATA_SET, Checkup, Finding, check_cases, check_folder, require_clean
from medattn.data.fingerprint import fingerprint, voxel_counts
from medattn.data.repair import complete_contoured
from medattn.errors import InputError
from medattn.geometry import Array, Geometry
from medattn.io import Volume, write_volume
from medattn.labels import LabelSet, Organ

SIZE = (10, 9, 8)
LABELS = {1: "Brainstem", 2: "LeftParotid", 3: "RightParotid"}
LABEL_SET = LabelSet(
    "test",
    (
        Organ("Brainstem"),
        Organ("Parotid_L", ("LeftParotid",), side="left", pair="Parotid_R"),
        Organ("Parotid_R", ("RightParotid",), side="right", pair="Parotid_L"),
    ),
)


def grid(*, shift_mm: float = 0.0) -> Geometry:
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[0, 3] = shift_mm
    return Geometry(SIZE, affine)


def scan(seed: int) -> Array:
    hu = np.full(SIZE, -1000, dtype=np.int16)
    hu[2:8, 2:7, :] = np.random.default_rng(seed).integers(-100, 100, (6, 5, 8))
    return hu


def organs() -> Array:
    label = np.zeros(SIZE, dtype=np.uint8)
    label[5, 4, 2:5] = 1
    label[7, 4, 2:4] = 2  # axes run L, P, S: a larger index lies further left
    label[2, 4, 2:4] = 3
    return label


def write_case(root: Path, name: str, image: Array, label: Array, *, label_shift_mm: float = 0.0) -> None:
    (root / name).mkdir(parents=True)
    write_volume(root / name / "image.nii.gz", Volume(image, grid()))
    write_volume(root / name / "label.nii.gz", Volume(label, grid(shift_mm=label_shift_mm)))


def write_index(root: Path, splits: dict[str, str], contoured: dict[str, list[str]] | None = None) -> None:
    entries = [
        {"case": name, "split": split, "contoured": (contoured or {}).get(name, list(LABELS.values()))}
        for name, split in splits.items()
    ]
    (root / "labels.json").write_text(json.dumps(LABELS))
    (root / "cases.json").write_text(json.dumps(entries))


def healthy(root: Path) -> Path:
    for seed, name in enumerate(("a", "b", "c")):
        write_case(root, name, scan(seed), organs())
    write_index(root, {"a": "train", "b": "train", "c": "validation"})
    return root


def errors(checkup: Checkup) -> list[Finding]:
    return [f for f in checkup.findings if f.severity == "error"]


def test_a_healthy_folder_has_no_findings_and_every_fingerprint(tmp_path: Path) -> None:
    seen: list[str] = []
    checkup = check_folder(healthy(tmp_path), LABEL_SET, on_case=seen.append)
    assert checkup.findings == ()
    assert [f.case for f in checkup.fingerprints] == ["a", "b", "c"]
    assert sorted(seen) == ["a", "b", "c"]
    require_clean(checkup.findings)


def test_a_folder_broken_in_twelve_ways_is_described_in_one_run(tmp_path: Path) -> None:
    label, names = organs(), [f"case{n:02d}" for n in range(12)]
    swapped = np.choose(label, [0, 1, 3, 2]).astype(np.uint8)
    unknown = label.copy()
    unknown[0, 0, :5] = 77
    fractions = label.astype(np.float32) * 0.5
    writers: list[Callable[[str], Any]] = [
        lambda n: (write_case(tmp_path, n, scan(0), label), (tmp_path / n / "image.nii.gz").unlink()),
        lambda n: (write_case(tmp_path, n, scan(1), label), (tmp_path / n / "label.nii.gz").write_bytes(b"")),
        lambda n: (write_case(tmp_path, n, scan(2), label), halve(tmp_path / n / "image.nii.gz")),
        lambda n: write_case(tmp_path, n, scan(3), label, label_shift_mm=1.5),
        lambda n: write_case(tmp_path, n, scan(4), unknown),
        lambda n: write_case(tmp_path, n, scan(5), fractions),
        lambda n: write_case(tmp_path, n, scan(6), label),
        lambda n: write_case(tmp_path, n, scan(7), swapped),
        lambda n: write_case(tmp_path, n, np.full(SIZE, 40, np.int16), label),
        lambda n: write_case(tmp_path, n, scan(9) + 3000, label),
        lambda n: write_case(tmp_path, n, scan(10), label),
        lambda n: write_case(tmp_path, n, scan(10), label),
    ]
    for name, writer in zip(names, writers, strict=True):
        writer(name)
    splits = dict.fromkeys(names, "train") | {names[11]: "validation"}
    write_index(tmp_path, splits, {names[6]: ["Brainstem", "RightParotid"]})
    (tmp_path / "labels.json").write_text(json.dumps(LABELS | {4: "Larinx"}))
    (tmp_path / "cases.json").write_text(
        json.dumps([*json.loads((tmp_path / "cases.json").read_text()), {"case": "no contoured"}])
    )
    found = errors(check_folder(tmp_path, LABEL_SET))
    expected = [
        (DATA_SET, "entry 12", "'contoured'"),
        (DATA_SET, "labels.json", "'Larinx' is not in label set test"),
        (names[0], "image.nii.gz", "no such file"),
        (names[1], "label.nii.gz", "empty file"),
        (names[2], "image.nii.gz", "truncated or corrupt"),
        (names[3], "label.nii.gz", "origin [1.5, 0.0, 0.0] vs [0.0, 0.0, 0.0]"),
        (names[4], "label.nii.gz", "unknown label values 77 (5 voxels), expected 0 or one of 1, 2, 3, 4"),
        (names[5], "label.nii.gz", "no whole number, such as 1.5"),
        (names[6], "label.nii.gz", "2 voxels of LeftParotid, which contoured in"),
        (names[7], "label.nii.gz", "Parotid_L lies 10.0 mm to the patient's right of Parotid_R"),
        (names[8], "image.nii.gz", "every voxel is 40"),
        (names[9], "image.nii.gz", "none from -200 to 200"),
        (names[11], f"{names[10]}/image.nii.gz", "a leak between train and validation"),
    ]
    assert len(found) == len(expected)
    for finding, (case, file, part) in zip(found, expected, strict=True):
        assert finding.case == case
        assert file in finding.cause
        assert part in finding.cause
        assert finding.repair
    with pytest.raises(InputError) as caught:
        require_clean(found)
    assert len(caught.value.problems) == len(expected)


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_case_with_two_broken_files_and_a_missing_folder_is_named_twice(tmp_path: Path) -> None:
    write_index(healthy(tmp_path), {"a": "train", "gone": "train", "c": "validation"})
    found = errors(check_folder(tmp_path, LABEL_SET))
    assert [(f.case, Path(f.cause.split(":")[0]).name) for f in found] == [
        ("gone", "image.nii.gz"),
        ("gone", "label.nii.gz"),
    ]


def test_legal_states_are_notes_that_stop_nothing(tmp_path: Path) -> None:
    root = healthy(tmp_path)
    empty = np.where(organs() == 1, 0, organs()).astype(np.uint8)
    write_case(root, "d", scan(8), empty)
    write_case(root, "stray", scan(9), organs())
    write_index(root, {"a": "train", "b": "train", "c": "validation", "d": "train"})
    checkup = check_folder(root, LABEL_SET)
    assert [(f.case, f.severity) for f in checkup.findings] == [("d", "note"), ("stray", "note")]
    assert "contoured and empty" in checkup.findings[0].cause
    assert "does not list" in checkup.findings[1].cause
    require_clean(checkup.findings)


def test_identical_images_in_one_split_are_a_warning(tmp_path: Path) -> None:
    root = healthy(tmp_path)
    write_case(root, "twin", scan(0), organs())
    write_index(root, {"a": "train", "twin": "train", "c": "validation"})
    severities = [f.severity for f in check_folder(root, LABEL_SET).findings if f.case == "twin"]
    assert severities == ["warning"]


def test_numbers_with_an_offset_are_a_warning(tmp_path: Path) -> None:
    root = healthy(tmp_path)
    write_case(root, "offset", scan(20) + 1024, organs())
    write_index(root, {"a": "train", "b": "train", "offset": "train", "c": "validation"})
    (finding,) = check_folder(root, LABEL_SET).findings
    assert (finding.case, finding.severity) == ("offset", "warning")
    assert "expected air near -1000 HU" in finding.cause


def test_nan_in_an_image_is_an_error(tmp_path: Path) -> None:
    root, image = healthy(tmp_path), scan(20).astype(np.float32)
    image[0, 0, 0] = np.nan
    write_case(root, "nan", image, organs())
    write_index(root, {"a": "train", "nan": "train", "c": "validation"})
    checkup = check_folder(root, LABEL_SET)
    assert "no finite number" in errors(checkup)[0].cause
    assert [f.case for f in checkup.fingerprints] == ["a", "c"]


@pytest.mark.parametrize("missing", ["train", "validation"])
def test_a_split_that_nobody_is_in_is_an_error(tmp_path: Path, missing: str) -> None:
    other = {"train": "validation", "validation": "train"}[missing]
    write_index(healthy(tmp_path), dict.fromkeys("abc", other))
    (finding,) = check_folder(tmp_path, LABEL_SET).findings
    assert f"no case has split '{missing}'" in finding.cause


def test_two_names_for_one_organ_are_an_error(tmp_path: Path) -> None:
    healthy(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps(LABELS | {4: "Parotid_L"}))
    (finding,) = check_folder(tmp_path, LABEL_SET).findings
    assert "'LeftParotid' and 'Parotid_L' are both Parotid_L" in finding.cause


def test_repair_lists_drawn_organs_and_keeps_all_other_fields(tmp_path: Path) -> None:
    write_index(healthy(tmp_path), {"a": "train", "b": "train", "c": "validation"}, {"b": ["RightParotid"]})
    path = tmp_path / "cases.json"
    entries = json.loads(path.read_text())
    entries[1]["scanner"] = "kept"
    path.write_text(json.dumps(entries))
    checkup = check_folder(tmp_path, LABEL_SET)
    assert len(errors(checkup)) == 2
    assert all("--repair" in f.repair for f in errors(checkup))
    assert complete_contoured(tmp_path, checkup.fingerprints) == {"b": ("Brainstem", "LeftParotid")}
    assert json.loads(path.read_text())[1]["scanner"] == "kept"
    assert check_folder(tmp_path, LABEL_SET).findings == ()
    assert complete_contoured(tmp_path, checkup.fingerprints) == {}


def test_an_exception_in_the_caller_stops_the_pass(tmp_path: Path) -> None:
    def stop(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_cases(read_cases(healthy(tmp_path)), LABEL_SET, on_case=stop)


def test_a_fingerprint_counts_in_canonical_axes() -> None:
    """A file stored as S, R, P must give the size and spacing of L, P, S."""
    affine = np.array([[0, -2.0, 0, 0], [0, 0, 3.0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])
    geometry = Geometry((4, 6, 7), affine)
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 2000, (4, 6, 7)).astype(np.int16)
    label = rng.integers(0, 5, (4, 6, 7)).astype(np.uint8)
    got = fingerprint("x", Volume(hu, geometry), Volume(label, geometry), {1: "A", 2: "B", 3: "C", 9: "D"})
    inside = hu[(label >= 1) & (label <= 3)].astype(np.float64)
    assert (got.size, got.spacing_mm) == ((6, 7, 4), (2.0, 3.0, 5.0))
    assert got.organ_voxels == {
        name: int((label == v).sum()) for v, name in ((1, "A"), (2, "B"), (3, "C"), (9, "D"))
    }
    assert got.hu_range == pytest.approx(tuple(np.quantile(inside, (0.005, 0.995))))


def test_an_empty_label_map_has_no_range_of_ct_numbers() -> None:
    volume = Volume(np.zeros(SIZE, np.uint8), grid())
    assert fingerprint("x", volume, volume, {1: "A"}).hu_range is None


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_voxel_counts_do_not_depend_on_type_or_layout(dtype: type) -> None:
    array = np.random.default_rng(1).integers(0, 9, (5, 7, 3)).astype(dtype)
    expected = {value: int((array == value).sum()) for value in range(9)}
    assert (
        voxel_counts(array) == voxel_counts(np.asfortranarray(array)) == voxel_counts(array[::-1]) == expected
    )


@pytest.mark.shared
@pytest.mark.slow
def test_the_real_cases_are_clean(shared_data: Path) -> None:
    folder = read_cases(shared_data / "hn_ct")
    checkup = check_cases(folder, LabelSet.load())
    assert errors(checkup) == []
    volumes = {e["case"]: e["volume_cc"] for e in json.loads((folder.root / "cases.json").read_text())}
    for got in checkup.fingerprints:
        for organ, ml in volumes[got.case].items():
            measured = got.organ_voxels[organ] * math.prod(got.spacing_mm) / 1000
            assert measured == pytest.approx(ml, rel=0.01, abs=0.01)
