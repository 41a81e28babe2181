"""One case under the doctor's eye: its two files are read once, and everything wrong with them is noted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from medattn.data.cases import Case, CaseFolder
from medattn.data.fingerprint import Fingerprint, fingerprint, voxel_counts
from medattn.errors import InputError
from medattn.geometry import Array, Geometry
from medattn.io import Volume, read_volume
from medattn.labels import LabelSet
from medattn.sides import side_errors

Severity = Literal["error", "warning", "note"]

SOFT_TISSUE_HU = (-200, 200)  # fat to muscle: a CT of a body without a voxel here is not in HU
MOST_VALUES = 8  # unknown label values that one finding lists


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table.

    severity: error (training refuses), warning (probably wrong), note (legal, worth a look).
    cause: one sentence with file, found and expected. repair: a command, or what to change in which file.
    """

    case: str
    severity: Severity
    cause: str
    repair: str


@dataclass(frozen=True)
class Examined:
    """What is kept of a case. fingerprint: None where the two files are not readable or do not fit together.

    digest: hash of the image's voxels, None where the image is not readable.
    """

    case: Case
    findings: tuple[Finding, ...]
    fingerprint: Fingerprint | None
    digest: str | None


def examine(folder: CaseFolder, case: Case, label_set: LabelSet) -> Examined:
    """Read the image and the label map of a case once, and check each alone and both together."""
    findings: list[Finding] = []
    image, label = (_read(case, path, findings) for path in (case.image, case.label))
    if image is not None:
        findings += _image_findings(case, image.array)
    if image is not None and label is not None:
        findings += _grid_findings(case, image.geometry, label.geometry)
    organs = None if label is None else _whole_numbers(case, label, findings)
    broken = any(finding.severity == "error" for finding in findings)
    measured = None
    if organs is not None:
        counts = voxel_counts(organs.array)
        findings += _value_findings(folder, case, counts)
        findings += _contoured_findings(folder, case, counts)
        findings += _side_findings(folder, case, organs, label_set)
        if image is not None and not broken:
            measured = fingerprint(case.name, image, organs, folder.labels)
    return Examined(case, tuple(findings), measured, None if image is None else _digest(image.array))


def _read(case: Case, path: Path, findings: list[Finding]) -> Volume | None:
    repair = f"copy the intact file to {path}, or delete the entry of {case.name} from cases.json"
    try:
        return read_volume(path)
    except InputError as error:
        findings += [Finding(case.name, "error", problem, repair) for problem in error.problems]
        return None


def _whole_numbers(case: Case, label: Volume, findings: list[Finding]) -> Volume | None:
    """The label map as integers, whatever type the file stores, or None and a finding."""
    array = label.array
    if array.dtype.kind in "iu":
        return label
    odd = array[~np.isfinite(array) | (array != np.rint(array))]
    if not odd.size:
        return Volume(array.astype(np.int32), label.geometry)
    cause = f"{case.label}: {odd.size} voxels are no whole number, such as {odd[0]:g}, expected a label map"
    findings.append(
        Finding(case.name, "error", cause, "export the label map again with nearest-neighbour interpolation")
    )
    return None


def _grid_findings(case: Case, image: Geometry, label: Geometry) -> list[Finding]:
    difference = label.difference(image)
    if difference is None:
        return []
    cause = f"{case.label}: {difference} (label vs image), expected the grid of image.nii.gz"
    repair = "export the contours again on this scan, or import the case with the scan they were drawn on"
    return [Finding(case.name, "error", cause, repair)]


def _image_findings(case: Case, hu: Array) -> list[Finding]:
    """Voxels that cannot be CT numbers. hu: [i, j, k]."""
    low, high = float(hu.min()), float(hu.max())
    soft_low, soft_high = SOFT_TISSUE_HU
    again = "export the scan again as CT numbers in HU (air -1000, water 0)"
    if not np.isfinite((low, high)).all():
        cause = "voxels that are no finite number, expected CT numbers in HU"
        return [Finding(case.name, "error", f"{case.image}: {cause}", again)]
    if low == high:
        return [
            Finding(case.name, "error", f"{case.image}: every voxel is {low:g}, expected a CT scan", again)
        ]
    found = f"{case.image}: values from {low:g} to {high:g}"
    if not ((hu >= soft_low) & (hu <= soft_high)).any():
        cause = f"{found}, none from {soft_low} to {soft_high}, expected soft tissue there"
        return [Finding(case.name, "error", cause, again)]
    if low > soft_low:
        cause = f"{found}, expected air near -1000 HU (unsigned numbers with an offset, or a cropped scan?)"
        return [Finding(case.name, "warning", cause, f"if the numbers carry an offset, {again}")]
    return []


def _value_findings(folder: CaseFolder, case: Case, counts: Mapping[int, int]) -> list[Finding]:
    unknown = sorted(counts.keys() - {0} - folder.labels.keys())
    if not unknown:
        return []
    found = ", ".join(f"{value} ({counts[value]} voxels)" for value in unknown[:MOST_VALUES])
    more = f" and {len(unknown) - MOST_VALUES} more" if len(unknown) > MOST_VALUES else ""
    known = ", ".join(str(value) for value in sorted(folder.labels))
    cause = f"{case.label}: unknown label values {found}{more}, expected 0 or one of {known}"
    repair = f"name these values in {folder.root / 'labels.json'}, or set the voxels to 0"
    return [Finding(case.name, "error", cause, repair)]


def _contoured_findings(folder: CaseFolder, case: Case, counts: Mapping[int, int]) -> list[Finding]:
    path, findings = folder.root / "cases.json", []
    for value, organ in folder.labels.items():
        voxels = counts.get(value, 0)
        if voxels and organ not in case.contoured:
            cause = f"{case.label}: {voxels} voxels of {organ}, which contoured in {path} does not list"
            repair = f"medattn check {folder.root} --repair (adds {organ}), or set the voxels to 0"
            findings.append(Finding(case.name, "error", cause, repair))
        if not voxels and organ in case.contoured:
            cause = f"{case.label}: {organ} is contoured and empty: someone looked, and there is none"
            repair = (
                f"nothing, if so; if nobody drew it, remove {organ} from contoured of {case.name} in {path}"
            )
            findings.append(Finding(case.name, "note", cause, repair))
    return findings


def _side_findings(folder: CaseFolder, case: Case, label: Volume, label_set: LabelSet) -> list[Finding]:
    organs = {value: label_set.describe(name) for value, name in folder.labels.items()}
    repair = f"swap the two values in the label map, or correct the orientation of both files of {case.name}"
    return [
        Finding(case.name, "error", f"{case.label}: {sentence}", repair)
        for sentence in side_errors(label.array, label.geometry, organs)
    ]


def _digest(array: Array) -> str:
    """Hash of the voxels, their shape and type, the same for any file that stores them."""
    digest = hashlib.blake2b(f"{array.shape} {array.dtype.str}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array.T).data)
    return digest.hexdigest()
