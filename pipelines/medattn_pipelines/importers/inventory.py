"""What every kind of source is brought to before anything is written: cases that can be loaded one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medattn.errors import InputError
from medattn.geometry import Array
from medattn.io import Volume, read_volume
from medattn.labels import LabelSet

Contoured = Literal["present", "all"]


@dataclass(frozen=True)
class Scan:
    """One loaded case: an image and a uint8 label map [i, j, k] on its grid.

    contoured: organs that someone drew. overlap_voxels: voxels that several organs claimed; the lowest value
    has them. extra: further fields of the entry in cases.json.
    """

    image: Volume
    label: Array
    contoured: tuple[str, ...]
    overlap_voxels: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pending:
    """One case of the source, still on disk. load: the scan, or a sentence that says why it is left out."""

    name: str
    group: str
    split: str | None
    source: str
    load: Callable[[], Scan | str]


@dataclass(frozen=True)
class Inventory:
    """A source as found.

    labels: voxel value -> organ name as written. dropped: organs outside the label set, left out on request.
    left_out: case -> why it is not among the cases.
    """

    labels: Mapping[int, str]
    cases: tuple[Pending, ...]
    dropped: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What the caller decides.

    contoured: which organs of a label map without further information count as drawn: those with voxels in
    that case ("present"), or all of labels.json in every case ("all"). drop_unknown: leave out organs that
    the label set does not know, instead of refusing them.
    """

    label_set: LabelSet
    contoured: Contoured = "present"
    drop_unknown: bool = False


def known_names(names: Iterable[str], options: Options) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that the label set knows, and those to drop.

    Raises InputError with every unknown name and its nearest known one, unless they may be dropped, and with
    every pair of names that mean the same organ.
    """
    names = tuple(dict.fromkeys(names))
    unknown = tuple(name for name in names if options.label_set.find(name) is None)
    if unknown and not options.drop_unknown:
        try:
            options.label_set.resolve(unknown)
        except InputError as error:
            raise InputError(
                *error.problems, f"{len(unknown)} unknown organs: use --drop-unknown to leave them out"
            ) from None
    known = tuple(name for name in names if name not in unknown)
    if not known:
        raise InputError(f"none of the organs {list(names)} is in label set {options.label_set.name}")
    return known, unknown


def require_distinct(names: Iterable[str], label_set: LabelSet) -> None:
    """Raise InputError where two names of one label list mean the same organ."""
    first: dict[str, str] = {}
    problems = [
        f"{name!r} and {twin!r} are both {organ} in label set {label_set.name}; rename one"
        for name in names
        for organ in [label_set.describe(name).name]
        if (twin := first.setdefault(organ, name)) != name
    ]
    if problems:
        raise InputError(*problems)


def scan_from_map(
    image_path: Path,
    label_path: Path,
    named: Mapping[int, str],
    kept: Mapping[int, str],
    contoured: Contoured,
) -> Scan:
    """An image with one label map. named: every value that may occur; kept: those that are not dropped.

    Raises InputError for a label map on another grid, with fractions, or with values that have no name.
    """
    image, label = read_volume(image_path), read_volume(label_path)
    problems = list[str]()
    if difference := label.geometry.difference(image.geometry):
        problems.append(_other_grid(label_path, image_path, difference))
    values = np.unique(label.array)
    if odd := [f"{v:g}" for v in values if not (np.isfinite(v) and v == int(v) and int(v) in (0, *named))]:
        problems.append(
            f"{label_path}: values {', '.join(odd[:8])} have no name, expected 0 or one of {sorted(named)}"
        )
    if problems:
        raise InputError(*problems)
    array = label.array.astype(np.uint8)
    array[~np.isin(array, list(kept))] = 0
    present = set(values.astype(int).tolist())
    drawn = tuple(name for value, name in kept.items() if contoured == "all" or value in present)
    return Scan(image, array, drawn)


def scan_from_masks(image_path: Path, masks: Mapping[int, tuple[str, Path]]) -> Scan:
    """An image with one binary file per organ: value -> (name, file). All these organs count as contoured.

    Raises InputError with every mask that is unreadable, on another grid or not binary.
    """
    image = read_volume(image_path)
    label = np.zeros(image.geometry.size, dtype=np.uint8)
    problems, overlap_voxels = list[str](), 0
    for value, (_, path) in sorted(masks.items()):
        try:
            mask = _binary_mask(path, image, image_path)
        except InputError as error:
            problems += error.problems
            continue
        overlap_voxels += add_organ(label, mask, value)
    if problems:
        raise InputError(*problems)
    return Scan(image, label, tuple(name for _, (name, _) in sorted(masks.items())), overlap_voxels)


def add_organ(label: Array, mask: Array, value: int) -> int:
    """Write `value` where the boolean mask holds and no organ is yet; returns the voxels that were taken."""
    free = label == 0
    label[mask & free] = value
    return int(np.count_nonzero(mask & ~free))


def _binary_mask(path: Path, image: Volume, image_path: Path) -> Array:
    volume = read_volume(path)
    if difference := volume.geometry.difference(image.geometry):
        raise InputError(_other_grid(path, image_path, difference))
    mask: Array = volume.array != 0
    inside = volume.array[mask]
    if inside.size and not inside.min() == inside.max():
        raise InputError(
            f"{path}: values from {inside.min():g} to {inside.max():g}, expected 0 and one other"
        )
    return mask


def _other_grid(path: Path, image_path: Path, difference: str) -> str:
    return f"{path}: {difference}, expected the grid of {image_path}; export the contours again on this scan"
