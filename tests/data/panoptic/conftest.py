"""Small data sets with panoptic labels, written as their publishers lay them out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from medattn.data.panoptic import PanopticImages, panoptic_images
from medattn.io.panoptic import write_ids, write_panoptic
from medattn.panoptic import Annotation, Categories, Category, ImageRecord, Segment

# ids neither sorted nor from 0, so that ids and class indices are never the same
CATEGORIES = Categories(
    (
        Category(24, "person", True, (220, 20, 60)),
        Category(7, "road", False, (128, 64, 128)),
        Category(33, "bicycle", True, (119, 11, 32)),
        Category(23, "sky", False, (70, 130, 180)),
    )
)


def blocks(seed: int, height: int = 24, width: int = 30) -> tuple[npt.NDArray[np.int32], tuple[Segment, ...]]:
    """Labels of coarse blocks, some VOID, with a crowd, a segment that is hidden, and ids beyond 16 bits."""
    rng = np.random.default_rng(seed)
    numbers = np.array([0, 70_000, 3, 24_001, 9, 300])
    coarse = rng.choice(numbers, (height // 6 + 1, width // 6 + 1))
    ids = np.kron(coarse, np.ones((6, 6), int))[:height, :width].astype(np.int32)
    kinds = [(70_000, 24, False), (3, 24, True), (24_001, 33, False), (9, 7, False), (300, 23, False)]
    kept = [kind for kind in kinds if (ids == kind[0]).any()]
    return ids, (*(Segment(*kind) for kind in kept), Segment(5, 33))


def photo(seed: int, height: int = 24, width: int = 30) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def write_tree(root: Path, layout: str, split: str = "train", count: int = 5) -> Path:
    """`count` images in one of the published layouts; returns the root."""
    folder = root / {"train": "training", "val": "validation"}[split]
    json, labels, images, suffix, png = {
        "coco": (
            root / f"annotations/panoptic_{split}2017.json",
            root / f"annotations/panoptic_{split}2017",
            root / f"{split}2017",
            ".jpg",
            "{:012d}.png",
        ),
        "cityscapes": (
            root / f"gtFine/cityscapes_panoptic_{split}.json",
            root / f"gtFine/cityscapes_panoptic_{split}",
            root / "leftImg8bit" / split,
            ".png",
            "{}_gtFine_panoptic.png",
        ),
        "mapillary": (
            folder / "panoptic/panoptic_2018.json",
            folder / "panoptic",
            folder / "images",
            ".jpg",
            "{}.png",
        ),
        "mapillary_v1.2": (
            folder / "v1.2/panoptic/panoptic_2018.json",
            folder / "v1.2/panoptic",
            folder / "images",
            ".jpg",
            "{}.png",
        ),
        "mapillary_v2": (
            folder / "v2.0/panoptic/panoptic_2020.json",
            folder / "v2.0/panoptic",
            folder / "images",
            ".jpg",
            "{}.png",
        ),
    }[layout]
    annotations, records = [], []
    for n in range(count):
        ids, segments = blocks(n)
        if layout == "coco":
            image_id: int | str = 100 + n
            below = listed = f"{image_id:012d}.jpg"
        elif layout == "cityscapes":
            image_id = f"{'aachen' if n % 2 else 'ulm'}_{n:06d}_000019"
            below = f"{image_id.split('_')[0]}/{image_id}_leftImg8bit.png"
            listed = f"{image_id}_gtFine_leftImg8bit.png"  # no such file: as the official script writes it
        else:
            image_id = f"M2kh{n}_x-"
            below = listed = f"{image_id}.jpg"
        (images / below).parent.mkdir(parents=True, exist_ok=True)
        photo(n).save(images / below, **({"quality": 95} if suffix == ".jpg" else {}))
        write_ids(labels / png.format(image_id), ids)
        annotations.append(Annotation(image_id, png.format(image_id), segments))
        records.append(ImageRecord(image_id, listed, *ids.shape))
    write_panoptic(json, annotations, images=records, categories=CATEGORIES)
    return root


@pytest.fixture(scope="session")
def small() -> SimpleNamespace:
    """What the trees are written from: categories, and labels and photos by number."""
    return SimpleNamespace(categories=CATEGORIES, blocks=blocks, photo=photo)


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Writes a data set; see `write_tree`."""
    return lambda layout="coco", **options: write_tree(tmp_path / "set", layout, **options)


@pytest.fixture
def source(tree: Callable[..., Path]) -> PanopticImages:
    """Twelve images."""
    return panoptic_images("coco", tree("coco", count=12), "train")


@pytest.fixture(scope="session")
def mini(shared_data: Path) -> Path:
    """A hundred real images of either split of COCO."""
    return shared_data / "coco_panoptic_mini"
