"""Data sets as published are read where they lie; whatever is wrong with one is said before training."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medattn.data.panoptic import PanopticImages, panoptic_images
from medattn.errors import InputError
from medattn.io.panoptic import write_ids
from medattn.panoptic import Categories

Tree = Callable[..., Path]
Small = SimpleNamespace


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def coco_json(root: Path) -> Path:
    return root / "annotations/panoptic_train2017.json"


def problems(root: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(InputError) as raised:
        panoptic_images("coco", root, "train", **options)
    return raised.value.problems


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("written", "layout"),
    [
        ("coco", "coco"),
        ("cityscapes", "cityscapes"),
        ("mapillary", "mapillary"),
        ("mapillary_v1.2", "mapillary"),
        ("mapillary_v2", "mapillary_v2"),
    ],
)
def test_a_published_layout_is_read(small: Small, tree: Tree, written: str, layout: str, split: str) -> None:
    images = panoptic_images(layout, tree(written, split=split), split)
    assert len(images) == 5
    assert tuple(c.id for c in images.categories) == (24, 7, 33, 23)
    for n in range(5):
        picture = images.read(n)
        ids, segments = small.blocks(n)
        assert np.array_equal(picture.ids, ids)
        assert picture.ids.dtype == np.int32
        assert picture.segments == images.segments(n) == segments
        assert picture.image.mode == "RGB"
        assert np.abs(np.asarray(picture.image, int) - np.asarray(small.photo(n), int)).mean() < 12
        assert Path(images.name(n)).is_file()


def test_the_two_versions_of_vistas_are_not_mixed_up(tree: Tree) -> None:
    tree("mapillary_v1.2", count=2)
    root = tree("mapillary_v2", count=3)
    assert len(panoptic_images("mapillary", root, "train")) == 2
    assert len(panoptic_images("mapillary_v2", root, "train")) == 3


def test_what_the_file_says_of_a_segment_is_kept(tree: Tree) -> None:
    root = tree()

    def state(content: dict[str, Any]) -> None:
        content["annotations"][1]["segments_info"][0] |= {"area": 0, "bbox": [1, 2, 0, 4]}
        content["annotations"][1]["segments_info"][1] |= {"area": 77}

    edit(coco_json(root), state)
    first, second, *rest = panoptic_images("coco", root, "train").segments(1)
    assert (first.area, first.box) == (0, (1, 2, 0, 4))
    assert (second.area, second.box) == (77, None)
    assert all((segment.area, segment.box) == (None, None) for segment in rest)
    assert all(type(segment.id) is int and type(segment.crowd) is bool for segment in (first, *rest))


def test_only_so_many_images(small: Small, tree: Tree) -> None:
    root = tree()
    (root / "train2017/000000000104.jpg").unlink()
    images = panoptic_images("coco", root, "train", limit=4)
    assert images.image_ids == (100, 101, 102, 103)
    assert images.segments(3) == small.blocks(3)[1]


def test_images_without_segments_are_counted(tree: Tree) -> None:
    root = tree()

    def clear(content: dict[str, Any]) -> None:
        for annotation in content["annotations"][:2]:
            annotation["segments_info"] = []

    edit(coco_json(root), clear)
    write_ids(root / "annotations/panoptic_train2017/000000000100.png", np.zeros((24, 30), np.int32))
    images = panoptic_images("coco", root, "train")
    assert images.without_segments == 2
    picture = images.read(0)
    assert picture.segments == ()
    assert not picture.ids.any()
    with pytest.raises(InputError, match="without an entry"):
        images.read(1)


def test_all_problems_are_said_at_once(tree: Tree) -> None:
    root = tree()
    (root / "train2017/000000000101.jpg").unlink()
    shutil.rmtree(root / "annotations/panoptic_train2017")

    def spoil(content: dict[str, Any]) -> None:
        content["annotations"][0]["segments_info"][0]["category_id"] = 99
        content["images"].append({"id": 7, "file_name": "7.jpg", "height": 3, "width": 3})

    edit(coco_json(root), spoil)
    found = problems(root)
    assert len(found) == 4
    assert any("1 of 6 images have no annotation (7)" in line for line in found)
    assert any("1 of 5 images are missing (000000000101.jpg)" in line for line in found)
    assert any("5 of 5 PNGs are missing" in line for line in found)
    assert any("category ids 99 of segments in 1 images (100)" in line for line in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "no `categories`"),
        (lambda c: c["annotations"].clear(), "no annotations"),
        (lambda c: c["images"].pop(0), r"1 of 5 annotations are of images whose file is not known \(100\)"),
    ],
)
def test_incomplete_files_are_refused(
    tree: Tree, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    root = tree()
    edit(coco_json(root), change)
    with pytest.raises(InputError, match=message):
        panoptic_images("coco", root, "train")


def test_a_models_categories_decide_the_order(small: Small, tree: Tree) -> None:
    root = tree()
    backwards = Categories(small.categories.members[::-1])
    assert panoptic_images("coco", root, "train", categories=backwards).categories is backwards


@pytest.mark.parametrize(
    ("field", "value", "numbers"),
    [("id", 50, "7, 50"), ("name", "lane", "7"), ("thing", True, "7")],
)
def test_other_categories_than_the_models_are_refused(
    small: Small, tree: Tree, field: str, value: object, numbers: str
) -> None:
    members = list(small.categories)
    members[1] = replace(members[1], **{field: value})
    (found,) = problems(tree(), categories=Categories(tuple(members)))[:1]
    assert f"ids {numbers}, expected the same" in found


@pytest.mark.parametrize(
    ("layout", "split", "message"),
    [
        ("ade20k", "train", "expected coco or cityscapes or mapillary or mapillary_v2"),
        ("coco", "test", "expected train or val"),
        ("coco", "val", "panoptic_val2017.json: no such file"),
        ("cityscapes", "train", "createPanopticImgs.py"),
        ("mapillary", "train", "v1.2/panoptic/panoptic_2018.json: no such file"),
    ],
)
def test_what_is_not_there_is_named(tree: Tree, layout: str, split: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        panoptic_images(layout, tree("coco"), split)


def png(root: Path, n: int) -> Path:
    return root / f"annotations/panoptic_train2017/{100 + n:012d}.png"


@pytest.mark.parametrize(
    ("mode", "picture"),
    [
        ("P", Image.fromarray(np.zeros((24, 30), np.uint8)).convert("P")),
        ("L", Image.fromarray(np.zeros((24, 30), np.uint8))),
        ("I;16", Image.fromarray(np.zeros((24, 30), np.uint16))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels_that_are_no_colours_are_refused(tree: Tree, mode: str, picture: Image.Image) -> None:
    root = tree()
    picture.save(png(root, 2))
    images = panoptic_images("coco", root, "train")
    with pytest.raises(InputError, match=f"mode {mode}, expected 8-bit RGB"):
        images.read(2)


def test_an_image_and_labels_of_different_sizes_are_refused(small: Small, tree: Tree) -> None:
    root = tree()
    small.photo(0, 30, 24).save(root / "train2017/000000000100.jpg")
    with pytest.raises(InputError, match=r"24 x 30 pixels, but its labels .* have 30 x 24"):
        panoptic_images("coco", root, "train").read(0)


def test_damaged_and_vanished_files_are_named(tree: Tree) -> None:
    root = tree()
    images = panoptic_images("coco", root, "train")
    path = root / "train2017/000000000100.jpg"
    path.write_bytes(path.read_bytes()[:200])
    (root / "train2017/000000000101.jpg").unlink()
    png(root, 2).write_bytes(b"no picture")
    png(root, 3).unlink()
    for n, message in enumerate(
        ["00100.jpg: not readable", "00101.jpg: no such", "102.png: not", "103.png: no such"]
    ):
        with pytest.raises(InputError, match=message):
            images.read(n)


def test_ids_that_the_file_does_not_list_are_refused(tree: Tree) -> None:
    root = tree()
    edit(coco_json(root), lambda content: content["annotations"][0]["segments_info"].pop(0))
    with pytest.raises(InputError, match=r"segment ids without an entry in the JSON file \(70000\)"):
        panoptic_images("coco", root, "train").read(0)


def save_jpeg(path: Path, image: Image.Image, **options: Any) -> None:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    path.write_bytes(file.getvalue())


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_images_become_rgb(small: Small, tree: Tree, mode: str) -> None:
    root = tree()
    save_jpeg(root / "train2017/000000000100.jpg", small.photo(0).convert(mode), quality=95)
    picture = panoptic_images("coco", root, "train").read(0)
    assert picture.image.mode == "RGB"
    assert picture.image.size == (30, 24)


@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_is_not_applied_since_labels_belong_to_the_stored_pixels(
    small: Small, tree: Tree, orientation: int
) -> None:
    root = tree()
    path = root / "train2017/000000000100.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    save_jpeg(path, small.photo(0), quality=95, exif=exif)
    turned = np.asarray(panoptic_images("coco", root, "train").read(0).image)
    save_jpeg(path, small.photo(0), quality=95)
    plain = np.asarray(panoptic_images("coco", root, "train").read(0).image)
    assert np.array_equal(turned, plain)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize(("split", "segments"), [("train", 1111), ("val", 1078)])
def test_every_real_image_agrees_with_its_labels(mini: Path, split: str, segments: int) -> None:
    images: PanopticImages = panoptic_images("coco", mini, split)
    assert (len(images), len(images.categories), len(images.entries)) == (100, 133, segments)
    assert int(images.categories.things.sum()) == 80
    assert images.without_segments == 0
    for n in range(100):
        picture = images.read(n)
        areas = dict(zip(*np.unique(picture.ids, return_counts=True), strict=True))
        assert {s.id: s.area for s in picture.segments} == {k: v for k, v in areas.items() if k}
