"""Random changes of a batch of patches, on its device, a function of seed and step alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medattn.data.sampling import Batch


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a patch and how often. Intensity ranges are in units of the normalised CT.

    mirror: organ -> organ when left and right are swapped (`LabelSet.mirror`), or None: never flip.
    """

    spacing_mm: Sequence[float]
    mirror: Sequence[int] | None
    flip_probability: float
    affine_probability: float
    rotate_degrees: float
    scale_range: tuple[float, float]
    translate_mm: float
    intensity_probability: float
    contrast_range: tuple[float, float]
    brightness: float
    gamma_range: tuple[float, float]
    noise: float
    blur_mm: float

    def __call__(self, batch: Batch, *, seed: int, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The changed batch; axes run L, P, S, so the left-right axis is the first spatial one.

        rank, world: which of how many processes share the patches of a step, as in `PatchSampler`.
        """
        # drawn on the CPU, so that the same seed gives the same batch on any device
        rng = _Chance(torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63), rank, world)
        batch = self._flip(batch, rng)
        batch = self._affine(batch, rng)
        return replace(batch, image=self._intensity(batch.image, rng))

    def _flip(self, batch: Batch, rng: _Chance) -> Batch:
        chosen = rng.uniform(len(batch.cases)) < self.flip_probability
        if self.mirror is None or not bool(chosen.any()):
            return batch
        where = chosen.to(batch.image.device)
        swap = torch.tensor(
            [0, *(organ + 1 for organ in self.mirror)], dtype=torch.uint8, device=where.device
        )
        label = swap[batch.label.flip(1).long()]
        return replace(
            batch,
            image=torch.where(where[:, None, None, None, None], batch.image.flip(2), batch.image),
            label=torch.where(where[:, None, None, None], label, batch.label),
            drawn=torch.where(where[:, None], batch.drawn[:, list(self.mirror)], batch.drawn),
        )

    def _affine(self, batch: Batch, rng: _Chance) -> Batch:
        size = torch.tensor(batch.label.shape[1:], dtype=torch.float32)
        changed = rng.uniform(len(batch.cases)) < self.affine_probability
        everyones = [self._matrix(size, rng.generator) for _ in range(rng.world * len(batch.cases))]
        matrices = torch.stack(everyones[rng.rank :: rng.world])
        if not bool(changed.any()):
            return batch
        which = torch.nonzero(changed).flatten().to(batch.image.device)
        image, label = batch.image[which], batch.label[which, None].float()
        grid = F.affine_grid(matrices[changed].to(image.device), list(image.shape), align_corners=False)
        at: dict[str, Any] = {"grid": grid, "padding_mode": "border", "align_corners": False}
        turned = F.grid_sample(label, mode="nearest", **at)[:, 0].to(torch.uint8)
        return replace(
            batch,
            image=batch.image.index_copy(0, which, F.grid_sample(image, **at)),
            label=batch.label.index_copy(0, which, turned),
        )

    def _matrix(self, size: Tensor, rng: torch.Generator) -> Tensor:
        """[3, 4] sampling matrix in grid_sample's coordinates: last axis first, patch edges at -1 and 1."""
        angles = (torch.rand(3, generator=rng) * 2 - 1) * math.radians(self.rotate_degrees)
        low, high = self.scale_range
        zoom = low + (high - low) * torch.rand(1, generator=rng)
        shift_mm = (torch.rand(3, generator=rng) * 2 - 1) * self.translate_mm
        half_mm = size * torch.tensor(self.spacing_mm) / 2
        turn = _rotation(angles) / zoom
        matrix = (turn * half_mm) / half_mm[:, None]  # mm -> fractions of the patch, so that nothing shears
        return torch.cat([matrix, (shift_mm / half_mm)[:, None]], 1).flip(0)[:, [2, 1, 0, 3]]

    def _intensity(self, image: Tensor, rng: _Chance) -> Tensor:
        """Contrast, brightness, gamma, blur and noise, each with its own chance per patch."""
        B = image.shape[0]

        def draw(low: float, high: float, neutral: float) -> Tensor:
            value = low + (high - low) * rng.uniform(B)
            used = rng.uniform(B) < self.intensity_probability
            return torch.where(used, value, neutral).to(image)[:, None, None, None, None]

        contrast = draw(*self.contrast_range, 1.0)
        image = image * contrast + draw(-self.brightness, self.brightness, 0.0)
        gamma = draw(*self.gamma_range, 1.0)
        if bool((gamma != 1).any()):
            low, high = image.amin((1, 2, 3, 4), True), image.amax((1, 2, 3, 4), True)
            span = (high - low).clamp(min=1e-6)
            image = ((image - low) / span) ** gamma * span + low
        image = _blur(image, draw(0.0, self.blur_mm, 0.0), self.spacing_mm)
        deviation = draw(0.0, self.noise, 0.0)
        if bool((deviation != 0).any()):
            image = image + deviation * rng.normal(image.shape).to(image)
        return image


@dataclass(frozen=True)
class _Chance:
    """Numbers drawn for the patches of all processes, of which this one takes its own."""

    generator: torch.Generator
    rank: int
    world: int

    def uniform(self, patches: int) -> Tensor:
        """[patches] from 0 to 1."""
        return torch.rand(self.world * patches, generator=self.generator)[self.rank :: self.world]

    def normal(self, shape: torch.Size) -> Tensor:
        """Of this shape, patches first."""
        drawn = torch.randn(self.world * shape[0], *shape[1:], generator=self.generator)
        return drawn[self.rank :: self.world]


def _rotation(angles: Tensor) -> Tensor:
    """[3, 3] rotation about the three axes in turn, by angles in radians."""
    c, s = angles.cos(), angles.sin()
    zero, one = torch.zeros(()), torch.ones(())
    x = torch.stack([one, zero, zero, zero, c[0], -s[0], zero, s[0], c[0]]).reshape(3, 3)
    y = torch.stack([c[1], zero, s[1], zero, one, zero, -s[1], zero, c[1]]).reshape(3, 3)
    z = torch.stack([c[2], -s[2], zero, s[2], c[2], zero, zero, zero, one]).reshape(3, 3)
    return x @ y @ z


def _blur(image: Tensor, sigma_mm: Tensor, spacing_mm: Sequence[float]) -> Tensor:
    """Gaussian blur with one deviation in mm per patch, separable, edges continued."""
    if not bool((sigma_mm > 0).any()):
        return image
    sigma = sigma_mm.flatten()
    patches = []
    for patch, mm in zip(image, sigma.tolist(), strict=True):
        smooth = patch[None]
        for axis, step in enumerate(spacing_mm):
            if (reach := math.ceil(3 * mm / step)) and mm / step > 0.1:
                offsets = torch.arange(-reach, reach + 1, device=image.device) * step
                kernel = torch.exp(-0.5 * (offsets / mm) ** 2)
                shape, pad = [1, 1, 1, 1, 1], [0] * 6
                shape[2 + axis] = -1
                pad[4 - 2 * axis] = pad[5 - 2 * axis] = reach
                padded = F.pad(smooth, pad, mode="replicate")
                smooth = F.conv3d(padded, (kernel / kernel.sum()).reshape(shape).to(image))
        patches.append(smooth)
    return torch.cat(patches)
