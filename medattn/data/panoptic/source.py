"""Images with panoptic labels, checked when opened as far as the JSON file and the folders' names tell.

The JSON's entries are kept as one array: as objects, those of COCO's training images would take hundreds of
megabytes in every process, and Python's collector would walk through them again and again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from medattn.data.images.classes import listed
from medattn.data.images.decode import ImageError, decode
from medattn.data.panoptic.layouts import Places, places
from medattn.errors import InputError
from medattn.io.panoptic import PanopticFile, read_ids, read_panoptic
from medattn.panoptic import VOID, Annotation, Categories, ImageRecord, Segment

ENTRY = np.dtype(
    [("id", np.int32), ("category", np.int32), ("crowd", np.bool_), ("area", np.int32), ("box", np.int32, 4)]
)
UNSTATED = -1  # an area, or the width of a box, that the file does not state


class Picture(NamedTuple):
    """An image as it was annotated. image: RGB. ids: [h, w] segment ids, VOID where there is none."""

    image: Image.Image
    ids: npt.NDArray[np.int32]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, eq=False)
class PanopticImages:
    """A split of a data set, one image per annotation, in the order of the file.

    json: the file that lists them. images, labels: folders; image_files, label_files: names below them.
    entries: all segments, those of image i at first[i]:first[i + 1].
    """

    categories: Categories
    json: Path
    images: Path
    labels: Path
    image_ids: tuple[int | str, ...]
    image_files: tuple[str, ...]
    label_files: tuple[str, ...]
    entries: npt.NDArray[np.void]
    first: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def without_segments(self) -> int:
        """How many images have no segment: they are all void."""
        return int(np.count_nonzero(np.diff(self.first) == 0))

    def name(self, index: int) -> str:
        """Where the image is."""
        return str(self.images / self.image_files[index])

    def as_file(self) -> PanopticFile:
        """The same images and segments as what a JSON file says."""
        used = range(len(self))
        return PanopticFile(
            self.json,
            self.labels,
            tuple(Annotation(self.image_ids[i], self.label_files[i], self.segments(i)) for i in used),
            tuple(ImageRecord(self.image_ids[i], self.image_files[i]) for i in used),
            self.categories,
        )

    def segments(self, index: int) -> tuple[Segment, ...]:
        """The segments of an image as the JSON file lists them."""
        return tuple(map(_segment, self.entries[self.first[index] : self.first[index + 1]].tolist()))

    def read(self, index: int) -> Picture:
        """An image and its labels. They belong to the pixels as stored: EXIF orientation is not applied.

        Raises InputError for files that are missing, damaged, of different sizes, or whose PNG has segment
        ids that the JSON file does not list.
        """
        path, png = self.images / self.image_files[index], self.labels / self.label_files[index]
        image, ids, segments = read_image(path), read_ids(png), self.segments(index)
        problems = []
        if ids.shape != (image.height, image.width):
            problems.append(
                f"{path}: {image.width} x {image.height} pixels, but its labels {png} have {ids.shape[1]} x "
                f"{ids.shape[0]}, expected the same; take both from one version of the data set"
            )
        if unlisted := sorted(_values(ids) - {segment.id for segment in segments} - {VOID}):
            problems.append(
                f"{png}: segment ids without an entry in the JSON file ({listed([*map(str, unlisted)])}), "
                "expected one each; take both from one version of the data set"
            )
        if problems:
            raise InputError(*problems)
        return Picture(image, ids, segments)


def panoptic_images(
    layout: str,
    root: str | Path,
    split: str,
    *,
    categories: Categories | None = None,
    limit: int | None = None,
) -> PanopticImages:
    """Open a split, `train` or `val`, of a data set; `layouts` says which files are expected where.

    categories: those of a model, whose order then counts; the file must have the same. limit: only so many
    images from the start of the file.

    Raises InputError with one line per kind of problem: a malformed JSON file, categories that differ or that
    segments do not have, images or PNGs that are missing, images that are listed without an annotation.
    """
    found = places(layout, root, split)
    return open_images(found, read_panoptic(found.json, found.labels), categories, limit)


def open_images(
    found: Places, file: PanopticFile, categories: Categories | None = None, limit: int | None = None
) -> PanopticImages:
    """`panoptic_images` for a file that was read already and for places of any layout."""
    problems: list[str] = []
    known = _categories(file, categories, problems)
    _require_annotations(file, problems)
    used = file.annotations[:limit]
    names = [found.name_of(a.image_id, _listed_name(file, a)) for a in used]
    if nameless := [str(a.image_id) for a, name in zip(used, names, strict=True) if name is None]:
        problems.append(
            f"{file.path}: {len(nameless)} of {len(used)} annotations are of images whose file is not known "
            f"({listed(nameless)}), expected ids as in `images`; correct the file or the layout"
        )
    image_files = [name for name in names if name is not None]
    label_files = [a.file_name for a in used]
    problems += _missing("images", found.images, image_files)
    problems += _missing("PNGs", found.labels, label_files)
    if known is not None:
        problems += _unknown_categories(file.path, used, known)
    if problems or known is None:
        raise InputError(*problems)
    entries = np.array([_entry(s) for a in used for s in a.segments], ENTRY)
    first = np.cumsum([0, *(len(a.segments) for a in used)], dtype=np.int64)
    image_ids = tuple(a.image_id for a in used)
    return PanopticImages(
        known,
        *(found.json, found.images, found.labels),
        *(image_ids, tuple(image_files), tuple(label_files)),
        *(entries, first),
    )


def _categories(file: PanopticFile, wanted: Categories | None, problems: list[str]) -> Categories | None:
    """The categories that count; differences become problems."""
    if file.categories is None:
        problems.append(
            f"{file.path}: no `categories`, expected those of the data set; give the original file"
        )
        return wanted
    if wanted is None:
        return file.categories
    theirs = {c.id: (c.name, c.thing) for c in file.categories}
    ours = {c.id: (c.name, c.thing) for c in wanted}
    if different := sorted(n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n)):
        problems.append(
            f"{file.path}: {len(different)} categories differ from the model's, ids "
            f"{listed([*map(str, different)])}, expected the same ids, names and things; give the data set "
            "that the model was trained on"
        )
    return wanted


def _require_annotations(file: PanopticFile, problems: list[str]) -> None:
    if not file.annotations:
        problems.append(f"{file.path}: no annotations, expected one per image; give the original file")
    if bare := [str(image.id) for image in file.images if image.id not in file.annotation]:
        problems.append(
            f"{file.path}: {len(bare)} of {len(file.images)} images have no annotation ({listed(bare)}), "
            "expected one each; complete the file or remove the images from it"
        )


def _listed_name(file: PanopticFile, annotation: Annotation) -> str | None:
    record = file.image.get(annotation.image_id)
    return None if record is None else record.file_name


def _missing(what: str, folder: Path, names: Sequence[str]) -> list[str]:
    """A problem if files are not there. Each folder is listed once: a look-up per file takes long."""
    here = {
        str(parent / name)
        for parent in {PurePosixPath(n).parent for n in names}
        for name in _names(folder / parent)
    }
    gone = [name for name in names if str(PurePosixPath(name)) not in here]
    if not gone:
        return []
    return [
        f"{folder}: {len(gone)} of {len(names)} {what} are missing ({listed(gone)}), expected all; complete "
        "the folder or correct the path"
    ]


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []


def _unknown_categories(path: Path, used: Sequence[Annotation], known: Categories) -> list[str]:
    unknown = {s.category for s in chain.from_iterable(a.segments for a in used)} - known.index.keys()
    if not unknown:
        return []
    numbers = listed([*map(str, sorted(unknown))])
    names = [str(a.image_id) for a in used if any(s.category in unknown for s in a.segments)]
    return [
        f"{path}: category ids {numbers} of segments in {len(names)} images ({listed(names)}) are no "
        "category, expected those of `categories`; correct the file"
    ]


def read_image(path: Path) -> Image.Image:
    """A photo as RGB, as it is stored: EXIF orientation is not applied. Raises InputError."""
    try:
        return decode(path.read_bytes(), upright=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected an image; complete the folder") from None
    except (OSError, ImageError) as error:
        raise InputError(f"{path}: not readable as an image ({error}); copy it again") from None


def _values(ids: npt.NDArray[np.int32]) -> set[int]:
    """The values that occur. Labels have long runs, so most pixels need no sorting."""
    flat = ids.reshape(-1)
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return set(np.unique(flat[np.append(0, starts)]).tolist())


def _entry(segment: Segment) -> tuple[Any, ...]:
    area = UNSTATED if segment.area is None else segment.area
    box = (0, 0, UNSTATED, 0) if segment.box is None else segment.box
    return segment.id, segment.category, segment.crowd, area, box


def _segment(entry: tuple[Any, ...]) -> Segment:
    number, category, crowd, area, box = entry
    return Segment(
        number,
        category,
        crowd,
        None if area == UNSTATED else area,
        None if box[2] == UNSTATED else tuple(box),
    )
