"""Folders of NIfTI or NRRD files: an image with one label map, or with one file per organ.

Layouts, with any of the suffixes .nii, .nii.gz and .nrrd:

    CASE/image + CASE/label                       the image may also be called ct, img or scan
    CASE/image + CASE/ORGAN ...                   or in CASE/segmentations/, structures/, masks/ or organs/
    images/CASE + labels/CASE
    CASE[_image] + CASE_label                     side by side in one folder

Label maps need SOURCE/labels.json (voxel value -> organ name). Of a label map alone nobody knows which organs
were looked for, so an organ counts as contoured in a case only if it has voxels there, unless the caller says
that all were. An organ with a file of its own is contoured, even if the file is empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from medattn.data.cases import read_labels
from medattn.errors import InputError
from medattn.io.volume import SUFFIXES, volume_stem
from medattn_pipelines.importers.inventory import (
    Inventory,
    Options,
    Pending,
    known_names,
    require_distinct,
    scan_from_map,
    scan_from_masks,
)

IMAGE_NAMES = ("image", "ct", "img", "scan")
LABEL_NAMES = ("label", "labels", "seg", "segmentation", "mask")
ORGAN_FOLDERS = ("segmentations", "structures", "masks", "organs")


@dataclass(frozen=True)
class Files:
    """The files of one case: an image, and a label map or one mask per organ (name as written -> file)."""

    name: str
    image: Path
    label: Path | None = None
    organs: Mapping[str, Path] = field(default_factory=dict)


def find_nifti(source: Path, options: Options) -> Inventory:
    """Find the cases of a folder and name their labels. Raises InputError with everything that is unclear."""
    if (source / "cases.json").exists():
        raise InputError(f"{source}: has a cases.json, so it is in the case layout already; use it as it is")
    found = _find(source)
    maps = [files for files in found if files.label is not None]
    masks = [files for files in found if files.label is None]
    if maps and masks:
        raise InputError(
            f"{source}: {len(maps)} cases have a label map (such as {maps[0].name}) and {len(masks)} a file "
            f"per organ (such as {masks[0].name}); import them separately"
        )
    return _map_inventory(source, maps, options) if maps else _mask_inventory(masks, options)


def _map_inventory(source: Path, cases: Iterable[Files], options: Options) -> Inventory:
    named = read_labels(source / "labels.json")
    known, dropped = known_names(named.values(), options)
    require_distinct(known, options.label_set)
    kept = {value: name for value, name in named.items() if name in known}
    pending = tuple(
        Pending(
            c.name,
            c.name,
            None,
            str(c.image.relative_to(source)),
            partial(scan_from_map, c.image, c.label, named, kept, options.contoured),
        )
        for c in cases
        if c.label is not None
    )
    return Inventory(kept, pending, dropped)


def _mask_inventory(cases: Iterable[Files], options: Options) -> Inventory:
    """Values follow the label set's order. An organ spelled in several ways gets its standard name."""
    cases = tuple(cases)
    known, dropped = known_names((name for case in cases for name in case.organs), options)
    for case in cases:
        require_distinct((name for name in case.organs if name in known), options.label_set)
    spellings: dict[str, list[str]] = {}
    for name in known:
        spellings.setdefault(options.label_set.describe(name).name, []).append(name)
    standard = [organ.name for organ in options.label_set.organs if organ.name in spellings]
    labels = {
        value: spellings[name][0] if len(spellings[name]) == 1 else name
        for value, name in enumerate(standard, start=1)
    }
    value_of = {name: standard.index(options.label_set.describe(name).name) + 1 for name in known}
    pending = []
    for case in cases:
        files = {value_of[n]: (labels[value_of[n]], path) for n, path in case.organs.items() if n in value_of}
        load = partial(scan_from_masks, case.image, files)
        pending.append(Pending(case.name, case.name, None, case.name, load))
    return Inventory(labels, tuple(pending), dropped)


def _find(source: Path) -> list[Files]:
    if (source / "images").is_dir() and (source / "labels").is_dir():
        return _paired(_volumes(source / "images"), _volumes(source / "labels"), source)
    folders = [p for p in sorted(source.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if cases := [p for p in folders if _volumes(p)]:
        found, problems = [], list[str]()
        for folder in cases:
            try:
                found.append(_case_folder(folder))
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(*problems)
        return found
    pattern = re.compile(rf"(.+)[_-]({'|'.join(LABEL_NAMES)})", re.IGNORECASE)
    images, labels = {}, {}
    for stem, path in _volumes(source).items():
        if match := pattern.fullmatch(stem):
            labels[match[1]] = path
        else:
            images[re.sub(rf"[_-]({'|'.join(IMAGE_NAMES)})$", "", stem, flags=re.IGNORECASE)] = path
    return _paired(images, labels, source)


def _paired(images: Mapping[str, Path], labels: Mapping[str, Path], source: Path) -> list[Files]:
    problems = [
        f"{images[name]}: no label map of that name" for name in sorted(images.keys() - labels.keys())
    ]
    problems += [f"{labels[name]}: no image of that name" for name in sorted(labels.keys() - images.keys())]
    if not images and not labels:
        problems.append(
            f"{source}: no case found, expected folders with an image and a label map or one file per organ "
            f"({', '.join(SUFFIXES)}), or the folders images and labels, or pairs CASE and CASE_label"
        )
    if problems:
        raise InputError(*problems)
    return [Files(name, images[name], labels[name]) for name in sorted(images)]


def _case_folder(folder: Path) -> Files:
    volumes = _volumes(folder)
    images = [stem for stem in volumes if stem.lower() in IMAGE_NAMES]
    maps = [stem for stem in volumes if stem.lower() in LABEL_NAMES]
    organs = {stem: path for stem, path in volumes.items() if stem not in images + maps}
    for name in ORGAN_FOLDERS:
        organs |= _volumes(folder / name)
    found = f"found {', '.join(sorted(volumes)) or 'no volume'}"
    if len(images) != 1:
        raise InputError(
            f"{folder}: {found}, expected one image called {', '.join(IMAGE_NAMES[:-1])} or scan"
        )
    if len(maps) > 1 or (maps and organs):
        raise InputError(f"{folder}: {found}, expected one label map or one file per organ, not both")
    if not maps and not organs:
        raise InputError(f"{folder}: {found}, expected a label map called label or one file per organ")
    label = volumes[maps[0]] if maps else None
    return Files(folder.name, volumes[images[0]], label, {} if maps else organs)


def _volumes(folder: Path) -> dict[str, Path]:
    """Stem -> file, of the volumes directly in a folder. Raises InputError for a stem with two suffixes."""
    if not folder.is_dir():
        return {}
    volumes: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(SUFFIXES) and not path.name.startswith("."):
            twin = volumes.setdefault(volume_stem(path), path)
            if twin != path:
                raise InputError(f"{path}: {twin.name} has the same name; keep one of them")
    return volumes
