"""JSON files of the COCO panoptic format: what is malformed is named, and where PNGs are looked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medattn.errors import InputError
from medattn.io.panoptic import read_panoptic, write_ids, write_panoptic
from medattn.panoptic import Annotation, Categories, Category, Segment


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "panoptic.json"
    segments = (Segment(70_000, 24, area=6, box=(0, 0, 3, 2)),)
    categories = Categories((Category(24, "person", True, (220, 20, 60)),))
    write_panoptic(path, [Annotation("a", "a.png", segments)], categories=categories)
    return path


def _segment(**values: Any) -> Callable[[Any], None]:
    return lambda content: content["annotations"][0]["segments_info"][0].update(values)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param(_segment(id=2**24), "segment id 16777216", id="id-beyond-24-bits"),
        pytest.param(_segment(id=-1), "segment id -1", id="id-negative"),
        pytest.param(_segment(area=float("inf")), "infinity", id="area-infinite"),
        pytest.param(_segment(area=2**40), "1099511627776", id="area-beyond-32-bits"),
        pytest.param(_segment(bbox=[0, 0, 1]), "expected 4, got 3", id="box-of-three"),
        pytest.param(_segment(score=float("nan")), "score nan", id="score-not-a-number"),
        pytest.param(lambda c: c.update(images=5), "`images` is no list", id="images-a-number"),
        pytest.param(
            lambda c: c.update(categories={"24": "person"}), "is no list", id="categories-a-mapping"
        ),
        pytest.param(
            lambda c: c["categories"].append(c["categories"][0]), "given twice", id="category-twice"
        ),
    ],
)
def test_malformed_entries_are_named(file: Path, change: Callable[[Any], None], sentence: str) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"^{file}: .*{sentence}"):
        read_panoptic(file)


def test_pngs_are_looked_for_in_the_folder_of_the_stem_then_beside_the_file(file: Path) -> None:
    """Mapillary Vistas has them beside the JSON file."""
    stem = file.with_suffix("")
    assert read_panoptic(file).folder == stem
    write_ids(file.parent / "a.png", np.full((2, 3), 70_000))
    assert read_panoptic(file).folder == file.parent
    write_ids(stem / "a.png", np.full((2, 3), 70_000))
    assert read_panoptic(file).folder == stem
