"""`medattn import`: other people's layouts become a folder of cases, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medattn.atomic import atomic_folder, require_new_folder
from medattn.data.cases import Case, CaseFolder, assign_splits, write_cases
from medattn.errors import InputError
from medattn.io import Volume, write_volume
from medattn.labels import LabelSet
from medattn_pipelines.importers.inventory import Contoured, Inventory, Options, Scan
from medattn_pipelines.importers.nifti import find_nifti
from medattn_pipelines.importers.nnunet import find_nnunet
from medattn_pipelines.importers.openkbp import find_openkbp

__all__ = ["KINDS", "ImportSummary", "import_cases"]

KINDS: dict[str, Callable[[Path, Options], Inventory]] = {
    "nifti": find_nifti,
    "nnunet": find_nnunet,
    "openkbp": find_openkbp,
}


@dataclass(frozen=True)
class ImportSummary:
    """What an import wrote.

    left_out: case -> why it was not imported. dropped: organs outside the label set, left out on request.
    overlaps: case -> voxels that several organs claimed; the organ with the lowest value has them.
    """

    folder: CaseFolder
    left_out: Mapping[str, str]
    dropped: tuple[str, ...]
    overlaps: Mapping[str, int]

    def __str__(self) -> str:
        cases = self.folder.cases
        splits = [f"{sum(c.split == name for c in cases)} {name}" for name in ("train", "validation", "test")]
        lines = [f"{len(cases)} cases in {self.folder.root} ({', '.join(splits)})"]
        lines += [
            f"  {organ}: contoured in {sum(organ in case.contoured for case in cases)}"
            for organ in self.folder.labels.values()
        ]
        if self.dropped:
            lines.append(f"left out, unknown to the label set: {', '.join(self.dropped)}")
        if self.overlaps:
            lines.append(
                f"{sum(self.overlaps.values())} voxels in {len(self.overlaps)} cases belonged to several "
                "organs; the lowest value has them"
            )
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)


def import_cases(
    kind: str,
    source: str | Path,
    out: str | Path,
    *,
    label_set: LabelSet,
    validation: float = 0.15,
    seed: int = 0,
    contoured: Contoured = "present",
    drop_unknown: bool = False,
    on_case: Callable[[str, int], None] | None = None,
) -> ImportSummary:
    """Bring a source of one of KINDS to the case layout in `out`, which must not exist or be empty.

    Organ names stay those of the source. Cases without a split in the source get one by `assign_splits` with
    `validation` and `seed`. contoured, drop_unknown: see `Options`. on_case is called after each case with
    its name and the number of cases.
    Raises InputError with every problem of the source; then nothing is left in `out`.
    """
    source, out = Path(source), Path(out)
    _require_source(kind, source)
    require_new_folder(out)  # before anything is read
    inventory = KINDS[kind](source, Options(label_set, contoured, drop_unknown))
    with atomic_folder(out) as folder:
        cases, left_out, kept = _write_scans(inventory, out, folder, on_case)
        written = assign_splits(cases, validation=validation, seed=seed)
        extra = {name: scan.extra for name, scan in kept.items()}
        write_cases(CaseFolder(folder, inventory.labels, written), extra)
    return ImportSummary(
        folder=CaseFolder(out, inventory.labels, written),
        left_out=left_out,
        dropped=inventory.dropped,
        overlaps={name: scan.overlap_voxels for name, scan in kept.items() if scan.overlap_voxels},
    )


def _require_source(kind: str, source: Path) -> None:
    if kind not in KINDS:
        raise InputError(f"{kind}: unknown kind of source, expected one of {', '.join(KINDS)}")
    if not source.is_dir():
        raise InputError(f"{source}: no such folder, expected the folder to import")


@dataclass(frozen=True)
class _Kept:
    """What outlives a written scan."""

    overlap_voxels: int
    extra: Mapping[str, Any]


def _write_scans(
    inventory: Inventory, out: Path, folder: Path, on_case: Callable[[str, int], None] | None
) -> tuple[list[Case], dict[str, str], dict[str, _Kept]]:
    """Load and write one case after the other; after the first problem only look for more."""
    cases, kept, problems = list[Case](), dict[str, _Kept](), list[str]()
    left_out = dict(inventory.left_out)
    for pending in inventory.cases:
        try:
            scan = pending.load()
        except InputError as error:
            problems += error.problems
            continue
        if isinstance(scan, str):
            left_out[pending.name] = scan
        else:
            if not problems:
                _write(folder / pending.name, scan)
            kept[pending.name] = _Kept(scan.overlap_voxels, scan.extra)
            cases.append(
                Case(
                    name=pending.name,
                    folder=out / pending.name,
                    group=pending.group,
                    split=pending.split,
                    contoured=scan.contoured,
                    source=pending.source,
                )
            )
        if on_case is not None:
            on_case(pending.name, len(inventory.cases))
    if problems:
        raise InputError(*problems)
    if not cases:
        raise InputError(*(f"{name}: left out: {reason}" for name, reason in left_out.items()))
    return cases, left_out, kept


def _write(folder: Path, scan: Scan) -> None:
    folder.mkdir()
    write_volume(folder / "image.nii.gz", scan.image)
    write_volume(folder / "label.nii.gz", Volume(scan.label, scan.image.geometry))
