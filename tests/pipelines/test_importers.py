"""Importers keep voxels, geometry, names and what "contoured" means; a bad source leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medattn.data.cases import read_cases
from medattn.data.check import check_folder
from medattn.errors import InputError
from medattn.geometry import Array, Geometry
from medattn.io import Volume, read_volume, write_volume
from medattn.labels import LabelSet
from medattn_pipelines.importers import ImportSummary, import_cases

LABEL_SET = LabelSet.load("hn_oar")
SIZE = (11, 9, 7)
OBLIQUE = np.array([[0, -2.0, 0, 30], [1.5, 0, 0, -20], [0, 0, 3.0, 10], [0, 0, 0, 1]])
GEOMETRY = Geometry(SIZE, OBLIQUE)
OPENKBP = {
    1: "Brainstem",
    2: "SpinalCord",
    3: "RightParotid",
    4: "LeftParotid",
    5: "Esophagus",
    6: "Larynx",
    7: "Mandible",
}


def scan(seed: int) -> Array:
    return np.random.default_rng(seed).integers(-1000, 1500, SIZE).astype(np.int16)


def box(*slices: slice, value: int = 1) -> Array:
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[slices] = value
    return mask


EMPTY = np.zeros(SIZE, dtype=np.uint8)
BRAINSTEM = box(slice(3, 6), slice(3, 6), slice(2, 5))
MANDIBLE = box(slice(5, 8), slice(3, 6), slice(2, 5))  # shares 9 voxels with the brainstem


def write(path: Path, array: Array, geometry: Geometry = GEOMETRY) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, Volume(array, geometry))


def run(kind: str, source: Path, out: Path, **options: Any) -> ImportSummary:
    return import_cases(kind, source, out, label_set=LABEL_SET, **options)


def refused(kind: str, source: Path, out: Path, **options: Any) -> tuple[str, ...]:
    """The problems of an import that must fail and leave nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(InputError) as caught:
        run(kind, source, out, **options)
    assert sorted(out.parent.iterdir()) == before
    return caught.value.problems


def masks_source(root: Path, suffix: str = ".nii.gz", folder: str = "") -> Path:
    for seed, name in enumerate(("p1", "p2", "p3")):
        write(root / name / f"ct{suffix}", scan(seed))
        write(root / name / folder / f"brain_stem{suffix}", BRAINSTEM)
        write(root / name / folder / f"Mandible{suffix}", MANDIBLE * np.uint8(255))
    write(root / "p1" / folder / f"Larynx{suffix}", EMPTY)
    return root


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd"])
@pytest.mark.parametrize("folder", ["", "segmentations", "structures"])
def test_one_file_per_organ(tmp_path: Path, suffix: str, folder: str) -> None:
    seen: list[tuple[str, int]] = []
    summary = run(
        "nifti",
        masks_source(tmp_path / "in", suffix, folder),
        tmp_path / "out",
        on_case=lambda name, total: seen.append((name, total)),
    )
    cases = read_cases(tmp_path / "out")
    assert cases == summary.folder
    assert seen == [("p1", 3), ("p2", 3), ("p3", 3)]
    value = {name: number for number, name in cases.labels.items()}
    assert set(value) == {"brain_stem", "Mandible", "Larynx"}, "names stay those of the source"
    assert set(cases.cases[0].contoured) == {"brain_stem", "Mandible", "Larynx"}, "an empty file was drawn"
    assert set(cases.cases[1].contoured) == {"brain_stem", "Mandible"}
    image, label = read_volume(cases.cases[1].image), read_volume(cases.cases[1].label)
    assert image.geometry.difference(GEOMETRY) is None
    assert label.geometry.difference(GEOMETRY) is None
    np.testing.assert_array_equal(image.array, scan(1))
    lower, upper = sorted(
        [("brain_stem", BRAINSTEM), ("Mandible", MANDIBLE)], key=lambda item: value[item[0]]
    )
    expected = np.where(lower[1] > 0, value[lower[0]], np.where(upper[1] > 0, value[upper[0]], 0))
    np.testing.assert_array_equal(label.array, expected)
    assert summary.overlaps == {"p1": 9, "p2": 9, "p3": 9}
    assert "27 voxels in 3 cases" in str(summary)


def test_different_spellings_of_one_organ_become_its_standard_name(tmp_path: Path) -> None:
    source = masks_source(tmp_path / "in")
    (source / "p2" / "brain_stem.nii.gz").rename(source / "p2" / "BrainStem.nii.gz")
    labels = run("nifti", source, tmp_path / "out").folder.labels
    assert set(labels.values()) == {"Brainstem", "Mandible", "Larynx"}


