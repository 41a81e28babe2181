"""Folders of label maps, of predictions and references alike, with their organs known by the label set."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medattn.data.cases import read_cases, read_labels
from medattn.errors import InputError
from medattn.geometry import Array
from medattn.io import Volume, read_volume
from medattn.io.volume import SUFFIXES, volume_stem
from medattn.labels import LabelSet, Organ


@dataclass(frozen=True)
class Segmentations:
    """A folder of label maps.

    organs: voxel value -> organ. files, images: by case. contoured: case -> standard names, where known.
    """

    root: Path
    organs: Mapping[int, Organ]
    files: Mapping[str, Path]
    images: Mapping[str, Path]
    splits: Mapping[str, str]
    contoured: Mapping[str, frozenset[str]] | None

    @property
    def names(self) -> set[str]:
        """Standard names of the organs that these maps can hold."""
        return {organ.name for organ in self.organs.values()}

    def value(self, organ: str) -> int:
        """The voxel value of an organ, by its standard name."""
        return next(value for value, known in self.organs.items() if known.name == organ)

    def only(self, cases: Collection[str]) -> Segmentations:
        """The same folder with fewer cases."""
        return replace(self, files={case: path for case, path in self.files.items() if case in cases})


def read_segmentations(folder: str | Path, labels: LabelSet) -> Segmentations:
    """Find the label maps of a folder; the volumes stay closed. Raises InputError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / "cases.json").is_file():
        cases = read_cases(folder)
        return Segmentations(
            root=folder,
            organs=_organs(folder, cases.labels, labels),
            files={case.name: case.label for case in cases.cases},
            images={case.name: case.image for case in cases.cases if case.image.is_file()},
            splits={case.name: case.split or "no split" for case in cases.cases},
            contoured={
                case.name: frozenset(labels.describe(name).name for name in case.contoured)
                for case in cases.cases
            },
        )
    if not (folder / "labels.json").is_file():
        raise InputError(
            f"{folder / 'labels.json'}: no such file; expected voxel value -> organ name beside the label "
            'maps, such as {"1": "Brainstem"} (`medattn predict` and `medattn import` write it)'
        )
    files, images = _loose_files(folder)
    organs = _organs(folder, read_labels(folder / "labels.json"), labels)
    return Segmentations(folder, organs, files, images, dict.fromkeys(files, "no split"), None)


def read_label_map(path: Path, organs: Mapping[int, Organ]) -> Volume:
    """A volume of whole numbers, each 0 or the value of an organ. Raises InputError otherwise."""
    volume = read_volume(path)
    values: Array = np.unique(volume.array)
    unknown = [float(value) for value in values if value != 0 and value not in organs]
    if unknown:
        raise InputError(
            f"{path}: voxel values {unknown[:8]} have no name in labels.json, which has {sorted(organs)}"
        )
    return Volume(volume.array.astype(np.uint8), volume.geometry)


def _organs(folder: Path, names: Mapping[int, str], labels: LabelSet) -> dict[int, Organ]:
    organs = {value: labels.describe(name) for value, name in names.items()}
    standard = [organ.name for organ in organs.values()]
    if twice := sorted({name for name in standard if standard.count(name) > 1}):
        raise InputError(
            f"{folder / 'labels.json'}: two names stand for {', '.join(twice)} in label set {labels.name}"
        )
    return organs


def _loose_files(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Label maps and images by case: `<case>/label.nii.gz` with image.nii.gz, else `<case>.nii.gz`."""
    found = {path.parent.name: path for path in sorted(folder.glob("*/label.nii.gz"))}
    if found:
        images = {case: path.with_name("image.nii.gz") for case, path in found.items()}
        return found, {case: image for case, image in images.items() if image.is_file()}
    flat = [path for path in sorted(folder.iterdir()) if path.name.endswith(SUFFIXES)]
    maps = {volume_stem(path) for path in flat if not path.name.endswith(".seg.nrrd")}
    # an export of the same segmentation for 3D Slicer may lie beside it
    flat = [path for path in flat if not (path.name.endswith(".seg.nrrd") and volume_stem(path) in maps)]
    stems = [volume_stem(path) for path in flat]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise InputError(f"{folder}: two files each for {', '.join(twice)}; keep one")
    if not flat:
        raise InputError(f"{folder}: no <case>.nii.gz and no <case>/label.nii.gz in it")
    return dict(zip(stems, flat, strict=True)), {}
