"""Images as files: a folder per class, or the official validation images with their labels beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import io

from medattn.data.images.classes import Classes, listed
from medattn.errors import InputError

SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
# a damaged MATLAB file, one of version 7.3, one of something else
NO_SYNSETS = (OSError, KeyError, ValueError, TypeError, IndexError, NotImplementedError)
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Files under `folder` with a class index each.

    files: [n] relative names as bytes: a million strings would cost ten times their letters. targets: [n]
    int64.
    """

    folder: Path
    files: npt.NDArray[np.bytes_]
    targets: npt.NDArray[np.int64]
    classes: Classes

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        """The path, for messages."""
        return str(self.folder / os.fsdecode(bytes(self.files[index])))

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError."""
        return Path(self.name(index)).read_bytes()


def image_folder(folder: str | Path, classes: Classes | None = None, *, partial: bool = False) -> ImageFolder:
    """Every image under `folder/<wnid>/`, sorted by class and name.

    classes: those of the training set, or of a model; without them the folders' names in sorted order.
    partial: accept that some of `classes` have no folder, as when a model for 1000 classes is evaluated on a
    few.

    Raises InputError for a folder without classes, a class without images, wnids that `classes` does not have
    and, unless `partial`, classes without a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder, expected one folder of images per class; correct the path"
        )
    wnids = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    if not wnids:
        raise InputError(
            f"{folder}: no folders in it, expected one folder of images per class, named by wnid; for the "
            "flat official validation images give their labels"
        )
    if classes is None:
        classes = Classes.of(wnids)
    classes.require_known(wnids, str(folder))
    found = {wnid: sorted(_files(folder, wnid)) for wnid in wnids}
    if empty := [wnid for wnid, files in found.items() if not files]:
        raise InputError(
            f"{folder}: no image in {len(empty)} class folders ({listed(empty)}), expected at least one of "
            f"{', '.join(sorted(SUFFIXES))}; add images or remove the folders"
        )
    if not partial:
        classes.require_all((classes.index[wnid] for wnid in wnids), str(folder))
    targets = np.repeat([classes.index[wnid] for wnid in wnids], [len(found[wnid]) for wnid in wnids])
    files = np.array([file for wnid in wnids for file in found[wnid]], dtype=np.bytes_)
    return ImageFolder(folder, files, targets.astype(np.int64), classes)


def validation_images(
    folder: str | Path, classes: Classes, *, labels: str | Path | None = None, partial: bool = False
) -> ImageFolder:
    """The validation images of a data set whose training set has `classes`, in any of three layouts.

    labels None: `folder/<wnid>/`, as `image_folder`. A text file: flat images, a line `file wnid` each. A
    folder: the devkit's `data`, whose ground truth has one ILSVRC2012_ID per image in the order of file
    names and whose `meta.mat` says which wnid an id means.

    Raises InputError as `image_folder` does, and for labels and files that do not belong together.
    """
    if labels is None:
        return image_folder(folder, classes, partial=partial)
    folder, labels = Path(folder), Path(labels)
    pairs = _devkit_pairs(folder, labels) if labels.is_dir() else _listed_pairs(folder, labels)
    classes.require_known((wnid for _, wnid in pairs), str(labels))
    targets = np.array([classes.index[wnid] for _, wnid in pairs], dtype=np.int64)
    if not partial:
        classes.require_all(targets.tolist(), str(labels))
    return ImageFolder(folder, np.array([file for file, _ in pairs], dtype=np.bytes_), targets, classes)


def _files(folder: Path, below: str) -> Iterator[bytes]:
    """Images anywhere below a folder of `folder`; hidden ones are what archivers of other systems leave."""
    for parent, _, names in os.walk(folder / below, followlinks=True):
        for name in names:
            if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122
                yield os.fsencode(os.path.relpath(os.path.join(parent, name), folder))  # noqa: PTH118


def _flat_files(folder: Path) -> list[bytes]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected the validation images; correct the path")
    return sorted(
        os.fsencode(entry.name)
        for entry in os.scandir(folder)
        if entry.name[0] != "." and Path(entry.name).suffix.lower() in SUFFIXES
    )


def _listed_pairs(folder: Path, labels: Path) -> list[tuple[bytes, str]]:
    """File and wnid from lines `file wnid`, in the order of the files' names."""
    pairs = []
    for number, line in enumerate(_lines(labels), start=1):
        file, _, wnid = line.rpartition(" ")
        if not file or wnid.isdigit():  # a class number does not say in which order it counts
            raise InputError(
                f"{labels} line {number}: {line!r}, expected `file wnid`; write the wnid of each file"
            )
        pairs.append((os.fsencode(file.strip()), wnid))
    here = set(_flat_files(folder))
    if missing := [os.fsdecode(file) for file, _ in pairs if file not in here]:
        raise InputError(
            f"{labels}: {len(missing)} of {len(pairs)} files are not in {folder} ({listed(missing)}), "
            "expected all; complete the folder or correct the list"
        )
    return sorted(pairs)


def _devkit_pairs(folder: Path, devkit: Path) -> list[tuple[bytes, str]]:
    """File and wnid from the devkit's ground truth: line n belongs to the n-th file by name."""
    wnid_of = _devkit_wnids(devkit / "meta.mat")
    path, files = devkit / GROUND_TRUTH, _flat_files(folder)
    ids = list(_lines(path))
    if len(ids) != len(files):
        raise InputError(
            f"{folder}: {len(files)} images, expected {len(ids)}, one per line of {path}; complete the folder"
        )
    if unknown := sorted(set(ids) - set(wnid_of)):
        raise InputError(
            f"{path}: ids without a wnid in {devkit / 'meta.mat'} ({listed(unknown)}), expected "
            "ILSVRC2012_IDs; take both files from one devkit"
        )
    return [(file, wnid_of[number]) for file, number in zip(files, ids, strict=True)]


def _devkit_wnids(path: Path) -> dict[str, str]:
    """ILSVRC2012_ID, as text, -> wnid; the first two fields of each synset in the devkit's MATLAB file."""
    try:
        synsets: Any = io.loadmat(str(path), squeeze_me=True)["synsets"]
        return {str(int(synset[0])): str(synset[1]) for synset in synsets}
    except (*NO_SYNSETS, io.matlab.MatReadError) as error:
        raise InputError(
            f"{path}: the devkit's synsets cannot be read ({error}), expected ILSVRC2012_devkit_t12/data; "
            "give that folder, or a text file with a line `file wnid` per image"
        ) from error


def _lines(path: Path) -> Sequence[str]:
    """Non-empty lines with single spaces for tabs."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}), expected a text file; correct the path"
        ) from error
    return [line.strip().replace("\t", " ") for line in text.splitlines() if line.strip()]