def test_organs_on_other_grids_are_all_listed_and_nothing_is_written(tmp_path: Path) -> None:
    source = masks_source(tmp_path / "in")
    moved = OBLIQUE.copy()
    moved[0, 3] += 2
    write(source / "p1" / "Mandible.nii.gz", MANDIBLE, Geometry(SIZE, moved))
    write(source / "p3" / "brain_stem.nii.gz", BRAINSTEM[:, :, :5], Geometry((11, 9, 5), OBLIQUE))
    write(source / "p3" / "Mandible.nii.gz", box(slice(3), value=1) + box(slice(2), value=4))
    (source / "p2" / "ct.nii.gz").write_bytes(b"")
    problems = refused("nifti", source, tmp_path / "out")
    assert len(problems) == 4
    text = "\n".join(sorted(problems))
    for part in (
        "p1/Mandible",
        "origin",
        "size 11 x 9 x 5",
        "expected 0 and one other",
        "p2/ct.nii.gz: empty",
    ):
        assert part in text


def test_unknown_organs_are_listed_with_suggestions_or_dropped_on_request(tmp_path: Path) -> None:
    source = masks_source(tmp_path / "in")
    write(source / "p1" / "Mandibel.nii.gz", MANDIBLE)
    write(source / "p2" / "spleen.nii.gz", MANDIBLE)
    problems = refused("nifti", source, tmp_path / "out")
    assert any("'Mandibel'" in p and "did you mean" in p for p in problems)
    assert any("'spleen'" in p for p in problems)
    assert "--drop-unknown" in problems[-1]
    summary = run("nifti", source, tmp_path / "out", drop_unknown=True)
    assert set(summary.dropped) == {"Mandibel", "spleen"}
    assert set(summary.folder.labels.values()) == {"brain_stem", "Mandible", "Larynx"}


def test_two_files_for_one_organ_are_refused(tmp_path: Path) -> None:
    source = masks_source(tmp_path / "in")
    write(source / "p1" / "Brainstem.nii.gz", BRAINSTEM)
    (problem,) = refused("nifti", source, tmp_path / "out")
    assert "are both Brainstem" in problem


def map_source(root: Path, layout: str) -> Path:
    label = BRAINSTEM * 2 + np.where(BRAINSTEM, 0, MANDIBLE) * 5
    for seed, name in enumerate(("p1", "p2")):
        map_ = label.astype(np.uint8) if name == "p1" else BRAINSTEM * np.uint8(2)
        paths = {
            "folders": (f"{name}/image.nii.gz", f"{name}/label.nrrd"),
            "siblings": (f"images/{name}.nrrd", f"labels/{name}.nii.gz"),
            "flat": (f"{name}_ct.nii.gz", f"{name}_seg.nii.gz"),
            "bare": (f"{name}.nii.gz", f"{name}-label.nii.gz"),
        }[layout]
        write(root / paths[0], scan(seed))
        write(root / paths[1], map_)
    (root / "labels.json").write_text(json.dumps({"2": "Brainstem", "5": "Mandible"}))
    return root


@pytest.mark.parametrize("layout", ["folders", "siblings", "flat", "bare"])
def test_label_maps_keep_values_and_names(tmp_path: Path, layout: str) -> None:
    cases = run("nifti", map_source(tmp_path / "in", layout), tmp_path / "out").folder
    assert cases.labels == {2: "Brainstem", 5: "Mandible"}
    assert {c.name: c.contoured for c in cases.cases} == {
        "p1": ("Brainstem", "Mandible"),
        "p2": ("Brainstem",),
    }
    label = read_volume(cases.cases[0].label).array
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label == 2, BRAINSTEM > 0)
    np.testing.assert_array_equal(label == 5, (MANDIBLE > 0) & (BRAINSTEM == 0))


def test_the_caller_may_say_that_everything_was_contoured(tmp_path: Path) -> None:
    cases = run("nifti", map_source(tmp_path / "in", "flat"), tmp_path / "out", contoured="all").folder
    assert all(case.contoured == ("Brainstem", "Mandible") for case in cases.cases)


