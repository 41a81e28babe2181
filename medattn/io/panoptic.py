"""The COCO panoptic format: a JSON file, and a folder with a PNG per image whose colours are segment ids."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from medattn.atomic import atomic_path, write_text
from medattn.errors import InputError
from medattn.panoptic import Annotation, Categories, Category, ImageRecord, Segment, spread_colour

LARGEST_ID = 256**3 - 1
LARGEST = 2**31 - 1  # of areas, sides of boxes and category ids: what 32 bits hold
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # of Pillow's readers
T = TypeVar("T")


@dataclass(frozen=True)
class PanopticFile:
    """What a JSON file of the format says, and where its PNGs are.

    categories: None where the file lists none, as a prediction may.
    """

    path: Path
    folder: Path
    annotations: tuple[Annotation, ...]
    images: tuple[ImageRecord, ...] = ()
    categories: Categories | None = None

    @cached_property
    def image(self) -> dict[int | str, ImageRecord]:
        """Image id -> the image."""
        return {image.id: image for image in self.images}

    @cached_property
    def annotation(self) -> dict[int | str, Annotation]:
        """Image id -> its segments."""
        return {annotation.image_id: annotation for annotation in self.annotations}

    def png(self, annotation: Annotation) -> Path:
        """Where an image's segment ids are."""
        return self.folder / annotation.file_name


def read_panoptic(path: str | Path, folder: str | Path | None = None) -> PanopticFile:
    """Read a JSON file; its PNGs stay unread.

    folder: of the PNGs, by default that of the same stem beside the JSON file; where there is none and the
    first PNG is in the folder of the JSON file itself, as in Mapillary Vistas, that one.

    Raises InputError with one line per entry that is malformed or given twice; whether PNGs agree with the
    entries is for `data.panoptic.check` to say.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not readable as JSON ({error}), expected a file of the COCO panoptic format"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise InputError(
            f"{path}: no list `annotations`, expected the COCO panoptic format; give its JSON file"
        )
    problems: list[str] = []
    annotations = _parsed(path, "annotations", content, _annotation, problems)
    images = _parsed(path, "images", content, _image, problems)
    categories = _parsed(path, "categories", content, _category, problems)
    for what, ids in (
        ("annotations", [annotation.image_id for annotation in annotations]),
        ("images", [image.id for image in images]),
        ("categories", [category.id for category in categories]),
    ):
        problems += _repeated(path, what, ids)
    if problems:
        raise InputError(*problems)
    folder = _folder(path, annotations) if folder is None else Path(folder)
    return PanopticFile(path, folder, annotations, images, Categories(categories) if categories else None)


def write_panoptic(
    path: str | Path,
    annotations: Sequence[Annotation],
    *,
    images: Sequence[ImageRecord] = (),
    categories: Categories | None = None,
) -> None:
    """Write a JSON file that `read_panoptic` and panopticapi read; the PNGs are written by `write_ids`."""
    content: dict[str, Any] = {}
    if images:
        content["images"] = [
            {"id": i.id, "file_name": i.file_name, "height": i.height, "width": i.width} for i in images
        ]
    content["annotations"] = [
        {"image_id": a.image_id, "file_name": a.file_name, "segments_info": [_plain(s) for s in a.segments]}
        for a in annotations
    ]
    if categories is not None:
        content["categories"] = [
            {"id": c.id, "name": c.name, "isthing": int(c.thing), "color": list(c.colour)} for c in categories
        ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content) + "\n")


def read_ids(path: str | Path) -> npt.NDArray[np.int32]:
    """[h, w] segment ids of a PNG: red + 256 green + 256^2 blue.

    Raises InputError for a file that is missing, damaged or no picture of 8-bit RGB.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("RGB", "RGBA"):
                raise InputError(
                    f"{path}: a picture of mode {picture.mode}, expected 8-bit RGB, in which segment ids are "
                    "coded; write it as red + 256 green + 65536 blue"
                )
            # Pillow halves 16-bit channels without a word, and other formats than PNG may change ids
            deep = any("16" in str(tile.args) for tile in picture.tile)
            if picture.format != "PNG" or deep:
                found = "16-bit channels" if deep else f"a picture of format {picture.format}"
                raise InputError(
                    f"{path}: {found}, expected a PNG of 8-bit RGB, in which segment ids are coded; write it "
                    "again from the ids"
                )
            rgb = np.asarray(picture)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected the PNG with the image's segment ids") from None
    except DAMAGED as error:
        raise InputError(f"{path}: not readable as a PNG ({error}); copy it again") from None
    channels = rgb.astype(np.int32)
    ids: npt.NDArray[np.int32] = channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]
    return ids


