"""The dataset doctor: everything that is wrong with a folder of cases, found in one pass over its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from medattn.data.cases import Case, CaseFolder, assign_splits, load_cases
from medattn.data.examine import Examined, Finding, examine
from medattn.data.fingerprint import Fingerprint
from medattn.errors import InputError
from medattn.labels import LabelSet

__all__ = ["Checkup", "Finding", "check_cases", "check_folder", "require_clean"]

DATA_SET = "(data set)"  # stands for the case in findings that concern no single case


@dataclass(frozen=True)
class Checkup:
    """What one pass found: the findings, and the fingerprint of every case whose two files fit together."""

    findings: tuple[Finding, ...]
    fingerprints: tuple[Fingerprint, ...]


def check_folder(
    root: str | Path,
    label_set: LabelSet,
    *,
    workers: int = 2,
    on_case: Callable[[str], None] | None = None,
) -> Checkup:
    """`check_cases` on a folder whose `cases.json` may itself have problems, which become findings.

    Raises InputError only where there is nothing to check: no folder, or no usable `labels.json` or
    `cases.json`.
    """
    folder, problems = load_cases(root)
    entries = tuple(
        Finding(DATA_SET, "error", problem, f"correct the entry in {folder.root / 'cases.json'}")
        for problem in problems
    )
    checkup = check_cases(folder, label_set, workers=workers, on_case=on_case)
    return Checkup(entries + checkup.findings, checkup.fingerprints)


def check_cases(
    folder: CaseFolder,
    label_set: LabelSet,
    *,
    workers: int = 2,
    on_case: Callable[[str], None] | None = None,
) -> Checkup:
    """Read every image and label map once and report everything that is wrong, in the order of cases.json.

    workers: threads (reading is decompression, which runs without the interpreter lock); each holds one case
    in memory. on_case gets the name of each case when it is done, in any order, in the calling thread.
    Nothing is changed, and nothing that is found raises: see `require_clean`.
    """
    done: dict[str, Examined] = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed(
                pool.submit(examine, folder, case, label_set) for case in folder.cases
            ):
                examined = future.result()
                done[examined.case.name] = examined
                if on_case is not None:
                    on_case(examined.case.name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    ordered = [done[case.name] for case in folder.cases]
    findings = [
        *_name_findings(folder, label_set),
        *_missing_splits(folder),
        *(finding for examined in ordered for finding in examined.findings),
        *_identical_images(folder, ordered),
        *_unlisted_folders(folder),
    ]
    return Checkup(tuple(findings), tuple(e.fingerprint for e in ordered if e.fingerprint is not None))


def require_clean(findings: Iterable[Finding]) -> None:
    """Raise InputError with one sentence per error among the findings; warnings and notes pass."""
    errors = [f for f in findings if f.severity == "error"]
    if errors:
        raise InputError(*(f"{f.case}: {f.cause}; {f.repair}" for f in errors))


def _name_findings(folder: CaseFolder, label_set: LabelSet) -> list[Finding]:
    """Names in labels.json that the label set does not know, and names that mean one organ."""
    path, problems, first = folder.root / "labels.json", list[str](), dict[str, str]()
    for name in folder.labels.values():
        try:
            (organ,) = label_set.resolve([name])
        except InputError as error:
            problems += error.problems
            continue
        if (twin := first.setdefault(organ.name, name)) != name:
            problems.append(f"{twin!r} and {name!r} are both {organ.name} in label set {label_set.name}")
    repair = f"correct the name in {path} and in contoured of cases.json, or use a label set that fits"
    return [Finding(DATA_SET, "error", f"{path}: {problem}", repair) for problem in problems]


def _missing_splits(folder: CaseFolder) -> list[Finding]:
    """Cases without a split get one when training starts; what is still missing then is an error."""
    splits = {case.split for case in assign_splits(folder.cases, validation=0.15, seed=0)}
    path = folder.root / "cases.json"
    return [
        Finding(
            DATA_SET,
            "error",
            f"{path}: no case has split {split!r}, expected at least one",
            f'set "split": "{split}" for some patients in {path}, or remove the field from all cases',
        )
        for split in ("train", "validation")
        if split not in splits
    ]


def _identical_images(folder: CaseFolder, examined: Sequence[Examined]) -> list[Finding]:
    first: dict[str, Case] = {}
    findings = []
    for case, digest in ((e.case, e.digest) for e in examined if e.digest is not None):
        twin = first.setdefault(digest, case)
        if twin is case:
            continue
        leak = twin.split != case.split
        where = f", a leak between {twin.split} and {case.split}" if leak else ""
        findings.append(
            Finding(
                case.name,
                "error" if leak else "warning",
                f"{case.image}: the same voxels as {twin.image}{where}; expected one case per scan",
                f"delete the entry of {case.name} or of {twin.name} from {folder.root / 'cases.json'}",
            )
        )
    return findings


def _unlisted_folders(folder: CaseFolder) -> list[Finding]:
    listed = {case.name for case in folder.cases}
    path = folder.root / "cases.json"
    return [
        Finding(
            entry.name,
            "note",
            f"{entry}: a case folder that {path} does not list, so nothing uses it",
            f'add {{"case": "{entry.name}", "contoured": [...]}} to {path}, or move the folder away',
        )
        for entry in sorted(folder.root.iterdir())
        if entry.name not in listed
        and any((entry / name).exists() for name in ("image.nii.gz", "label.nii.gz"))
    ]