def test_label_maps_with_nameless_values_or_fractions_are_refused(tmp_path: Path) -> None:
    source = map_source(tmp_path / "in", "folders")
    write(source / "p1" / "label.nrrd", box(slice(2), value=9))
    write(source / "p2" / "label.nrrd", BRAINSTEM.astype(np.float32) * 0.5)
    problems = refused("nifti", source, tmp_path / "out")
    assert ["values 9 have no name" in problems[0], "values 0.5 have no name" in problems[1]] == [True, True]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        pytest.param(lambda s: (s / "labels.json").unlink(), "labels.json: no such file", id="no names"),
        pytest.param(lambda s: (s / "cases.json").touch(), "in the case layout already", id="case layout"),
        pytest.param(lambda s: (s / "p1" / "label.nrrd").unlink(), "expected a label map", id="no label"),
        pytest.param(lambda s: (s / "p1" / "image.nii.gz").unlink(), "expected one image", id="no image"),
        pytest.param(lambda s: write(s / "p1" / "ct.nii.gz", scan(5)), "expected one image", id="two images"),
        pytest.param(lambda s: write(s / "p1" / "Larynx.nii", EMPTY), "not both", id="map and organ files"),
        pytest.param(lambda s: write(s / "p1" / "label.nii", EMPTY), "same name", id="two suffixes"),
    ],
)
def test_what_is_unclear_is_refused_not_guessed(tmp_path: Path, change: Any, part: str) -> None:
    source = map_source(tmp_path / "in", "folders")
    change(source)
    assert any(part in problem for problem in refused("nifti", source, tmp_path / "out"))


def test_an_empty_source_says_which_layouts_are_known(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (problem,) = refused("nifti", tmp_path / "in", tmp_path / "out")
    assert "no case found" in problem


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    source, out = map_source(tmp_path / "in", "flat"), tmp_path / "out"
    out.mkdir()
    run("nifti", source, out)
    (problem,) = refused("nifti", source, out)
    assert "not an empty folder" in problem
    assert "unknown kind" in refused("dicom", source, tmp_path / "new")[0]
    assert "no such folder" in refused("nifti", tmp_path / "absent", tmp_path / "new")[0]


def test_an_interrupted_import_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    def stop(name: str, total: int) -> None:
        raise KeyboardInterrupt

    source = map_source(tmp_path / "in", "flat")
    with pytest.raises(KeyboardInterrupt):
        run("nifti", source, tmp_path / "out", on_case=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    (tmp_path / ".writing-out").mkdir()  # what a killed process leaves
    (tmp_path / ".writing-out" / "half").touch()
    run("nifti", source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert not (tmp_path / "out" / "half").exists()


def test_splits_are_drawn_by_patient_and_seed(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for number in range(10):
        write(source / f"p{number}" / "ct.nii", scan(number))
        write(source / f"p{number}" / "Mandible.nii", MANDIBLE)
    cases = run("nifti", source, tmp_path / "out", validation=0.3, seed=1).folder.cases
    assert sum(case.split == "validation" for case in cases) == 3
    assert check_folder(tmp_path / "out", LABEL_SET).findings == ()


NNUNET_V2 = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "Brainstem": 1, "Mandible": 3},
    "file_ending": ".nii.gz",
    "numTraining": 2,
}
NNUNET_V1 = {
    "name": "Heads",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "Brainstem", "3": "Mandible"},
    "numTraining": 2,
    "training": [],
    "test": [],
}


def nnunet_source(root: Path, dataset: dict[str, Any], ending: str = ".nii.gz") -> Path:
    label = BRAINSTEM + np.where(BRAINSTEM, 0, MANDIBLE).astype(np.uint8) * 3
    for seed, (part, name) in enumerate((("Tr", "h_01"), ("Tr", "h_02"), ("Ts", "h_03"), ("Ts", "h_04"))):
        write(root / f"images{part}" / f"{name}_0000{ending}", scan(seed))
        if name != "h_04":
            write(root / f"labels{part}" / f"{name}{ending}", label if name != "h_02" else BRAINSTEM)
    (root / "dataset.json").write_text(json.dumps(dataset))
    return root


@pytest.mark.parametrize(
    ("dataset", "ending"),
    [
        pytest.param(NNUNET_V2, ".nii.gz", id="v2"),
        pytest.param(NNUNET_V2 | {"file_ending": ".nrrd"}, ".nrrd", id="v2-nrrd"),
        pytest.param(NNUNET_V1, ".nii.gz", id="v1"),
    ],
)
def test_nnunet_raw_layout(tmp_path: Path, dataset: dict[str, Any], ending: str) -> None:
    summary = run("nnunet", nnunet_source(tmp_path / "in", dataset, ending), tmp_path / "out", validation=0)
    cases = summary.folder
    assert cases.labels == {1: "Brainstem", 3: "Mandible"}
    assert {c.name: c.split for c in cases.cases} == {"h_01": "train", "h_02": "train", "h_03": "test"}
    assert all(case.contoured == ("Brainstem", "Mandible") for case in cases.cases)
    assert list(summary.left_out) == ["h_04"]
    np.testing.assert_array_equal(read_volume(cases.cases[2].image).array, scan(2))
    np.testing.assert_array_equal(read_volume(cases.cases[1].label).array, BRAINSTEM)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        pytest.param({"channel_names": {"0": "CT", "1": "PET"}}, "expected one channel", id="two channels"),
        pytest.param({"channel_names": {"0": "T1"}}, "expected one channel", id="not CT"),
        pytest.param({"labels": {"background": 0, "Larynx": [1, 2]}}, "is a region", id="regions"),
        pytest.param({"labels": {"background": 0, "Larynx": 1, "ignore": 2}}, "ignore label", id="ignore"),
        pytest.param({"labels": {"Larynx": 1, "Mandible": 1}}, "value 1 is both", id="same value"),
        pytest.param({"labels": {"Larinx": 1, "Mandible": 3}}, "did you mean", id="typo"),
        pytest.param({"labels": {"Larynx": 1}}, "values 3 have no name", id="nameless value"),
        pytest.param({"file_ending": ".png"}, "file_ending '.png'", id="file type"),
        pytest.param({"numTraining": 7}, "numTraining is 7, found 2", id="wrong count"),
        pytest.param({"labels": None}, "expected an object", id="no labels"),
        pytest.param({"dataset": {}}, "names its files", id="files elsewhere"),
    ],
)
def test_nnunet_features_without_counterpart_are_refused(
    tmp_path: Path, fields: dict[str, Any], part: str
) -> None:
    source = nnunet_source(tmp_path / "in", NNUNET_V2 | fields)
    assert any(part in problem for problem in refused("nnunet", source, tmp_path / "out"))


