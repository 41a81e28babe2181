"""The plan of a run: voxel spacing, patch, intensities and network depth, from the cases' fingerprints.

It is written into the run as `plan.json` and into the model, so that prediction repeats preparation exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from medattn.data.fingerprint import Fingerprint
from medattn.errors import InputError
from medattn.geometry import Size

Triple = tuple[float, float, float]

PATCH_VOXELS = 64**3  # keeps a training step of two patches under a second on two CPU cores
PATCH_MM = 300.0  # wide enough for both sides of a head: only position tells left organs from right ones
SMALLEST_MAP = 4  # voxels along an edge of the coarsest feature map


@dataclass(frozen=True)
class Plan:
    """How cases become network inputs. Axes run L, P, S.

    organs: channels 1, 2, ... of the network's output, by their names in labels.json; 0 is background.
    window_hu: CT numbers are clipped to it and mapped linearly to [-1, 1].
    strides: downsampling per encoder step and axis; their product divides patch_size.
    """

    organs: tuple[str, ...]
    spacing_mm: Triple
    patch_size: Size
    window_hu: tuple[float, float]
    strides: tuple[Size, ...]


def make_plan(
    fingerprints: Sequence[Fingerprint],
    organs: Sequence[str],
    *,
    spacing_mm: Triple | None = None,
    patch_size: Size | None = None,
    window_hu: tuple[float, float] | None = None,
    max_strides: int = 4,
) -> Plan:
    """Fill in what the caller left open: median spacing, a patch that shows the head, the organs' CT numbers.

    Raises InputError where no case has a labelled voxel or patch_size does not divide by the strides.
    """
    ranges = [f.hu_range for f in fingerprints if f.hu_range is not None]
    if not ranges:
        raise InputError("no case has a labelled voxel, so there is nothing to learn from")
    spacing = spacing_mm or _triple(median(f.spacing_mm[axis] for f in fingerprints) for axis in range(3))
    extent = _triple(median(f.size[axis] * f.spacing_mm[axis] for f in fingerprints) for axis in range(3))
    patch = patch_size or _patch(extent, spacing)
    strides = _strides(patch, spacing, max_strides)
    return Plan(
        organs=tuple(organs),
        spacing_mm=spacing,
        patch_size=patch,
        window_hu=window_hu or (median(low for low, _ in ranges), median(high for _, high in ranges)),
        strides=strides,
    )


def _patch(extent_mm: Triple, spacing_mm: Triple) -> Size:
    """About PATCH_VOXELS voxels in the shape of the median case, at most PATCH_MM wide, multiples of 16."""
    shape = [min(PATCH_MM, mm) / step for mm, step in zip(extent_mm, spacing_mm, strict=True)]
    shrink = min(1.0, (PATCH_VOXELS / (shape[0] * shape[1] * shape[2])) ** (1 / 3))
    i, j, k = (max(16, round(n * shrink / 16) * 16) for n in shape)
    return i, j, k


def _strides(patch: Size, spacing_mm: Triple, most: int) -> tuple[Size, ...]:
    """Halve the finely spaced axes first, until voxels are cubes, then all, while maps stay large enough."""
    size, spacing, steps = list(patch), list(spacing_mm), list[Size]()
    for _ in range(most):
        step = [
            2 if mm < 2 * min(spacing) and n % 2 == 0 and n // 2 >= SMALLEST_MAP else 1
            for n, mm in zip(size, spacing, strict=True)
        ]
        if max(step) == 1:
            break
        steps.append((step[0], step[1], step[2]))
        size = [n // s for n, s in zip(size, step, strict=True)]
        spacing = [mm * s for mm, s in zip(spacing, step, strict=True)]
    if not steps:
        raise InputError(
            f"patch_size {patch} is too small or odd; use multiples of 16, at least 16 along one axis"
        )
    return tuple(steps)


def _triple(numbers: Iterable[float]) -> Triple:
    i, j, k = (float(n) for n in numbers)
    return i, j, k
