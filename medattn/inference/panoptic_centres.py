"""Instances as centres: where they are, and which of them each pixel points at (Panoptic-DeepLab, CVPR 2020).

Every image has the same number K of places for centres, so a batch is one tensor and no number of instances
has to come back from the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FAR = 1e18  # pixels: where empty places are; its square is a finite float32
CELL = 8  # pixels, a power of two, so that the cell of a float32 position is found without rounding
ROUNDING = 1e-5  # of a distance in float32, with room: shares of the image's sides
CPU_ELEMENTS = 2**17  # of a table of distances: half a MiB stays in the cache
CUDA_ELEMENTS = 2**26


class Centres(NamedTuple):
    """[B, K] each, in the order of pixels, empty places last: y and x in pixels, there FAR; heat, there 0."""

    y: Tensor
    x: Tensor
    heat: Tensor
    valid: Tensor


def find_centres(heat: Tensor, *, threshold: float, kernel: int, top_k: int, strict: bool) -> Centres:
    """The pixels above the threshold that have the largest heat of the kernel x kernel square around them.

    heat: [B, H, W]. kernel: odd. All pixels of a plateau are centres. Of more than top_k, the warmest are
    kept, among equals the first in the order of rows. strict: only those above the top_k-th are kept, as
    Panoptic-DeepLab's authors and Detectron2 do: top_k - 1 of them, fewer where several share that heat.
    """
    height, width = heat.shape[1:]
    heat = heat.float()
    found = heat > threshold
    heat = torch.where(found, heat, -math.inf)
    found &= heat == _window_maximum(heat, kernel)
    peaks, candidates = found.flatten(1), torch.where(found, heat, -math.inf).flatten(1)
    places = min(top_k, height * width)
    last = candidates.topk(places).values[:, -1:]  # -inf where there are fewer
    above = candidates > last
    if strict and places == top_k:
        kept = above
    else:
        level = peaks & (candidates == last)
        room = places - above.sum(1, keepdim=True)
        kept = above | (level & (level.cumsum(1) <= room))
    pixels = height * width
    rank = torch.arange(pixels, 0, -1, device=heat.device)
    first = torch.where(kept, rank, 0).topk(places).values  # largest rank = first pixel
    first = F.pad(first, (0, top_k - places))
    valid = first > 0
    position = pixels - first.clamp(min=1)
    return Centres(
        torch.where(valid, (position // width).float(), FAR),
        torch.where(valid, (position % width).float(), FAR),
        torch.where(valid, candidates.gather(1, position), 0.0),
        valid,
    )


def group(offset: Tensor, centres: Centres, things: Tensor) -> Tensor:
    """[B, H, W] int64: per pixel 1 + the place of the centre nearest to pixel + offset; 0 where none is.

    offset: [B, 2, H, W], down and right. things: [B, H, W] bool, the pixels that belong to an instance.
    Distances are Euclidean, compared as float32 squares; of equal ones the first place wins.
    """
    height, width = things.shape[1:]
    y = offset[:, 0].float() + torch.arange(height, dtype=torch.float32, device=offset.device)[:, None]
    x = offset[:, 1].float() + torch.arange(width, dtype=torch.float32, device=offset.device)
    things = things & centres.valid[:, :1, None]
    if offset.device.type == "cpu":
        return _by_cells(y, x, centres, things)
    nearest = _nearest(y.flatten(1), x.flatten(1), centres.y, centres.x, CUDA_ELEMENTS)
    return torch.where(things, nearest.view_as(things) + 1, 0)


def _window_maximum(maps: Tensor, kernel: int) -> Tensor:
    """What `max_pool2d` with stride 1 gives, in 2 log2(kernel) steps instead of kernel^2."""
    for axis in (1, 2):
        sides = [kernel // 2, kernel // 2]
        padded = F.pad(maps, sides if axis == 2 else [0, 0, *sides], value=-math.inf)
        span = 1
        while span < kernel:
            step = min(span, kernel - span)
            length = padded.shape[axis] - step
            padded = torch.maximum(padded.narrow(axis, 0, length), padded.narrow(axis, step, length))
            span += step
        maps = padded
    return maps


def _by_cells(y: Tensor, x: Tensor, centres: Centres, things: Tensor) -> Tensor:
    """`group` without most of the distances: a table says in which cells one centre is nearest throughout.

    Moving from the middle of a cell to one of its corners changes a distance by at most half its diagonal, so
    where the second nearest centre of the middle is a diagonal farther than the nearest, the cell is settled.
    What points to other cells, or out of the image, is compared with all centres.
    """
    images, height, width = things.shape
    places = int(centres.valid.sum(1).max())
    if places == 0:
        return torch.zeros(things.shape, dtype=torch.int64)
    centre_y, centre_x = centres.y[:, :places], centres.x[:, :places]
    rows, columns = -(-height // CELL), -(-width // CELL)
    table = _settled(rows, columns, centre_y, centre_x, ROUNDING * (height + width))
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    row, column = (torch.where(inside, place, 0).mul_(1 / CELL).to(torch.int32) for place in (y, x))
    image = torch.arange(images, dtype=torch.int32)[:, None, None] * (rows * columns)
    cell = image + row * columns + column
    slots = table.flatten().index_select(0, cell.flatten()).view_as(cell)
    slots *= inside
    open_ = torch.nonzero((things & (slots == 0)).flatten())[:, 0]
    flat_y, flat_x, flat = y.flatten(), x.flatten(), slots.flatten()
    for chunk in torch.split(open_, max(1, CPU_ELEMENTS // places)):
        of = chunk // (height * width)
        squares = _squares(flat_y[chunk, None], flat_x[chunk, None], centre_y[of], centre_x[of])
        flat[chunk] = squares.argmin(2)[:, 0] + 1
    return flat.view_as(cell) * things


def _settled(rows: int, columns: int, centre_y: Tensor, centre_x: Tensor, rounding: float) -> Tensor:
    """[B, rows * columns]: 1 + the centre that is nearest to every point of the cell, 0 where several are."""
    middle = torch.stack(
        torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    ).flatten(1)
    settled = []
    for y, x in torch.split(CELL * middle, max(1, CPU_ELEMENTS // centre_y.numel()), 1):
        squares = _squares(y[None], x[None], centre_y, centre_x)
        nearest = squares.argmin(2, keepdim=True)
        closest = squares.gather(2, nearest)
        second = squares.scatter_(2, nearest, FAR * FAR).amin(2, keepdim=True)
        gap = second.sqrt() - closest.sqrt()
        settled.append(torch.where(gap > CELL * math.sqrt(2) + rounding, nearest + 1, 0)[..., 0])
    return torch.cat(settled, 1)


def _nearest(y: Tensor, x: Tensor, centre_y: Tensor, centre_x: Tensor, elements: int) -> Tensor:
    """[B, n] places of the nearest of [B, K] centres to points [B, n], `elements` distances at once."""
    size = max(1, elements // centre_y.numel())
    parts = zip(torch.split(y, size, 1), torch.split(x, size, 1), strict=True)
    return torch.cat([_squares(a, b, centre_y, centre_x).argmin(2) for a, b in parts], 1)


def _squares(y: Tensor, x: Tensor, centre_y: Tensor, centre_x: Tensor) -> Tensor:
    """[B, n, K] squared distances, products and sum rounded one by one, so that all devices agree."""
    down, right = y[..., None] - centre_y[:, None], x[..., None] - centre_x[:, None]
    return down.mul_(down).add_(right.mul_(right))