def test_nnunet_unpaired_files_are_all_listed(tmp_path: Path) -> None:
    source = nnunet_source(tmp_path / "in", NNUNET_V2)
    (source / "labelsTr" / "h_01.nii.gz").unlink()
    (source / "imagesTr" / "h_02_0000.nii.gz").unlink()
    problems = "\n".join(refused("nnunet", source, tmp_path / "out"))
    assert "h_01: no label" in problems
    assert "h_02: no image" in problems


def to_source(volume: Array) -> Array:
    """[x, y, z] of axes L, P, S -> OpenKBP's flat order of axes A->P, R->L, S->I (data_cards/openkbp.md)."""
    return volume[:, :, ::-1].transpose(1, 0, 2).ravel()


def write_patient(
    folder: Path,
    hu: Array,
    label: Array,
    spacing_mm: tuple[float, float, float],
    z_range: tuple[int, int] = (0, 128),
) -> None:
    """The CSV files of one patient; the volumes cover z_range of the 128 slices."""
    folder.mkdir(parents=True)
    view = slice(*z_range)
    values, organs = np.zeros((128,) * 3, int), np.zeros((128,) * 3, int)
    values[:, :, view], organs[:, :, view] = hu.astype(int) + 1000, label
    flat = to_source(values)
    rows = [f"{index},{flat[index]}.0\n" for index in np.flatnonzero(flat)]
    (folder / "ct.csv").write_text(",data\n" + "".join(rows))
    for value, name in OPENKBP.items():
        if indices := np.flatnonzero(to_source(organs == value)).tolist():
            (folder / f"{name}.csv").write_text(",data\n" + "".join(f"{index},\n" for index in indices))
    (folder / "voxel_dimensions.csv").write_text("".join(f"{mm:.18e}\n" for mm in spacing_mm))


def head() -> tuple[Array, Array]:
    """A head of 30 x 30 voxels in 20 slices, the rest blank, with five organs; HU and labels."""
    hu, label = np.full((128,) * 3, -1000, np.int16), np.zeros((128,) * 3, np.uint8)
    hu[40:70, 50:80, 60:80] = np.random.default_rng(0).integers(-900, 3095, (30, 30, 20))
    for value, (x, y) in {1: (55, 65), 2: (55, 72), 3: (44, 60), 4: (64, 60), 7: (55, 54)}.items():
        label[x - 2 : x + 3, y - 2 : y + 3, 65:75] = value
    return hu, label


