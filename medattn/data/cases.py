"""Folders of cases: `cases.json`, `labels.json` and one folder per case with an image and a label map.

An organ in a case has one of four states, which loss and metrics keep apart: contoured and present, contoured
and empty (someone looked; there is none), not contoured (nobody looked), not in this data set's labels.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from medattn.atomic import write_text
from medattn.errors import InputError

SPLITS = ("train", "validation", "test")


class State(Enum):
    """What is known of an organ in a case."""

    PRESENT = "present"
    EMPTY = "empty"
    NOT_CONTOURED = "not contoured"
    NOT_IN_LABELS = "not in labels"


@dataclass(frozen=True)
class Case:
    """One scan with its label map.

    name: the case folder's name. group: the patient; cases of one group never sit in two splits.
    split: train, validation, test or None (not yet assigned). contoured: organs that someone drew here,
    by their names in the data set's labels.json. source: where it came from, for people.
    """

    name: str
    folder: Path
    group: str
    split: str | None
    contoured: tuple[str, ...]
    source: str = ""

    @property
    def image(self) -> Path:
        """The CT volume."""
        return self.folder / "image.nii.gz"

    @property
    def label(self) -> Path:
        """The label map, on the image's grid."""
        return self.folder / "label.nii.gz"


@dataclass(frozen=True)
class CaseFolder:
    """A data set in the case layout. labels: voxel value -> organ name, without the background 0."""

    root: Path
    labels: Mapping[int, str]
    cases: tuple[Case, ...]

    def split(self, name: str) -> tuple[Case, ...]:
        """The cases of one split, in file order."""
        return tuple(case for case in self.cases if case.split == name)

    def state(self, case: Case, organ: str, voxels: int) -> State:
        """The state of an organ in a case whose label map holds `voxels` voxels of it."""
        if organ not in self.labels.values():
            return State.NOT_IN_LABELS
        if organ not in case.contoured:
            return State.NOT_CONTOURED
        return State.PRESENT if voxels else State.EMPTY


def read_cases(root: str | Path) -> CaseFolder:
    """Read `cases.json` and `labels.json`; the volumes stay closed.

    Raises InputError with every problem: missing files, malformed entries, unknown splits, duplicate names,
    organs in `contoured` that labels.json does not have, one patient in two splits.
    """
    folder, problems = load_cases(root)
    if problems:
        raise InputError(*problems)
    return folder


def load_cases(root: str | Path) -> tuple[CaseFolder, tuple[str, ...]]:
    """Like `read_cases`, but with the problems beside what could be read, for a caller that wants to go on.

    Malformed and repeated entries are left out of the folder. Raises InputError only where there is nothing
    to read: no folder, or no usable `labels.json` or `cases.json`.
    """
    root = Path(root)
    path = root / "cases.json"
    if not root.is_dir():
        raise InputError(
            f"{root}: no such folder; make practice cases with `medattn phantom {root}` "
            f"or bring your own with `medattn import KIND SOURCE {root}`"
        )
    labels = read_labels(root / "labels.json")
    entries = _read_json(path)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a list with at least one case")
    cases, problems = dict[str, Case](), list[str]()
    for number, entry in enumerate(entries):
        try:
            case = _case(root, entry)
        except (KeyError, TypeError, AttributeError) as error:
            problems.append(f"{path}: entry {number}: missing or malformed field {error}")
            continue
        if case.name in cases:
            problems.append(f"{path}: case {case.name} stands twice; keep one entry")
        cases.setdefault(case.name, case)
    problems += _problems(path, cases.values(), set(labels.values()))
    return CaseFolder(root, labels, tuple(cases.values())), tuple(problems)


def read_labels(path: Path) -> dict[int, str]:
    """A `labels.json`: voxel value -> name; a background entry at 0 is dropped."""
    content = _read_json(path)
    try:
        labels = {int(value): str(name) for value, name in content.items() if int(value) != 0}
    except (AttributeError, ValueError):
        raise InputError(
            f'{path}: expected voxel value -> organ name, such as {{"1": "Brainstem"}}'
        ) from None
    if not labels or min(labels) < 0 or max(labels) > 255:
        raise InputError(f"{path}: expected voxel values from 1 to 255, found {sorted(labels)}")
    if len(set(labels.values())) < len(labels):
        raise InputError(f"{path}: a name stands twice: {sorted(labels.values())}")
    return labels


def write_labels(path: Path, labels: Mapping[int, str]) -> None:
    """Write a `labels.json`."""
    write_text(
        path,
        json.dumps({str(value): name for value, name in sorted(labels.items())}, indent=1) + "\n",
    )


def write_cases(folder: CaseFolder, extra: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write `cases.json` and `labels.json`; `extra` adds fields to the entry of a case, by its name."""
    entries = []
    for case in folder.cases:
        entry: dict[str, Any] = {"case": case.name, "group": case.group}
        if case.split is not None:
            entry["split"] = case.split
        entry |= {
            "contoured": list(case.contoured),
            "source": case.source,
            **(extra or {}).get(case.name, {}),
        }
        entries.append(entry)
    write_labels(folder.root / "labels.json", folder.labels)
    write_text(folder.root / "cases.json", json.dumps(entries, indent=1) + "\n")


def assign_splits(cases: Iterable[Case], *, validation: float, seed: int) -> tuple[Case, ...]:
    """Give every case without a split one, by group: `validation` of the groups, at least one, to validation.

    Groups that already have a split keep it, and train is never left empty. The draw depends on the groups'
    names and the seed alone.
    """
    cases = tuple(cases)
    known = {case.group: case.split for case in cases if case.split is not None}
    free = sorted({case.group for case in cases} - known.keys())
    random.Random(seed).shuffle(free)
    most = len(free) if "train" in known.values() else len(free) - 1
    held_out = min(most, max(1, round(validation * len(free)))) if validation > 0 else 0
    drawn = {group: "validation" if n < held_out else "train" for n, group in enumerate(free)}
    return tuple(replace(case, split=case.split or (known | drawn)[case.group]) for case in cases)


def _case(root: Path, entry: Mapping[str, Any]) -> Case:
    name = str(entry["case"])
    if name in ("", ".", "..") or set(name) & set("/\\"):
        raise TypeError(f"'case': {name!r} is not the name of a folder")
    if not isinstance(entry["contoured"], list):
        raise TypeError(f"'contoured': {entry['contoured']!r} is not a list of organ names")
    if not isinstance(entry.get("split"), str | None):
        raise TypeError(f"'split': {entry['split']!r} is not one of {', '.join(SPLITS)}")
    return Case(
        name=name,
        folder=root / name,
        group=str(entry.get("group") or name),
        split=entry.get("split"),
        contoured=tuple(str(organ) for organ in entry["contoured"]),
        source=str(entry.get("source", "")),
    )


def _problems(path: Path, cases: Iterable[Case], organs: set[str]) -> list[str]:
    problems, split_of = [], dict[str, str]()
    for case in cases:
        if case.split is not None and case.split not in SPLITS:
            problems.append(
                f"{path}: case {case.name}: split {case.split!r}, expected one of {', '.join(SPLITS)}"
            )
        if unknown := sorted(set(case.contoured) - organs):
            problems.append(
                f"{path}: case {case.name}: contoured {unknown} is not in labels.json {sorted(organs)}"
            )
        if case.split is not None and split_of.setdefault(case.group, case.split) != case.split:
            problems.append(
                f"{path}: patient {case.group} is in {split_of[case.group]} and in {case.split} "
                f"({case.name}); put all cases of a patient into one split"
            )
    return problems


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `medattn import` writes it") from None
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
