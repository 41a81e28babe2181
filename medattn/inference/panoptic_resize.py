"""From a network's maps to the resolution of its input, and to that of the image before it was resized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from medattn.errors import InputError
from medattn.panoptic import PanopticOutput

Size = tuple[int, int]
CHUNK_BYTES = 32 * 2**20  # of one map interpolated at once


@dataclass(frozen=True)
class Placement:
    """Where an image is in a network's input. All sizes: height, width in pixels.

    network: of the input. valid: of its upper left part that the image fills; the rest is padding. original:
    of the image before it was resized to `valid`, with pixels as areas, as Pillow does.
    """

    network: Size
    valid: Size
    original: Size

    def __post_init__(self) -> None:
        wrong = []
        for side, network, valid, original in zip(
            ("height", "width"), self.network, self.valid, self.original, strict=True
        ):
            if not 1 <= valid <= network:
                wrong.append(
                    f"placement: {side} {valid} of the image in an input of {network}, expected 1 to that"
                )
            if original < 1:
                wrong.append(f"placement: {side} {original} of the image, expected at least 1")
        if wrong:
            raise InputError(*wrong)

    def positions(self, axis: int, length: int) -> Tensor:
        """[original] float64: where the image's pixels are in a map of `length` over the network's input.

        The first and last pixels of map and input coincide (align_corners).
        """
        network, valid, original = self.network[axis], self.valid[axis], self.original[axis]
        pixel = torch.arange(original, dtype=torch.float64)
        inside = ((pixel + 0.5) * (valid / original) - 0.5).clamp(0, valid - 1)
        return inside * ((length - 1) / max(1, network - 1))

    @property
    def enlargement(self) -> tuple[float, float]:
        """Pixels of the image per pixel of the network's input: down, right."""
        return self.original[0] / self.valid[0], self.original[1] / self.valid[1]


def resized(output: PanopticOutput, size: Size) -> PanopticOutput:
    """Maps of any resolution at the resolution of the network's input, whose height and width are `size`.

    Bilinear with align_corners, float32; offsets are in the input's pixels before and after.
    """
    return restored(output, Placement(size, size, size))


def restored(output: PanopticOutput, placement: Placement) -> PanopticOutput:
    """Maps of any resolution at the resolution of the image, without padding, interpolated once.

    Bilinear, float32; offsets become pixels of the image.
    """
    semantic, centre, offset = (_whole(part, placement) for part in output)
    return PanopticOutput(semantic, centre, offset * enlargement(placement, offset))


def enlargement(placement: Placement, offset: Tensor) -> Tensor:
    """[2, 1, 1]: what offsets in pixels of the network's input are multiplied by."""
    return torch.tensor(placement.enlargement, dtype=torch.float32).to(offset.device)[:, None, None]


def interpolated(maps: Tensor, placement: Placement) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the image after rows: which, and [B, c, rows, W] float32 of maps [B, c, h, w]."""
    across = placement.positions(1, maps.shape[3])
    columns = _between(maps.float(), across, 3)
    positions = placement.positions(0, maps.shape[2])
    step = max(1, CHUNK_BYTES // (4 * columns[:, :, :1].numel()))
    for start in range(0, len(positions), step):
        chunk = positions[start : start + step]
        yield slice(start, start + len(chunk)), _between(columns, chunk, 2)


def _whole(maps: Tensor, placement: Placement) -> Tensor:
    size = placement.network
    if size == placement.valid == placement.original:  # nothing to cut off, and one call of torch does it
        if maps.shape[2:] == size:
            return maps.float()
        return F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=True)
    result = torch.empty(*maps.shape[:2], *placement.original, dtype=torch.float32, device=maps.device)
    for rows, part in interpolated(maps, placement):
        result[:, :, rows] = part
    return result


def _between(maps: Tensor, positions: Tensor, axis: int) -> Tensor:
    """Linear interpolation along an axis, 2 or 3 of four, at positions in its pixels."""
    low = positions.floor().clamp(max=max(0, maps.shape[axis] - 2))
    share = (positions - low).float().to(maps.device)
    first = low.long().to(maps.device)
    after = (first + 1).clamp(max=maps.shape[axis] - 1)
    return torch.lerp(
        maps.index_select(axis, first),
        maps.index_select(axis, after),
        share if axis == 3 else share[:, None],
    )