def test_openkbp_voxels_axes_and_spacing(tmp_path: Path) -> None:
    hu, label = head()
    for split, patient in (("train-pats", "pt_2"), ("valid-pats", "pt_201"), ("test-pats", "pt_300")):
        write_patient(tmp_path / "in" / "provided-data" / split / patient, hu, label, (4.0, 3.5, 3.0))
    cases = run("openkbp", tmp_path / "in", tmp_path / "out").folder
    assert [(c.name, c.group, c.split) for c in cases.cases] == [
        ("openkbp_pt_2", "pt_2", "train"),
        ("openkbp_pt_201", "pt_201", "validation"),
        ("openkbp_pt_300", "pt_300", "test"),
    ]
    assert cases.labels == OPENKBP
    assert cases.cases[0].contoured == ("Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Mandible")
    image, labels = read_volume(cases.cases[0].image), read_volume(cases.cases[0].label)
    np.testing.assert_array_equal(image.array, hu)
    np.testing.assert_array_equal(labels.array, label)
    assert image.geometry.axis_codes() == "LPS"
    assert image.geometry.spacing_mm() == pytest.approx((3.5, 4.0, 3.0))
    assert image.geometry.to_lps([63.5, 63.5, 63.5]) == pytest.approx([0, 0, 0], abs=1e-3)


def test_openkbp_values_are_clipped_to_the_scale_of_a_scanner(tmp_path: Path) -> None:
    hu, label = head()
    folder = tmp_path / "in" / "train-pats" / "pt_5"
    write_patient(folder, hu, label, (4.0, 4.0, 3.0))
    text = (folder / "ct.csv").read_text().splitlines()
    text[1], text[2] = text[1].split(",")[0] + ",9000.0", text[2].split(",")[0] + ",-50.0"
    (folder / "ct.csv").write_text("\n".join(text) + "\n")
    image = read_volume(run("openkbp", tmp_path / "in", tmp_path / "out").folder.cases[0].image).array
    first, second = (np.unravel_index(int(row.split(",")[0]), (128,) * 3) for row in text[1:3])
    assert image[first[1], first[0], 127 - first[2]] == 3095
    assert image[second[1], second[0], 127 - second[2]] == -1000


def test_openkbp_overlaps_go_to_the_lower_value(tmp_path: Path) -> None:
    hu, label = head()
    folder = tmp_path / "in" / "train-pats" / "pt_5"
    write_patient(folder, hu, label, (4.0, 4.0, 3.0))
    rows = (folder / "Brainstem.csv").read_text().splitlines()[1:11]
    with (folder / "Mandible.csv").open("a") as file:
        file.writelines(f"{row}\n" for row in rows)
    summary = run("openkbp", tmp_path / "in", tmp_path / "out")
    assert summary.overlaps == {"openkbp_pt_5": 10}
    np.testing.assert_array_equal(read_volume(summary.folder.cases[0].label).array, label)


def with_tube(hu: Array, label: Array) -> None:
    """The source's blanking: below slice 60 only a tube of CT around the drawn cord."""
    hu[52:59, 69:76, 40:60] = 40
    label[54:57, 71:74, 40:60] = 2


def test_openkbp_scans_with_a_tube_are_cropped_to_whole_sections(tmp_path: Path) -> None:
    hu, label = head()
    with_tube(hu, label)
    write_patient(tmp_path / "in" / "train-pats" / "pt_5", hu, label, (4.0, 4.0, 3.0))
    cases = run("openkbp", tmp_path / "in", tmp_path / "out").folder
    image = read_volume(cases.cases[0].image)
    np.testing.assert_array_equal(image.array, hu[:, :, 60:80])
    np.testing.assert_array_equal(read_volume(cases.cases[0].label).array, label[:, :, 60:80])
    assert image.geometry.to_lps([63.5, 63.5, 3.5]) == pytest.approx([0, 0, 0], abs=1e-3)
    (entry,) = json.loads((tmp_path / "out" / "cases.json").read_text())
    assert (entry["z_cropped"], entry["z_range_in_128"]) == (True, [60, 80])


def lose_brainstem(hu: Array, label: Array) -> None:
    with_tube(hu, label)
    label[54:57, 67:70, 50:60] = 1


def shrink_brainstem(hu: Array, label: Array) -> None:
    label[label == 1] = 0
    label[54:57, 63:66, 65:75] = 1


