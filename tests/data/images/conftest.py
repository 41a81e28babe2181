"""Small data sets of images on disk, and the real full-size ones."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medattn.data.images.folder import ImageFolder, image_folder

WNIDS = ("n00000001", "n00000002", "n00000003")


def picture(seed: int, width: int = 13, height: int = 11) -> Image.Image:
    """Smooth enough that resizing and JPEG leave something of it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Writes `per_class` images for each wnid and returns the folder."""

    def write(name: str = "train", wnids: tuple[str, ...] = WNIDS, per_class: int = 4) -> Path:
        for number, wnid in enumerate(wnids):
            (tmp_path / name / wnid).mkdir(parents=True)
            for n in range(per_class):
                image = encoded(picture(100 * number + n))
                (tmp_path / name / wnid / f"{wnid}_{n}.png").write_bytes(image)
        return tmp_path / name

    return write


@pytest.fixture
def source(tree: Callable[..., Path]) -> ImageFolder:
    """Twelve images of three classes."""
    return image_folder(tree())


@pytest.fixture(scope="session")
def full_size(shared_data: Path) -> list[Path]:
    """A hundred images of ImageNet as they were published."""
    return sorted((shared_data / "imagenet_mini/sample_fullsize").rglob("*.JPEG"))
