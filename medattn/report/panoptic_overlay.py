"""Segments painted over a photo: a colour per instance, borders, and names where there is room for them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from medattn.panoptic import VOID, Categories, Colour, Segment

OPACITY = 0.55
UNLABELLED = 0.35  # how much of the photo's light VOID keeps
BORDER = (255, 255, 255)
SMALLEST = 0.008  # share of the picture that a segment needs for its name
INSIDE = 0.4  # share of the name that has to lie on its segment
STEPS = ((0.0, 1.0), (-0.07, 0.75), (0.07, 1.2), (-0.035, 1.35), (0.035, 0.6))  # of instances: hue, lightness


def overlay(
    image: Image.Image,
    ids: npt.NDArray[np.integer[Any]],
    segments: Sequence[Segment],
    categories: Categories,
) -> Image.Image:
    """An RGB picture of the photo under its segments.

    image: RGB of width and height of ids [h, w]. Pixels of no segment are darkened. Segments of one category
    have shades of its colour, the same for the same list of segments.

    Raises ValueError where sizes differ.
    """
    if image.size != ids.shape[::-1]:
        raise ValueError(f"a photo of {image.size} for ids of {ids.shape}, expected one size")
    known = np.array([VOID, *(segment.id for segment in segments)], np.int64)
    order = known.argsort()
    place = order[np.searchsorted(known, ids, sorter=order).clip(max=len(known) - 1)]
    place = np.where(known[place] == ids, place, 0)  # [h, w] 0 for VOID, else 1 + number of the segment
    colours = np.array([(0, 0, 0), *_colours(segments, categories)], np.float32)
    share = np.where(place == 0, 1 - UNLABELLED, OPACITY).astype(np.float32)[..., None]
    painted = np.asarray(image, np.float32) * (1 - share) + colours[place] * share
    borders = _borders(place)
    painted[borders] = 0.25 * painted[borders] + 0.75 * np.array(BORDER, np.float32)
    picture = Image.fromarray(painted.round().astype(np.uint8))
    _write_names(picture, place, segments, categories, colours)
    return picture


def _colours(segments: Sequence[Segment], categories: Categories) -> list[Colour]:
    """A colour per segment: the category's, and for its further instances neighbours of it."""
    seen: dict[int, int] = {}
    found = []
    for segment in segments:
        number = seen.setdefault(segment.category, 0)
        seen[segment.category] += 1
        category = categories[categories.index[segment.category]]
        found.append(_shade(category.colour, *STEPS[number % len(STEPS)]) if number else category.colour)
    return found


def _shade(colour: Colour, turn: float, light: float) -> Colour:
    hue, lightness, saturation = colorsys.rgb_to_hls(*(part / 255 for part in colour))
    red, green, blue = colorsys.hls_to_rgb(
        (hue + turn) % 1.0, min(0.85, max(0.15, lightness * light)), saturation
    )
    return round(255 * red), round(255 * green), round(255 * blue)


def _borders(place: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """[h, w]: the pixels above and left of which another segment begins."""
    found = np.zeros(place.shape, np.bool_)
    found[1:] |= place[1:] != place[:-1]
    found[:, 1:] |= place[:, 1:] != place[:, :-1]
    return found


def _write_names(
    picture: Image.Image,
    place: npt.NDArray[np.intp],
    segments: Sequence[Segment],
    categories: Categories,
    colours: npt.NDArray[np.float32],
) -> None:
    """The largest segments first, each where it is widest; a name that would cover another is left out."""
    areas = np.bincount(place.ravel(), minlength=len(segments) + 1)
    large = [n for n in (-areas[1:]).argsort(kind="stable") + 1 if areas[n] >= max(SMALLEST * place.size, 1)]
    if not large:
        return
    free = np.pad(~_borders(place), 1)  # the edge of the picture is a border too
    depth = ndimage.distance_transform_edt(free)[1:-1, 1:-1]
    spots: list[tuple[int, int]] = ndimage.maximum_position(depth, place, large)  # type: ignore[assignment]
    size = max(11, round(min(picture.size) / 24))
    font, draw = ImageFont.load_default(size), ImageDraw.Draw(picture)
    taken: list[tuple[float, float, float, float]] = []
    for number, (row, column) in zip(large, spots, strict=True):
        name = categories[categories.index[segments[number - 1].category]].name
        box = draw.textbbox((0, 0), name, font=font, anchor="mm", stroke_width=1)
        width, height = box[2] - box[0], box[3] - box[1]
        if 2 * depth[row, column] < height:
            continue
        x = min(max(column, width / 2 + 1), picture.width - width / 2 - 1)
        y = min(max(row, height / 2 + 1), picture.height - height / 2 - 1)
        here = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        left, top, right, bottom = (max(0, round(side)) for side in here)
        inside = float((place[top:bottom, left:right] == number).mean())
        if width > picture.width or inside < INSIDE or any(_meet(here, other) for other in taken):
            continue
        taken.append(here)
        ink, edge = _inks(picture, here)
        draw.text((x, y), name, fill=ink, font=font, anchor="mm", stroke_width=1, stroke_fill=edge)


def _inks(picture: Image.Image, box: tuple[float, float, float, float]) -> tuple[str, str]:
    """Of letters and their outline: whichever of black and white stands out from what lies below."""
    below = np.asarray(picture.crop(tuple(round(side) for side in box)).convert("L"), np.float32)  # type: ignore[arg-type]
    return ("black", "white") if below.mean() > 140 else ("white", "black")


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
