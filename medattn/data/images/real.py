"""ImageNet's reassessed labels (ReaL, Beyer et al. 2020), matched to images by the number in their names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from medattn.errors import InputError

NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\b")


def read_real_labels(path: str | Path, cases: Iterable[str]) -> list[tuple[int, ...]]:
    """The labels of each case from real.json, a list of lists in the order of the validation images' numbers.

    cases: names that contain `ILSVRC2012_val_<number>`, from 1. The labels are class indices in the usual
    order of 1000 wnids; an empty tuple means that no label fits the image.

    Raises InputError for a file of another form, and for cases that are no validation images of ImageNet.
    """
    try:
        labels = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(labels, list) or not all(_is_labels(several) for several in labels):
            raise ValueError("no list of lists of class indices")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no ReaL labels ({error}), expected real.json; give that file") from error
    found = []
    for case in cases:
        number = NUMBER.search(case)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise InputError(
                f"{case}: not one of the {len(labels)} images of {path}, expected ILSVRC2012_val_<number> "
                "in its name; use ReaL labels with ImageNet's own validation images only"
            )
        found.append(tuple(labels[int(number[1]) - 1]))
    return found


def _is_labels(several: object) -> bool:
    return isinstance(several, list) and all(isinstance(label, int) for label in several)
