"""`evaluate` on small folders: what is matched, counted, refused and written."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from medattn.errors import InputError
from medattn.geometry import Geometry
from medattn.io import Volume, write_volume
from medattn.metrics import dice, hausdorff95
from medattn_pipelines.evaluation import evaluate
from medattn_pipelines.segmentations import read_segmentations

GRID = Geometry((16, 12, 8), np.diag([2.0, 2.0, 3.0, 1.0]))
NAMES = {1: "Brainstem", 2: "Parotid_L", 3: "Parotid_R"}
# what OpenKBP calls them, under other voxel values
RENAMED = {7: "Brainstem", 5: "LeftParotid", 4: "RightParotid"}


def label(shift: int = 0) -> np.ndarray:
    """A brainstem in the middle, the left parotid at large x (LPS), the right one at small x."""
    array = np.zeros(GRID.size, np.uint8)
    array[6:10, 4 + shift : 8 + shift, 2:6] = 1
    array[12:15, 4 + shift : 7 + shift, 2:5] = 2
    array[1:4, 4 + shift : 7 + shift, 2:5] = 3
    return array


def flat(folder: Path, names: Mapping[int, str], maps: Mapping[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text(json.dumps(names))
    for case, array in maps.items():
        write_volume(folder / f"{case}.nii.gz", Volume(array, GRID))
    return folder


def cases(folder: Path, maps: Mapping[str, np.ndarray], contoured: Mapping[str, list[str]]) -> Path:
    """Case folders with an image each; cases without an entry in `contoured` have all organs drawn."""
    folder.mkdir()
    (folder / "labels.json").write_text(json.dumps(NAMES))
    entries = [
        {
            "case": case,
            "group": case,
            "split": "validation" if number < 3 else "train",
            "contoured": contoured.get(case, list(NAMES.values())),
        }
        for number, case in enumerate(maps)
    ]
    (folder / "cases.json").write_text(json.dumps(entries))
    for case, array in maps.items():
        (folder / case).mkdir()
        write_volume(folder / case / "label.nii.gz", Volume(array, GRID))
        hu = np.where(array > 0, 40, -20).astype(np.int16)
        write_volume(folder / case / "image.nii.gz", Volume(hu, GRID))
    return folder


def metrics(output: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.json")

    return json.loads((output / "metrics.json").read_text(), parse_constant=refuse)


def rows(output: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (output / "metrics.csv").open(newline="") as file:
        return {(row["case"], row["organ"]): row for row in csv.DictReader(file)}


def renumbered(array: np.ndarray) -> np.ndarray:
    return np.array([0, 7, 5, 4], np.uint8)[array]


def test_renamed_organs_partly_drawn_cases_and_all_three_files(tmp_path: Path) -> None:
    missed, false = label(), label()
    missed[missed == 1] = 0
    truth = {
        "a": label(),
        "b": label(),
        "c": np.where(label() == 3, 0, label()).astype(np.uint8),
        "d": label(),
    }
    reference = cases(tmp_path / "R", truth, {"b": ["Brainstem", "Parotid_L"]})
    prediction = flat(
        tmp_path / "P", RENAMED, {"a": renumbered(label(1)), "b": renumbered(missed), "c": renumbered(false)}
    )
    seen: list[str] = []
    result = evaluate(prediction, reference, tmp_path / "out", workers=2, on_case=seen.append)
    assert sorted(seen) == ["a", "b", "c"]

    content, table = metrics(tmp_path / "out"), rows(tmp_path / "out")
    stem_a = (label(1) == 1), (label() == 1)
    assert content["per_case"]["a"]["Brainstem"]["dice"] == pytest.approx(dice(*stem_a))
    assert float(table["a", "Brainstem"]["hd95_mm"]) == pytest.approx(hausdorff95(*stem_a, (2, 2, 3)))
    assert content["per_case"]["a"]["Brainstem"]["tolerance_mm"] == 2.5
    assert content["per_case"]["a"]["Brainstem"]["volume_ml"] == pytest.approx(64 * 12 / 1000)

    assert content["per_case"]["b"]["Brainstem"]["hd95_mm"] is None
    assert "missed" in content["per_case"]["b"]["Brainstem"]["note"]
    assert table["b", "Brainstem"]["hd95_mm"] == ""
    assert content["per_case"]["b"]["Parotid_R"]["state"] == "not contoured"
    assert table["b", "Parotid_R"]["dice"] == ""
    assert "false" in table["c", "Parotid_R"]["note"]
    assert len(table) == 9

    stem = content["per_organ"]["Brainstem"]
    assert (stem["n"], stem["n_missed"], stem["n_not_contoured"]) == (3, 1, 0)
    assert (stem["dice"]["n"], stem["hd95_mm"]["n"]) == (3, 2)
    assert stem["dice"]["worst_case"] == "b"
    right = content["per_organ"]["Parotid_R"]
    assert (right["n"], right["n_false"], right["n_not_contoured"]) == (2, 1, 1)
    means = [organ["dice"]["mean"] for organ in content["per_organ"].values()]
    assert content["mean"]["dice"]["mean"] == pytest.approx(sum(means) / 3)
    assert (content["mean"]["dice"]["n_cases"], content["mean"]["dice"]["n_organs"]) == (3, 3)
    assert content["counts"]["references_without_prediction"] == 1
    assert content["without_prediction"] == {"train": ["d"]}
    assert {"medattn", "python", "numpy", "scipy"} <= content["versions"].keys()
    assert content["schema"] == "medattn.evaluation/1"
    assert result.summary["Brainstem"].n == 3
    assert (tmp_path / "out" / "report.html").stat().st_size > 20_000
    assert not list((tmp_path / "out").glob(".writing-*"))


def test_flat_references_count_as_contoured_everywhere_and_say_so(tmp_path: Path) -> None:
    reference = flat(tmp_path / "R", RENAMED, {"a": renumbered(label())})
    prediction = flat(tmp_path / "P", {1: "Brainstem", 9: "Mandible"}, {"a": (label() == 1).astype(np.uint8)})
    evaluate(prediction, reference, tmp_path / "out", workers=1)
    content = metrics(tmp_path / "out")
    assert content["mean"]["dice"]["mean"] == 1.0
    assert list(content["per_organ"]) == ["Brainstem"]
    assert content["organs_not_compared"] == {
        "only_reference": ["Parotid_L", "Parotid_R"],
        "only_prediction": ["Bone_Mandible"],
    }
    assert any("cases.json" in note for note in content["notes"])


def test_swapped_sides_are_found_by_name_in_the_prediction(tmp_path: Path) -> None:
    reference = flat(tmp_path / "R", NAMES, {"a": label()})
    prediction = flat(tmp_path / "P", NAMES, {"a": np.array([0, 1, 3, 2], np.uint8)[label()]})
    evaluate(prediction, reference, tmp_path / "out", workers=1)
    (finding,) = metrics(tmp_path / "out")["side_findings"]
    assert (finding["case"], finding["source"]) == ("a", "prediction")
    assert finding["sentence"].startswith("Parotid_L lies 22.0 mm to the patient's right of Parotid_R")


def test_baseline_gives_paired_differences_over_shared_cases(tmp_path: Path) -> None:
    names = [f"case{n}" for n in range(4)]
    reference = flat(tmp_path / "R", NAMES, {name: label() for name in names})
    prediction = flat(tmp_path / "P", NAMES, {name: label() for name in names})
    baseline = flat(tmp_path / "B", NAMES, {name: label(1) for name in [*names[:3], "other"]})
    evaluate(prediction, reference, tmp_path / "out", baseline=baseline, workers=1)
    paired = metrics(tmp_path / "out")["comparison"]["metrics"]["dice"]["Brainstem"]
    assert paired["n"] == 3
    assert paired["mean_difference"] == pytest.approx(0.25)
    assert paired["p"] == pytest.approx(0.25), "three differences of one sign: 2 / 2^3"
    assert paired["p_holm"] == pytest.approx(0.75)


def test_every_grid_that_differs_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    reference = flat(tmp_path / "R", NAMES, {"a": label(), "b": label(), "c": label()})
    prediction = flat(tmp_path / "P", NAMES, {"c": label()})
    moved = GRID.affine.copy()
    moved[0, 3] = 5.0
    write_volume(prediction / "a.nii.gz", Volume(label(), Geometry(GRID.size, moved)))
    thick = np.diag([2.0, 2.0, 4.0, 1.0])
    write_volume(prediction / "b.nii.gz", Volume(label(), Geometry(GRID.size, thick)))
    with pytest.raises(InputError) as error:
        evaluate(prediction, reference, tmp_path / "out")
    one, two = error.value.problems
    assert "a.nii.gz" in one
    assert "origin" in one
    assert "spacing 4 vs 3 mm on axis 2" in two
    assert not (tmp_path / "out").exists()


def test_missing_names_strangers_and_empty_folders_are_refused(tmp_path: Path) -> None:
    reference = flat(tmp_path / "R", NAMES, {"a": label()})
    for folder, message in (
        (tmp_path / "nowhere", "no such folder"),
        (flat(tmp_path / "empty", NAMES, {}), "no <case>.nii.gz"),
        (flat(tmp_path / "stranger", NAMES, {"z": label()}), "no reference case 'z'"),
        (
            flat(tmp_path / "other", {1: "Larynx"}, {"a": (label() == 1).astype(np.uint8)}),
            "no organ in common",
        ),
        (
            flat(tmp_path / "twice", {1: "Mandible", 2: "Bone_Mandible"}, {"a": label()}),
            "two names stand for",
        ),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(folder, reference, tmp_path / "out", workers=1)
    nameless = flat(tmp_path / "nameless", NAMES, {"a": label()})
    (nameless / "labels.json").unlink()
    with pytest.raises(InputError, match=r"nameless/labels\.json: no such file"):
        evaluate(nameless, reference, tmp_path / "out")
    with pytest.raises(InputError, match="no such label set"):
        evaluate(nameless, reference, tmp_path / "out", label_set="knee")
    assert not (tmp_path / "out").exists()


def test_all_unreadable_files_are_reported_at_once(tmp_path: Path) -> None:
    maps = {name: label() for name in ("cut", "empty", "values", "fine")}
    reference, prediction = flat(tmp_path / "R", NAMES, maps), flat(tmp_path / "P", NAMES, maps)
    (prediction / "empty.nii.gz").write_bytes(b"")
    (prediction / "cut.nii.gz").write_bytes(b"\x1f\x8b" + b"\x00" * 40)
    with pytest.raises(InputError) as error:
        evaluate(prediction, reference, tmp_path / "out")
    assert ["cut.nii.gz" in error.value.problems[0], "empty.nii.gz" in error.value.problems[1]] == [True] * 2

    shutil.rmtree(prediction)
    flat(tmp_path / "P", NAMES, maps)
    whole = (prediction / "cut.nii.gz").read_bytes()
    (prediction / "cut.nii.gz").write_bytes(whole[:-30])
    write_volume(prediction / "values.nii.gz", Volume(np.where(label() == 1, 9, label()), GRID))
    with pytest.raises(InputError) as error:
        evaluate(prediction, reference, tmp_path / "out")
    assert len(error.value.problems) == 2
    assert "cut.nii.gz: truncated or corrupt" in error.value.problems[0]
    assert "values.nii.gz: voxel values [9.0] have no name" in error.value.problems[1]


def test_fractions_in_a_label_map_are_refused(tmp_path: Path) -> None:
    reference = flat(tmp_path / "R", NAMES, {"a": label()})
    prediction = flat(tmp_path / "P", NAMES, {"a": label().astype(np.float32) * 0.5})
    with pytest.raises(InputError, match=r"\[0\.5, 1\.5\] have no name"):
        evaluate(prediction, reference, tmp_path / "out", workers=1)


def test_case_folders_without_cases_json_are_read(tmp_path: Path) -> None:
    from medattn.labels import LabelSet

    reference = cases(tmp_path / "R", {"a": label(), "b": label()}, {})
    (reference / "cases.json").unlink()
    found = read_segmentations(reference, LabelSet.load())
    assert sorted(found.files) == sorted(found.images) == ["a", "b"]
    assert found.contoured is None


def test_an_organ_missing_from_every_case_never_makes_a_nan(tmp_path: Path) -> None:
    nothing = np.zeros(GRID.size, np.uint8)
    reference = flat(tmp_path / "R", NAMES, {"a": nothing, "b": nothing})
    prediction = flat(tmp_path / "P", NAMES, {"a": nothing, "b": label()})
    evaluate(prediction, reference, tmp_path / "out", workers=1)
    content = metrics(tmp_path / "out")
    assert content["per_organ"]["Brainstem"]["n_empty"] == 2
    assert content["per_organ"]["Brainstem"]["dice"]["mean"] == 0.5
    assert content["per_organ"]["Brainstem"]["hd95_mm"]["n"] == 1
    assert not any(math.isnan(value["mean"]) for value in content["mean"].values())


@pytest.mark.shared
@pytest.mark.slow
def test_two_readers_of_real_scans_agree_as_published(shared_data: Path, tmp_path: Path) -> None:
    """Nikolov et al. 2018 report radiographer against oncologist: mean Dice above 0.8 for large organs."""
    source = shared_data / "hn_oar_two_readers"
    for reader in ("oncologist", "radiographer"):
        (tmp_path / reader).mkdir()
        shutil.copy(source / "labels.json", tmp_path / reader)
        for case in ("0522c0014", "0522c0017"):
            shutil.copy(source / case / f"{reader}.nii.gz", tmp_path / reader / f"{case}.nii.gz")
    result = evaluate(tmp_path / "radiographer", tmp_path / "oncologist", tmp_path / "out")
    assert len(result.summary) == 21
    assert not result.side_findings
    for organ, least in (("Brain", 0.97), ("Bone_Mandible", 0.9), ("Lung_L", 0.95), ("Parotid_R", 0.8)):
        mean = result.summary[organ].metrics["dice"].mean
        assert mean is not None
        assert least < mean < 1
