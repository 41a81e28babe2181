"""Case folders: what is written is read back, and every problem of cases.json is named at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medattn.data.cases import (
    Case,
    CaseFolder,
    State,
    assign_splits,
    load_cases,
    read_cases,
    read_labels,
    write_cases,
)
from medattn.errors import InputError

LABELS = {"1": "Brainstem", "2": "Parotid_L"}


def write(root: Path, entries: Any, labels: Any = LABELS) -> Path:
    root.mkdir(exist_ok=True)
    (root / "labels.json").write_text(json.dumps(labels))
    (root / "cases.json").write_text(json.dumps(entries))
    return root


def entry(case: str, **fields: Any) -> dict[str, Any]:
    return {"case": case, "group": case, "split": "train", "contoured": ["Brainstem"]} | fields


def case(name: str, group: str, split: str | None) -> Case:
    return Case(name, Path(name), group, split, ())


def test_written_cases_are_read_back(tmp_path: Path) -> None:
    cases = (
        Case("a", tmp_path / "a", "p1", "train", ("Brainstem",), "clinic 1"),
        Case("b", tmp_path / "b", "p2", None, (), ""),
    )
    folder = CaseFolder(tmp_path, {1: "Brainstem", 2: "Parotid_L"}, cases)
    write_cases(folder, {"a": {"kvp": 120}})
    assert read_cases(tmp_path) == folder
    assert json.loads((tmp_path / "cases.json").read_text())[0]["kvp"] == 120
    assert "split" not in json.loads((tmp_path / "cases.json").read_text())[1]


def test_the_four_states_of_an_organ_stay_apart(tmp_path: Path) -> None:
    folder = read_cases(write(tmp_path, [entry("a")]))
    (a,) = folder.cases
    assert folder.state(a, "Brainstem", 7) is State.PRESENT
    assert folder.state(a, "Brainstem", 0) is State.EMPTY
    assert folder.state(a, "Parotid_L", 0) is State.NOT_CONTOURED
    assert folder.state(a, "Larynx", 0) is State.NOT_IN_LABELS


def test_every_problem_of_cases_json_is_listed_at_once(tmp_path: Path) -> None:
    entries = [
        entry("ok"),
        entry("ok"),
        {"case": "no-contoured"},
        entry("text", contoured="Brainstem"),
        entry("../outside"),
        entry("typo", split="trian"),
        entry("organ", contoured=["Brain stem"]),
        entry("leak", group="ok", split="validation"),
        "not an entry",
    ]
    root = write(tmp_path, entries)
    with pytest.raises(InputError) as caught:
        read_cases(root)
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 8
    for part in (
        "ok stands twice",
        "entry 2",
        "'Brainstem' is not a list",
        "'../outside' is not the name of a folder",
        "'trian', expected one of train, validation, test",
        "['Brain stem'] is not in labels.json",
        "patient ok is in train and in validation (leak)",
        "entry 8",
    ):
        assert part in text
    folder, problems = load_cases(root)
    assert problems == caught.value.problems
    assert [c.name for c in folder.cases] == ["ok", "typo", "organ", "leak"]


def test_a_case_without_split_is_no_leak(tmp_path: Path) -> None:
    entries = [entry("a", group="p"), entry("b", group="p", split=None)]
    assert len(read_cases(write(tmp_path, entries)).cases) == 2


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        pytest.param({"Brainstem": 1}, "expected voxel value -> organ name", id="nnU-Net's order"),
        pytest.param({"0": "background"}, "expected voxel values from 1 to 255", id="background only"),
        pytest.param({"256": "Brainstem"}, "expected voxel values from 1 to 255", id="beyond uint8"),
        pytest.param({"1": "Brainstem", "2": "Brainstem"}, "a name stands twice", id="same name"),
        pytest.param(["Brainstem"], "expected voxel value -> organ name", id="list"),
    ],
)
def test_a_wrong_labels_json_is_refused(tmp_path: Path, labels: Any, part: str) -> None:
    write(tmp_path, [entry("a")], labels)
    with pytest.raises(InputError, match=part):
        read_labels(tmp_path / "labels.json")


def test_a_missing_folder_names_the_two_commands_that_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"medattn phantom .*medattn import"):
        read_cases(tmp_path / "absent")


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_an_unreadable_cases_json_is_one_sentence(tmp_path: Path, content: str) -> None:
    write(tmp_path, [])
    (tmp_path / "cases.json").write_text(content)
    with pytest.raises(InputError, match=r"cases\.json") as caught:
        read_cases(tmp_path)
    assert len(caught.value.problems) == 1


groups = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.sampled_from([None, None, "train", "test"])),
    min_size=1,
    max_size=20,
)


@settings(deadline=None)
@given(groups, st.floats(0.01, 0.9), st.integers(0, 5))
def test_no_patient_is_ever_in_two_splits(
    drawn: list[tuple[str, str | None]], share: float, seed: int
) -> None:
    given_split = {group: split for group, split in drawn if split is not None}
    cases = [
        case(f"{n}", group, given_split.get(group) if split is not None else None)
        for n, (group, split) in enumerate(drawn)
    ]
    assigned = assign_splits(cases, validation=share, seed=seed)
    split_of: dict[str, str | None] = {}
    for before, after in zip(cases, assigned, strict=True):
        assert after.split in ("train", "validation", "test")
        assert before.split in (None, after.split)
        assert split_of.setdefault(after.group, after.split) == after.split
    assert assign_splits(reversed(cases), validation=share, seed=seed) == assigned[::-1]


def test_one_in_six_patients_is_held_out_and_train_is_never_empty() -> None:
    assigned = assign_splits([case(str(n), str(n), None) for n in range(20)], validation=0.15, seed=0)
    assert sum(c.split == "validation" for c in assigned) == 3
    for number in (1, 2):
        few = assign_splits([case(str(n), str(n), None) for n in range(number)], validation=0.9, seed=0)
        assert sum(c.split == "train" for c in few) == 1


@pytest.mark.shared
def test_the_real_cases_are_read(shared_data: Path) -> None:
    folder = read_cases(shared_data / "hn_ct")
    assert (len(folder.split("train")), len(folder.split("validation"))) == (73, 10)
    assert folder.labels[3] == "RightParotid"
