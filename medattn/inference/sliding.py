"""Tiled prediction that hands out finished planes as it goes, so memory is bounded by one tile's depth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medattn.resample import apply_along, linear_weights

Predict = Callable[[Tensor], Tensor]

SLAB_BYTES = 128 * 2**20  # of class scores handed on at once


@torch.no_grad()
def slide(
    image: Tensor,
    predict: Predict,
    tile: Sequence[int],
    *,
    classes: int,
    air: float,
    overlap: float = 0.5,
    batch_size: int = 1,
) -> Iterator[Tensor]:
    """Class probabilities of a volume, plane by plane along its last axis.

    image: [i, j, k]. predict: [B, 1, *tile] -> logits [B, classes, *tile]. air: value outside the volume; a
    tile without anything above it is background and is not computed. overlap: share of a tile that its
    neighbour repeats. Yields [classes, i, j, n] float32 whose n add up to k. Tiles are averaged as logits
    with Gaussian weights of deviation tile / 8 (Isensee et al. 2021).
    """
    size = image.shape
    grown = [max(n, t) for n, t in zip(size, tile, strict=True)]
    image = F.pad(
        image, [p for n, g in zip(size[::-1], grown[::-1], strict=True) for p in (0, g - n)], value=air
    )
    gaussian = _gaussian(tile).to(image)
    rows, columns, depths = (_starts(g, t, overlap) for g, t in zip(grown, tile, strict=True))
    # planes first, so that finished ones leave and empty ones enter without a copy of the whole
    scores = torch.zeros(tile[2], classes, grown[0], grown[1], device=image.device)
    weights = torch.zeros(tile[2], 1, grown[0], grown[1], device=image.device)
    for k, after in itertools.pairwise([*depths, grown[2]]):
        boxes = [(slice(i, i + tile[0]), slice(j, j + tile[1])) for i in rows for j in columns]
        boxes = [box for box in boxes if image[(*box, slice(k, k + tile[2]))].max() > air]
        for first in range(0, len(boxes), batch_size):
            chunk = boxes[first : first + batch_size]
            tiles = torch.stack([image[(*box, slice(k, k + tile[2]))] for box in chunk])[:, None]
            for box, logits in zip(chunk, predict(tiles).float(), strict=True):
                scores[(..., *box)] += (logits * gaussian).movedim(-1, 0)
                weights[(..., *box)] += gaussian.movedim(-1, 0)[:, None]
        step = max(1, SLAB_BYTES // scores[0].nbytes)
        for p in range(0, min(after, size[2]) - k, step):  # no later tile reaches the planes before `after`
            planes = slice(p, min(p + step, min(after, size[2]) - k))
            finished = _probabilities(scores[planes], weights[planes])
            yield finished[..., : size[0], : size[1]].movedim(0, -1)
        _advance(scores, after - k)
        _advance(weights, after - k)


@torch.no_grad()
def label_map(slabs: Iterable[Tensor], depth: int, size: Sequence[int]) -> Tensor:
    """The most probable class per voxel of another grid over the same field of view.

    slabs: [C, i, j, n] probabilities in the order of `slide`, `depth` planes in all. size: of the result,
    uint8 [*size]. Probabilities, not labels, are interpolated, and only a few planes of them exist at a time.
    """
    result = torch.zeros(tuple(size), dtype=torch.uint8)
    along_k = linear_weights(depth, size[2])
    planes: Tensor | None = None
    first, done = 0, 0  # input plane at planes[..., 0]; output planes written
    for slab in slabs:
        planes = slab if planes is None else torch.cat([planes, slab], -1)
        known = first + planes.shape[-1]
        step = max(1, SLAB_BYTES // (4 * len(slab) * size[0] * size[1]))
        while done < size[2]:
            rows = along_k[done : done + step]
            used = torch.nonzero(rows.any(0)).flatten()
            if int(used[-1]) >= known:  # wait for the planes that the last of these rows needs
                rows = rows[~rows[:, known:].any(1)]
                if not len(rows):
                    break
            scores = apply_along(planes, rows[:, first:known], 2)
            for axis in (0, 1):
                if scores.shape[1 + axis] != size[axis]:
                    scores = apply_along(scores, linear_weights(scores.shape[1 + axis], size[axis]), axis)
            result[..., done : done + len(rows)] = scores.argmax(0).to(torch.uint8).cpu()
            done += len(rows)
        if done < size[2]:
            keep = max(first, int(torch.nonzero(along_k[done]).min()))
            planes, first = planes[..., keep - first :].clone(), keep
    return result


def _starts(size: int, tile: int, overlap: float) -> list[int]:
    """First voxels of tiles that cover an axis evenly, neighbours overlapping by at least `overlap`."""
    count = 1 + math.ceil((size - tile) / max(1, tile * (1 - overlap)) - 1e-9)
    return [round(n * (size - tile) / max(1, count - 1)) for n in range(count)]


def _gaussian(tile: Sequence[int]) -> Tensor:
    """[*tile] weights, 1 in the middle, floored so that a voxel seen by one corner alone still counts."""
    axes = [torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in tile]
    return torch.einsum("i,j,k->ijk", *axes).clamp(min=1e-3)


def _probabilities(scores: Tensor, weights: Tensor) -> Tensor:
    """[n, C, i, j] sums of weighted logits -> probabilities; background where no tile was computed."""
    unseen = weights == 0
    probabilities = (scores / weights.masked_fill(unseen, 1)).softmax(1)
    background = torch.zeros(1, scores.shape[1], 1, 1, device=scores.device)
    background[:, 0] = 1
    return torch.where(unseen, background, probabilities)


def _advance(buffer: Tensor, planes: int) -> None:
    """Drop finished planes at the front of [n, ...] and add empty ones at the back, in place."""
    kept = len(buffer) - planes
    for plane in range(kept):
        buffer[plane] = buffer[plane + planes]
    buffer[max(0, kept) :] = 0
