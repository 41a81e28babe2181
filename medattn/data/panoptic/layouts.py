"""Where the published panoptic data sets keep their files. All are the COCO panoptic format; names differ.

| layout       | JSON below root                          | images below root                               |
|--------------|------------------------------------------|-------------------------------------------------|
| coco         | annotations/panoptic_{split}2017.json    | {split}2017/{file_name}                         |
| cityscapes   | gtFine/cityscapes_panoptic_{split}.json  | leftImg8bit/{split}/{city}/{id}_leftImg8bit.png |
| mapillary    | {split}/v1.2/panoptic/panoptic_2018.json | {split}/images/{id}.jpg                         |
| mapillary    | {split}/panoptic/panoptic_2018.json      | {split}/images/{id}.jpg                         |
| mapillary_v2 | {split}/v2.0/panoptic/panoptic_2020.json | {split}/images/{id}.jpg                         |

Splits are `train` and `val`; Mapillary's folders are called training and validation. PNGs are in the folder
of the JSON's stem beside it, Mapillary's in the folder of the JSON itself. Cityscapes' JSON is made by its
own script createPanopticImgs.py, which writes image names that do not exist (`..._gtFine_leftImg8bit.png`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medattn.errors import InputError
from medattn.panoptic import ImageRecord

SPLITS = {"train": "training", "val": "validation"}  # ours -> Mapillary's

NameOf = Callable[[int | str, str | None], str | None]


@dataclass(frozen=True)
class Places:
    """The files of a split. labels: folder of the PNGs. images: folder of the images.

    name_of: image id and the file name that the JSON lists, None without -> path below `images`, None where
    it cannot be known.
    """

    json: Path
    labels: Path
    images: Path
    name_of: NameOf


def places(layout: str, root: str | Path, split: str) -> Places:
    """Where a split of a data set is. Raises InputError for unknown names and where there is no JSON file."""
    problems = []
    if layout not in LAYOUTS:
        problems.append(f"layout {layout!r}: not known, expected {' or '.join(LAYOUTS)}; correct it")
    if split not in SPLITS:
        problems.append(f"split {split!r}: not known, expected {' or '.join(SPLITS)}; correct it")
    if problems:
        raise InputError(*problems)
    candidates = LAYOUTS[layout](Path(root), split)
    for found in candidates:
        if found.json.is_file():
            return found
    hint = CREATED if layout == "cityscapes" else "correct the folder, the layout or the split"
    raise InputError(
        f"{candidates[0].json}: no such file, expected the panoptic annotations of layout {layout!r}; {hint}"
    )


def all_splits(root: Path) -> list[Places]:
    """Every split of every layout that has its JSON file below a folder."""
    found = [place for layout in LAYOUTS.values() for split in SPLITS for place in layout(root, split)]
    return [place for place in found if place.json.is_file()]


def photo_path(images: Path, image: ImageRecord) -> Path:
    """The photo of an image: by the listed name, or where that is not there by what a layout calls its id."""
    listed = images / image.file_name
    others = (_cityscapes_name(image.id, None), _mapillary_name(image.id, None))
    candidates = (listed, *(images / name for name in others if name is not None))
    return next((path for path in candidates if path.is_file()), listed)


CREATED = "write it with cityscapesscripts/preparation/createPanopticImgs.py, or correct the folder"


def _coco(root: Path, split: str) -> list[Places]:
    json = root / "annotations" / f"panoptic_{split}2017.json"
    return [Places(json, json.with_suffix(""), root / f"{split}2017", _as_listed)]


def _cityscapes(root: Path, split: str) -> list[Places]:
    json = root / "gtFine" / f"cityscapes_panoptic_{split}.json"
    return [Places(json, json.with_suffix(""), root / "leftImg8bit" / split, _cityscapes_name)]


def _mapillary(root: Path, split: str) -> list[Places]:
    folder = root / SPLITS[split]
    files = [folder / version / "panoptic" / "panoptic_2018.json" for version in ("v1.2", "")]
    return [Places(json, json.parent, folder / "images", _mapillary_name) for json in files]


def _mapillary_v2(root: Path, split: str) -> list[Places]:
    folder = root / SPLITS[split]
    json = folder / "v2.0" / "panoptic" / "panoptic_2020.json"
    return [Places(json, json.parent, folder / "images", _mapillary_name)]


def _as_listed(image_id: int | str, listed: str | None) -> str | None:
    return listed


def _cityscapes_name(image_id: int | str, listed: str | None) -> str | None:
    """Ids are city_sequence_frame; each city has a folder."""
    city, *numbers = str(image_id).rsplit("_", 2)
    return f"{city}/{image_id}_leftImg8bit.png" if len(numbers) == 2 else None


def _mapillary_name(image_id: int | str, listed: str | None) -> str | None:
    return f"{image_id}.jpg"


LAYOUTS: dict[str, Callable[[Path, str], list[Places]]] = {
    "coco": _coco,
    "cityscapes": _cityscapes,
    "mapillary": _mapillary,
    "mapillary_v2": _mapillary_v2,
}
