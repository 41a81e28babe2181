"""Practice cases on disk, in the case layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medattn.atomic import write_text
from medattn.data.cases import Case, CaseFolder, write_cases
from medattn.data.phantom.anatomy import GLANDS, ORGANS
from medattn.data.phantom.render import phantom
from medattn.errors import InputError
from medattn.io import Volume, write_volume

SOURCE = "medattn phantom"
UNDRAWN = 0.15
MARKER = ".medattn-phantom"
"""A file that says a folder holds practice cases only and may be written again."""


@dataclass(frozen=True)
class Plan:
    """What one case will be. patient counts from 0 over the whole set; scan counts within a patient."""

    patient: int
    scan: int
    split: str
    removed: frozenset[str] = frozenset()
    undrawn: frozenset[str] = frozenset()


def write_phantoms(
    root: str | Path,
    *,
    cases: int = 24,
    size: int = 96,
    seed: int = 0,
    on_case: Callable[[int, int], None] | None = None,
) -> CaseFolder:
    """Write `cases` synthetic head-and-neck CT cases of size x size voxels in plane under `root`.

    Three quarters of the cases are for training, the rest for validation; one case in six of a split is a
    second scan of a patient. Same arguments, same bytes. on_case(done, total) is called after each case.
    Raises InputError for impossible arguments and where `root` holds anything but practice cases; those of
    an earlier call are replaced.
    """
    root = Path(root)
    _check(root, cases, size, seed)
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / MARKER, "Practice cases written by `medattn phantom`, which may replace them.\n")
    _remove_earlier(root)
    written = []
    for number, plan in enumerate(plan_cases(cases, seed)):
        written.append(_write(root, number, plan, size, seed))
        if on_case:
            on_case(number + 1, cases)
    folder = CaseFolder(root, ORGANS, tuple(written))
    write_cases(folder)
    return folder


def plan_cases(cases: int, seed: int) -> list[Plan]:
    """Who is scanned, in which split, which glands are gone and which organs nobody drew."""
    rng = np.random.default_rng([seed, 2])
    validation = max(1, round(cases / 4))
    plans: list[Plan] = []
    for split, count in (("train", cases - validation), ("validation", validation)):
        plans += _plan_split(rng, split, count, first=len({plan.patient for plan in plans}))
    return _leave_undrawn(rng, plans)


def _plan_split(rng: np.random.Generator, split: str, count: int, first: int) -> list[Plan]:
    patients = count - count // 6
    operated = rng.choice(patients, patients // 7, replace=False).tolist()
    removed = {int(patient): frozenset([str(rng.choice(GLANDS))]) for patient in operated}
    scans = [(n, 0) for n in range(patients)] + [(n, 1) for n in range(count - patients)]
    return [Plan(first + n, scan, split, removed.get(n, frozenset())) for n, scan in sorted(scans)]


def _leave_undrawn(rng: np.random.Generator, plans: list[Plan]) -> list[Plan]:
    """Per organ, some 15 % of the training cases where nobody drew it; never all, never an operated gland."""
    training = sum(plan.split == "train" for plan in plans)
    undrawn: list[set[str]] = [set() for _ in plans]
    for organ in ORGANS.values():
        free = [n for n, plan in enumerate(plans) if plan.split == "train" and organ not in plan.removed]
        count = min(int(UNDRAWN * training + rng.random()), len(free) - 1)
        for n in rng.choice(free, max(count, 0), replace=False):
            undrawn[int(n)].add(organ)
    return [
        Plan(plan.patient, plan.scan, plan.split, plan.removed, frozenset(organs))
        for plan, organs in zip(plans, undrawn, strict=True)
    ]


def _write(root: Path, number: int, plan: Plan, size: int, seed: int) -> Case:
    patient_seed = int(np.random.SeedSequence([seed, 3, plan.patient]).generate_state(1)[0])
    drawn = phantom(patient_seed, size, scan=plan.scan, removed=plan.removed)
    missing = [value for value, organ in ORGANS.items() if organ in plan.undrawn]
    case = Case(
        name=f"phantom_{number + 1:03d}",
        folder=root / f"phantom_{number + 1:03d}",
        group=f"patient_{plan.patient + 1:03d}",
        split=plan.split,
        contoured=tuple(organ for organ in ORGANS.values() if organ not in plan.undrawn),
        source=f"{SOURCE} --seed {seed}",
    )
    case.folder.mkdir(exist_ok=True)
    write_volume(case.image, Volume(drawn.image, drawn.geometry))
    label = np.where(np.isin(drawn.label, missing), np.uint8(0), drawn.label)
    write_volume(case.label, Volume(label, drawn.geometry))
    return case


def _remove_earlier(root: Path) -> None:
    """Delete the practice cases of an earlier call, the index first: half a set must not look whole."""
    (root / "cases.json").unlink(missing_ok=True)
    for folder in root.glob("phantom_[0-9]*"):
        for name in ("image.nii.gz", "label.nii.gz"):
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _check(root: Path, cases: int, size: int, seed: int) -> None:
    problems = []
    if cases < 2:
        problems.append(f"cases is {cases}, expected at least 2: one to train on and one to validate on")
    if not 32 <= size <= 512:
        problems.append(f"size is {size} voxels, expected 32 to 512")
    if seed < 0:
        problems.append(f"seed is {seed}, expected 0 or more")
    if root.exists() and not root.is_dir():
        problems.append(f"{root}: is a file, expected a folder; choose another place for the practice cases")
    elif root.is_dir() and any(root.iterdir()) and not (root / MARKER).exists():
        problems.append(f"{root}: holds files that are no practice cases; choose an empty or new folder")
    if problems:
        raise InputError(*problems)
