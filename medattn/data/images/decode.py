"""Encoded bytes to an upright RGB image, whatever they were: grey, CMYK, palette, 16 bits, turned by EXIF.

Pillow decodes. Measured on 100 full-size ImageNet JPEGs, CPU time of one core: simplejpeg needs 13 to 18 %
less and OpenCV 8 to 12 % less to an array, but the transforms that match the published ones take a Pillow
image, and with that conversion simplejpeg gains nothing; decoding at reduced size (`draft`) gains 5 %,
because so few images are twice as large as the network's input.
"""

from __future__ import annotations

import re
import struct
from io import BytesIO

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BUFFER = re.compile(r"<_io\.BytesIO[^>]*>")  # Pillow names it by its address, which differs from run to run
# what Pillow's readers raise on damaged files; SyntaxError is its word for a broken PNG chunk
DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    ZeroDivisionError, struct.error, Image.DecompressionBombError,
)  # fmt: skip


class ImageError(ValueError):
    """These bytes are no usable image; the message is the reason."""


def decode(data: bytes, *, upright: bool = True) -> Image.Image:
    """The first frame as RGB, 8 bits per channel.

    Grey is repeated, CMYK inverted without a colour profile, transparency dropped, all as Pillow's
    `convert("RGB")` and so timm and torchvision do. 16-bit grey is divided by 257, where they clip at 255.

    upright: turn the image as its EXIF orientation says. timm and torchvision do not; so leave it out to
    reproduce a score that they measured. Images without that tag are the same either way.

    Raises ImageError for data that are truncated, damaged, no image, or float or beyond 16 bits.
    """
    try:
        image = Image.open(BytesIO(data))
        image.load()
        turn = UPRIGHT.get(_orientation(image)) if upright else None
        rgb = _rgb(image)
    except DAMAGED as error:
        raise ImageError(BUFFER.sub("the data", str(error)) or type(error).__name__) from error
    return rgb if turn is None else rgb.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode}, expected 8 or 16 bits")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)  # Pillow warns that it would be lost: it is meant to be
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where the tags are missing or damaged: the picture is still good."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except DAMAGED:
        return 1
