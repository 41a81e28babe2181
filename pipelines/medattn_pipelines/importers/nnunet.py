"""nnU-Net's raw layout, versions 1 and 2 (nnU-Net documentation, dataset_format.md).

Every label counts as contoured in every case: that is what a background voxel means to nnU-Net.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from medattn.errors import InputError
from medattn.io.volume import SUFFIXES
from medattn_pipelines.importers.inventory import (
    Inventory,
    Options,
    Pending,
    known_names,
    require_distinct,
    scan_from_map,
)


def find_nnunet(source: Path, options: Options) -> Inventory:
    """Read `dataset.json` and pair images with labels; imagesTs with labelsTs become the test split.

    Raises InputError for more than one channel, regions, an ignore label, unpaired files and unknown organs.
    """
    path = source / "dataset.json"
    dataset = _read_dataset(path)
    _require_ct(path, dataset)
    named = _labels(path, dataset)
    known, dropped = known_names(named.values(), options)
    require_distinct(known, options.label_set)
    kept = {value: name for value, name in named.items() if name in known}
    ending = dataset.get("file_ending", ".nii.gz")
    if ending not in SUFFIXES:
        raise InputError(f"{path}: file_ending {ending!r}, expected one of {', '.join(SUFFIXES)}")
    train, unpaired = _pairs(source / "imagesTr", source / "labelsTr", ending)
    test, unlabelled = _pairs(source / "imagesTs", source / "labelsTs", ending)
    problems = [f"{source}: case {name}: {reason}" for name, reason in unpaired.items()]
    if not train:
        problems.append(f"{source / 'imagesTr'}: no training image, expected CASE_0000{ending}")
    if dataset.get("numTraining", len(train)) != len(train) and not problems:
        problems.append(
            f"{path}: numTraining is {dataset['numTraining']}, found {len(train)} cases in imagesTr"
        )
    if problems:
        raise InputError(*problems)
    cases = tuple(
        Pending(
            name,
            name,
            split,
            f"{dataset.get('name', source.name)} {name}",
            partial(scan_from_map, image, label, named, kept, "all"),
        )
        for split, pairs in ((None, train), ("test", test))
        for name, (image, label) in pairs.items()
    )
    return Inventory(kept, cases, dropped, unlabelled)


def _read_dataset(path: Path) -> dict[str, Any]:
    try:
        dataset = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected nnU-Net's raw layout (DatasetNNN_NAME)") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(dataset, dict) or not isinstance(dataset.get("labels"), dict):
        raise InputError(f"{path}: expected an object with channel_names (or modality) and labels")
    if "dataset" in dataset:
        raise InputError(
            f"{path}: names its files in 'dataset', expected them in imagesTr and labelsTr; link them there"
        )
    return dataset


def _require_ct(path: Path, dataset: Mapping[str, Any]) -> None:
    channels = dataset.get("channel_names", dataset.get("modality"))
    if not isinstance(channels, dict):
        raise InputError(f'{path}: no channel_names, expected {{"0": "CT"}}')
    if len(channels) != 1 or str(next(iter(channels.values()))).casefold() != "ct":
        raise InputError(f'{path}: channels {channels}, expected one channel {{"0": "CT"}}')


def _labels(path: Path, dataset: Mapping[str, Any]) -> dict[int, str]:
    """Voxel value -> name, without background; version 1 writes value -> name, version 2 name -> value."""
    pairs = dataset["labels"].items()
    if all(str(key).isdigit() for key in dataset["labels"]):
        pairs = [(name, int(value)) for value, name in pairs]
    problems, labels = [], dict[int, str]()
    for name, value in pairs:
        if name == "ignore":
            problems.append(
                f"{path}: has an ignore label, for which the case layout has no counterpart; "
                "leave out the cases that use it and remove it"
            )
        elif isinstance(value, list):
            problems.append(f"{path}: label {name!r} is a region {value}, expected one value per organ")
        elif not isinstance(value, int) or not 0 <= value <= 255:
            problems.append(
                f"{path}: label {name!r} has value {value!r}, expected a whole number from 0 to 255"
            )
        elif value in labels:
            problems.append(f"{path}: value {value} is both {labels[value]!r} and {name!r}")
        elif value != 0:
            labels[value] = str(name)
    if problems:
        raise InputError(*problems)
    return labels


def _pairs(images: Path, labels: Path, ending: str) -> tuple[dict[str, tuple[Path, Path]], dict[str, str]]:
    """Case -> its image and label; and the cases that lack one of them, with the reason."""
    tail = f"_0000{ending}"
    scans = {p.name.removesuffix(tail): p for p in _visible(images) if p.name.endswith(tail)}
    maps = {p.name.removesuffix(ending): p for p in _visible(labels) if p.name.endswith(ending)}
    pairs = {name: (scans[name], maps[name]) for name in sorted(scans.keys() & maps.keys())}
    lacking = {name: f"no label {labels / name}{ending}" for name in sorted(scans.keys() - maps.keys())}
    lacking |= {name: f"no image {images / name}{tail}" for name in sorted(maps.keys() - scans.keys())}
    return pairs, lacking


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
