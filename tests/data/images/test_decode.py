"""Every kind of image file becomes upright 8-bit RGB, or a reason why it cannot."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from medattn.data.images import ImageError, decode

RED = (200, 30, 60)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(mode: str, colour: object = RED) -> Image.Image:
    return Image.new("RGB", (9, 7), colour).convert(mode)  # type: ignore[arg-type]


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(image).reshape(-1, 3).tolist()))


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        pytest.param(flat("RGB"), "PNG", RED, id="rgb"),
        pytest.param(flat("L", (90, 90, 90)), "JPEG", (90, 90, 90), id="grey"),
        pytest.param(Image.new("1", (9, 7), 1), "PNG", (255, 255, 255), id="bits"),
        pytest.param(flat("LA", (90, 90, 90)), "PNG", (90, 90, 90), id="grey-alpha"),
        pytest.param(flat("RGBA"), "PNG", RED, id="alpha"),
        pytest.param(flat("RGB").quantize(4), "PNG", RED, id="palette"),
        pytest.param(Image.new("CMYK", (9, 7), (0, 255, 255, 0)), "TIFF", (255, 0, 0), id="cmyk"),
        pytest.param(Image.new("I;16", (9, 7), 257 * 90), "PNG", (90, 90, 90), id="16-bit"),
        pytest.param(Image.new("I;16", (9, 7), 65535), "TIFF", (255, 255, 255), id="16-bit-white"),
        pytest.param(Image.new("RGB", (1, 1), RED), "PNG", RED, id="1-pixel"),
    ],
)
def test_modes(image: Image.Image, kind: str, expected: tuple[int, int, int]) -> None:
    decoded = decode(encoded(image, kind))
    assert decoded.mode == "RGB"
    assert decoded.size == image.size
    assert colours(decoded) == {expected}


def test_cmyk_jpeg_is_not_inverted_twice() -> None:
    """Adobe's files hold inverted values; Pillow writes and reads them so."""
    decoded = decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.asarray(decoded, int) - (255, 0, 0)).max() < 8


def test_a_transparent_palette_loses_its_transparency_without_a_warning() -> None:
    data = encoded(flat("RGB").quantize(4), transparency=b"\x00\x80\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colours(decode(data)) == {RED}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    rng = np.random.default_rng(orientation)
    image = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    stored = Image.open(io.BytesIO(data))
    assert np.array_equal(decode(data), ImageOps.exif_transpose(stored))
    assert np.array_equal(decode(data, upright=False), stored)
    if orientation > 4:
        assert decode(data).size == (6, 9)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encoded(flat("RGB"), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffgarbage")
    assert decode(data).size == (9, 7)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_truncated_files_have_a_reason(kind: str, share: float) -> None:
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)), kind)
    with pytest.raises(ImageError, match=r"\w") as raised:
        decode(data[: int(share * len(data))])
    assert "0x" not in str(raised.value)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"<html>404</html>", id="html"),
        pytest.param(b"\xff\xd8\xff\xe0" + bytes(100), id="jpeg of zeros"),
        pytest.param(encoded(Image.new("F", (3, 3), 0.5), "TIFF"), id="float"),
        pytest.param(encoded(Image.new("I", (3, 3), 70000), "TIFF"), id="32-bit"),
    ],
)
def test_no_images(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode(data)


def test_random_damage_is_never_another_exception() -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        data = np.frombuffer(encoded(image, kind), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with contextlib.suppress(ImageError):
                    assert decode(damaged.tobytes()).mode == "RGB"


def test_full_size_images_are_what_timm_and_torchvision_load(full_size: list[Path]) -> None:
    """Both open with Pillow and convert; none of these images has an orientation."""
    for path in full_size[::4]:
        ours = decode(path.read_bytes())
        assert np.array_equal(ours, Image.open(path).convert("RGB"))