def grow_cord(hu: Array, label: Array) -> None:
    label[45:65, 70:79, 62:78] = 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(
            lambda hu, label: np.place(label, label == 3, 0), "RightParotid not drawn", id="undrawn"
        ),
        pytest.param(lose_brainstem, "Brainstem lies in slices", id="brainstem-outside"),
        pytest.param(shrink_brainstem, "brainstem of 4.3 ml in view", id="brainstem-small"),
        pytest.param(grow_cord, "spinal cord of 138.2 ml", id="cord-large"),
    ],
)
def test_openkbp_leaves_out_what_the_quality_filter_names(tmp_path: Path, change: Any, reason: str) -> None:
    root = tmp_path / "in" / "train-pats"
    write_patient(root / "pt_5", *head(), (4.0, 4.0, 3.0))
    hu, label = head()
    change(hu, label)
    write_patient(root / "pt_6", hu, label, (4.0, 4.0, 3.0))
    for absent in ("pt_36", "pt_7"):
        (root / absent).mkdir()
    summary = run("openkbp", tmp_path / "in", tmp_path / "out")
    assert [case.name for case in summary.folder.cases] == ["openkbp_pt_5"]
    assert summary.left_out["openkbp_pt_6"].startswith(reason)
    assert summary.left_out["openkbp_pt_7"] == "has no ct.csv"
    assert "pt_293" in summary.left_out["openkbp_pt_36"]


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        pytest.param("ct.csv", ",data\n1,a\n", "expected rows of index,value", id="text"),
        pytest.param("ct.csv", ",data\n1,\n", "expected rows of index,value", id="no value"),
        pytest.param("ct.csv", ",data\n2097152,5\n", "expected whole numbers from 0 to 2097151", id="beyond"),
        pytest.param("ct.csv", ",data\n1,nan\n", "no finite number", id="nan"),
        pytest.param("Mandible.csv", ",data\n1.5,\n", "expected whole numbers", id="fraction"),
        pytest.param("voxel_dimensions.csv", "4.0\n", "expected three lengths", id="one length"),
        pytest.param("voxel_dimensions.csv", None, "expected three lengths", id="no lengths"),
    ],
)
def test_openkbp_malformed_files_are_named(tmp_path: Path, file: str, content: str | None, part: str) -> None:
    folder = tmp_path / "in" / "train-pats" / "pt_5"
    write_patient(folder, *head(), (4.0, 4.0, 3.0))
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    (problem,) = refused("openkbp", tmp_path / "in", tmp_path / "out")
    assert file in problem
    assert part in problem


def test_openkbp_without_patients_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "no patient found" in refused("openkbp", tmp_path / "in", tmp_path / "out")[0]


@pytest.mark.shared
@pytest.mark.slow
def test_openkbp_real_cases_return_voxel_by_voxel(shared_data: Path, tmp_path: Path) -> None:
    """Real cases written as CSV, cropped ones with a tube in the slices that were cut off."""
    root = shared_data / "hn_ct"
    entries = [e for e in json.loads((root / "cases.json").read_text()) if e["z_cropped"]][:2]
    entries += [e for e in json.loads((root / "cases.json").read_text()) if not e["z_cropped"]][:2]
    for entry in entries:
        image, label = (read_volume(root / entry["case"] / f"{name}.nii.gz") for name in ("image", "label"))
        start, stop = entry["z_range_in_128"]
        hu, organs = np.full((128,) * 3, -1000, np.int16), np.zeros((128,) * 3, np.uint8)
        hu[:, :, start:stop], organs[:, :, start:stop] = image.array, label.array
        if entry["z_cropped"]:
            hu[60:67, 75:82, start - 5 : start], organs[62:65, 77:80, start - 5 : start] = 40, 2
        x, y, z = image.geometry.spacing_mm()
        write_patient(tmp_path / "in" / "train-pats" / entry["group"], hu, organs, (y, x, z))
    cases = run("openkbp", tmp_path / "in", tmp_path / "out").folder
    assert len(cases.cases) == 4
    contoured = {e["case"]: tuple(e["contoured"]) for e in entries}
    for case in cases.cases:
        assert case.contoured == contoured[case.name]
        for name in ("image", "label"):
            real, got = (read_volume(folder / case.name / f"{name}.nii.gz") for folder in (root, cases.root))
            assert got.geometry.difference(real.geometry, tol_mm=1e-2) is None
            np.testing.assert_array_equal(got.array, real.array)
