"""The doctor of panoptic files: every kind of disagreement is found and named, and nothing else."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from medattn.data.panoptic.check import check_panoptic, sentences
from medattn.data.panoptic.layouts import all_splits, photo_path
from medattn.io.panoptic import read_panoptic, write_ids
from medattn.panoptic import measure

CAT, SKY = 17, 187
Content = dict[str, Any]


@pytest.fixture
def content(tmp_path: Path) -> Content:
    """Two images of 4 x 3 pixels: a cat of 2 x 2 under the sky, and sky alone; PNGs and photos."""
    cat = np.full((3, 4), 300)
    cat[1:, 1:3] = 65_536
    for name, ids in (("a", cat), ("b", np.full((3, 4), 300))):
        write_ids(tmp_path / "panoptic" / f"{name}.png", ids)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (4, 3)).save(tmp_path / "photos" / f"{name}.jpg")
    sky = {"id": 300, "category_id": SKY, "area": 8, "bbox": [0, 0, 4, 3], "iscrowd": 0}
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 3, "width": 4} for n in "ab"],
        "annotations": [
            {
                "image_id": "a",
                "file_name": "a.png",
                "segments_info": [
                    {"id": 65_536, "category_id": CAT, "area": 4, "bbox": [1, 1, 2, 2], "iscrowd": 0},
                    sky,
                ],
            },
            {"image_id": "b", "file_name": "b.png", "segments_info": [sky | {"area": 12}]},
        ],
        "categories": [
            {"id": CAT, "name": "cat", "isthing": 1, "color": [1, 2, 3]},
            {"id": SKY, "name": "sky", "isthing": 0},
        ],
    }


def findings(tmp_path: Path, content: Content, **options: Any) -> list[tuple[str, str, str]]:
    """File, severity and cause of each."""
    path = tmp_path / "panoptic.json"
    path.write_text(json.dumps(content))
    return [(f.case, f.severity, f.cause) for f in check_panoptic(read_panoptic(path), **options)]


def png_of_16_bits(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + b"\0\1" * 3 * 4) * 3)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def test_files_that_agree_have_no_finding(tmp_path: Path, content: Content) -> None:
    seen: list[str] = []
    assert findings(tmp_path, content, images=tmp_path / "photos", on_image=seen.append) == []
    assert seen == ["a.png", "b.png"]
    for annotation in content["annotations"]:  # what a prediction needs, and no more
        annotation["segments_info"] = [
            {"id": s["id"], "category_id": s["category_id"]} for s in annotation["segments_info"]
        ]
    assert findings(tmp_path, {k: v for k, v in content.items() if k != "images"}) == []


CHANGES: dict[str, tuple[Callable[[Content], object], str]] = {
    "an id of the picture alone": (
        lambda c: c["annotations"][0]["segments_info"].pop(0),
        "ids 65536 that no segment of image 'a' has",
    ),
    "an id of the list alone": (
        lambda c: c["annotations"][0]["segments_info"].append({"id": 5, "category_id": CAT}),
        "no pixel of the segments 5 of image 'a'",
    ),
    "area": (
        lambda c: c["annotations"][0]["segments_info"][0].update(area=5),
        "`area` of 1 segments in the JSON is not that of the picture (segment 65536: 5 for 4)",
    ),
    "box": (
        lambda c: c["annotations"][0]["segments_info"][0].update(bbox=[1, 1, 3, 3]),
        "`bbox` of 1 segments in the JSON is not that of the picture (segment 65536: [1, 1, 3, 3] for "
        "[1, 1, 2, 2])",
    ),
    "category": (
        lambda c: c["annotations"][0]["segments_info"][0].update(category_id=0),
        "unknown categories 0, expected ids of the 2",
    ),
    "the same id twice": (
        lambda c: c["annotations"][0]["segments_info"].append({"id": 300, "category_id": CAT}),
        "several segments with the id 300",
    ),
    "the id of void": (
        lambda c: c["annotations"][0]["segments_info"].append({"id": 0, "category_id": CAT}),
        "a segment with the id 0",
    ),
    "size": (lambda c: c["images"][0].update(width=5), "4 x 3 pixels, expected 5 x 3"),
    "a missing PNG": (lambda c: c["annotations"][0].update(file_name="c.png"), "c.png: no such file"),
    "an image without entry": (
        lambda c: c["images"].pop(0),
        "image 'a' has segments and is not among `images`",
    ),
    "one PNG for two images": (
        lambda c: (
            c["annotations"][1].update(c["annotations"][0] | {"image_id": "b"}),
            c["annotations"].reverse(),
        ),
        "one PNG for the images 'b', 'a'",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_disagreement_is_the_only_error_found(name: str, tmp_path: Path, content: Content) -> None:
    change, cause = CHANGES[name]
    change(content)
    ((file, severity, found),) = findings(tmp_path, content)
    assert (severity, file) == ("error", "c.png" if "missing" in name else "a.png")
    assert cause in found
    assert "panoptic" in found, "the file is named"


@pytest.mark.parametrize("mode", ["P", "L", "I;16", "1", "16-bit RGB", "text", "JPEG"])
def test_pictures_in_which_no_ids_can_be(mode: str, tmp_path: Path, content: Content) -> None:
    path = tmp_path / "panoptic" / "a.png"
    if mode == "16-bit RGB":
        png_of_16_bits(path)
    elif mode == "text":
        path.write_text("no picture")
    elif mode == "JPEG":
        Image.new("RGB", (4, 3)).save(path, format="JPEG")
    else:
        Image.new(mode, (4, 3)).save(path)
    ((file, severity, cause),) = findings(tmp_path, content)
    assert (file, severity) == ("a.png", "error")
    assert str(path) in cause


def test_all_problems_of_all_files_are_found_in_their_order(tmp_path: Path, content: Content) -> None:
    for annotation in content["annotations"]:
        annotation["segments_info"][-1].update(area=1, bbox=[9, 9, 9, 9], category_id=3)
    write_ids(tmp_path / "panoptic" / "b.png", np.full((5, 5), 300))
    found = findings(tmp_path, content, workers=3)
    assert [file for file, _, _ in found] == ["a.png"] * 3 + ["b.png"] * 4
    path = tmp_path / "panoptic.json"
    assert len(sentences(check_panoptic(read_panoptic(path)))) == 7


def test_pictures_without_segments_are_warnings(tmp_path: Path, content: Content) -> None:
    write_ids(tmp_path / "panoptic" / "b.png", np.zeros((3, 4), np.int64))
    content["annotations"][1]["segments_info"] = []
    content["images"].append({"id": "c", "file_name": "c.jpg"})
    found = findings(tmp_path, content)
    assert [(file, severity) for file, severity, _ in found] == [("c.jpg", "warning"), ("b.png", "warning")]
    assert "no annotation" in found[0][2]
    assert "without segments" in found[1][2]


def test_photos_that_are_missing_or_of_other_images(tmp_path: Path, content: Content) -> None:
    (tmp_path / "photos" / "a.jpg").unlink()
    Image.new("RGB", (3, 4)).save(tmp_path / "photos" / "b.jpg")
    found = [cause for _, _, cause in findings(tmp_path, content, images=tmp_path / "photos")]
    assert "a.jpg: no such file" in found[0]
    assert "3 x 4 pixels" in found[1]
    content["images"] = []
    found = [cause for _, _, cause in findings(tmp_path, content, images=tmp_path / "photos")]
    assert all("does not say which photo" in cause for cause in found)


def test_without_categories_theirs_are_not_checked_and_that_is_said(tmp_path: Path, content: Content) -> None:
    del content["categories"]
    ((_, severity, cause),) = findings(tmp_path, content)
    assert severity == "note"
    assert "no `categories`" in cause


@given(
    arrays.arrays(
        np.int32,
        st.tuples(st.integers(0, 5), st.integers(0, 5)),
        elements=st.sampled_from([0, 1, 2, 2**24 - 1]),
    )
)
def test_areas_and_boxes_are_those_of_the_pixels(ids: np.ndarray) -> None:
    found = measure(ids)
    assert sorted(found) == np.unique(ids).tolist()
    for number, (area, (left, top, width, height)) in found.items():
        rows, columns = np.nonzero(ids == number)
        assert area == len(rows)
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())


@pytest.mark.shared
def test_real_files_have_no_error(shared_data: Path) -> None:
    root = shared_data / "coco_panoptic_mini"
    file = read_panoptic(root / "annotations" / "panoptic_val2017.json")
    assert check_panoptic(file, images=root / "val2017") == ()


@pytest.mark.parametrize("layout", ["coco", "cityscapes", "mapillary", "mapillary_v1.2", "mapillary_v2"])
def test_photos_are_found_in_every_published_layout(layout: str, tree: Callable[..., Path]) -> None:
    root = tree(layout)
    tree(layout, split="val")
    train, val = all_splits(root)
    assert train.json != val.json
    for split in (train, val):
        file = read_panoptic(split.json)
        of_labels = check_panoptic(file)
        assert check_panoptic(file, images=split.images) == of_labels
        photo_path(split.images, file.images[0]).unlink()
        assert len(check_panoptic(file, images=split.images)) == len(of_labels) + 1