def write_ids(path: str | Path, ids: npt.NDArray[np.integer[Any]]) -> None:
    """Write [h, w] segment ids of 0 to 256^3 - 1 as a PNG, whole or not at all."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= LARGEST_ID:
        raise ValueError(f"segment ids from {ids.min()} to {ids.max()}, expected 0 to {LARGEST_ID}")
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        Image.fromarray(rgb).save(temporary, format="PNG")


def _folder(path: Path, annotations: Sequence[Annotation]) -> Path:
    folder = path.with_suffix("")
    if not folder.is_dir() and annotations and (path.parent / annotations[0].file_name).is_file():
        return path.parent
    return folder


def _parsed(
    path: Path,
    section: str,
    content: Mapping[str, Any],
    parse: Callable[[Any, int], T],
    problems: list[str],
) -> tuple[T, ...]:
    """The entries of a section; those that are malformed become problems."""
    entries, found = content.get(section) or [], []
    if not isinstance(entries, list):
        problems.append(f"{path}: `{section}` is no list, expected one of entries; correct the file")
        return ()
    for number, entry in enumerate(entries):
        try:
            found.append(parse(entry, number))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            problems.append(
                f"{path}: {section}[{number}]: malformed ({reason}), expected an entry of the COCO panoptic "
                "format; correct the file"
            )
    return tuple(found)


def _annotation(entry: Any, number: int) -> Annotation:
    segments = tuple(_segment(segment) for segment in entry["segments_info"])
    return Annotation(_id(entry["image_id"]), str(entry["file_name"]), segments)


def _segment(entry: Any) -> Segment:
    box, number = entry.get("bbox"), int(entry["id"])
    if not 0 <= number <= LARGEST_ID:
        raise ValueError(f"segment id {number}, of 0 to {LARGEST_ID} in a PNG")
    return Segment(
        number,
        _whole(entry["category_id"]),
        bool(entry.get("iscrowd", 0)),
        None if entry.get("area") is None else _whole(entry["area"]),
        None if box is None else _box(box),
        None if entry.get("score") is None else _finite(entry["score"]),
    )


def _whole(value: Any) -> int:
    number = int(value)
    if abs(number) > LARGEST:
        raise ValueError(f"{number}, of at most {LARGEST}")
    return number


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"score {number}, which cannot be ranked")
    return number


def _box(numbers: Any) -> tuple[int, int, int, int]:
    left, top, width, height = map(_whole, numbers)
    return left, top, width, height


def _image(entry: Any, number: int) -> ImageRecord:
    sides = [None if entry.get(side) is None else int(entry[side]) for side in ("height", "width")]
    return ImageRecord(_id(entry["id"]), str(entry["file_name"]), *sides)


def _category(entry: Any, number: int) -> Category:
    colour = entry.get("color")
    red, green, blue = spread_colour(number) if colour is None else (int(part) for part in colour)
    return Category(_whole(entry["id"]), str(entry["name"]), bool(entry["isthing"]), (red, green, blue))


def _id(value: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"image id {value!r}, expected a number or text")
    return value


def _plain(segment: Segment) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": segment.id,
        "category_id": segment.category,
        "iscrowd": int(segment.crowd),
        "area": segment.area,
        "bbox": None if segment.box is None else list(segment.box),
        "score": segment.score,
    }
    return {key: value for key, value in entry.items() if value is not None}


def _repeated(path: Path, what: str, ids: Sequence[int | str]) -> list[str]:
    seen: set[int | str] = set()
    twice = [number for number in ids if number in seen or seen.add(number)]  # type: ignore[func-returns-value]
    return [f"{path}: {what}: id {number!r} is given twice, expected once; remove one" for number in twice]
