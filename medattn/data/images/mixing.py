"""Mixup, cutmix and label smoothing: soft targets for a batch, a function of seed and step alone.

Each image is mixed with the one at the mirrored place of the batch, all with one share, timm's batch mode.
mixup: Zhang et al., ICLR 2018. cutmix: Yun et al., ICCV 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medattn.data.images.crops import Box
from medattn.data.images.draws import MIXING, generator
from medattn.data.images.sampling import ImageBatch
from medattn.errors import InputError


@dataclass(frozen=True)
class Mix:
    """share: what stays of the image, 0 to 1. box: what cutmix takes from the partner; None: mixup."""

    share: float
    box: Box | None = None


@dataclass(frozen=True)
class Mixing:
    """classes: columns of the soft targets. mixup, cutmix: Beta parameters, 0 leaves one out.

    probability: of a batch being mixed at all. switch: of cutmix where both are on. smoothing: share of every
    target that is spread over all classes, also in batches that are not mixed.
    """

    classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        shares = (self.probability, self.switch, self.smoothing)
        if min(self.mixup, self.cutmix) < 0 or not all(0 <= share <= 1 for share in shares):
            raise InputError(f"{self}: expected mixup and cutmix of at least 0 and shares from 0 to 1")

    def __call__(self, batch: ImageBatch, *, seed: int, step: int) -> ImageBatch:
        """The mixed batch on its device; target [B] becomes [B, classes] float32.

        Every process of a run draws the same, so that the global batch does not depend on their number.
        """
        height, width = batch.image.shape[2:]
        mix = self.draw(height, width, generator(seed, MIXING, step))
        target = soft_targets(batch.target, self.classes, self.smoothing)
        return replace(batch, image=mixed_images(batch.image, mix), target=mixed_targets(target, mix))

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Mix:
        """How a batch of images of this size is mixed; share 1 where it is not."""
        if rng.random() >= self.probability or not (self.mixup or self.cutmix):
            return Mix(1.0)
        if not self.cutmix or (self.mixup and rng.random() >= self.switch):
            return Mix(float(rng.beta(self.mixup, self.mixup)))
        share = float(rng.beta(self.cutmix, self.cutmix))
        return cut(height, width, share, int(rng.integers(height)), int(rng.integers(width)))


def cut(height: int, width: int, share: float, row: int, column: int) -> Mix:
    """The cutmix of a box about (row, column) of area 1 - share, less where the edges clip it."""
    side = math.sqrt(1 - share)
    h, w = int(height * side), int(width * side)
    top, bottom = max(0, row - h // 2), min(height, row + (h + 1) // 2)
    left, right = max(0, column - w // 2), min(width, column + (w + 1) // 2)
    covered = (bottom - top) * (right - left) / (height * width)
    return Mix(1 - covered, (left, top, right, bottom))


def mixed_images(image: Tensor, mix: Mix) -> Tensor:
    """[B, 3, h, w] mixed with its mirror image along B."""
    if mix.share == 1:
        return image
    if mix.box is None:
        return image * mix.share + image.flip(0) * (1 - mix.share)
    left, top, right, bottom = mix.box
    mixed = image.clone()
    mixed[:, :, top:bottom, left:right] = image.flip(0)[:, :, top:bottom, left:right]
    return mixed


def soft_targets(target: Tensor, classes: int, smoothing: float) -> Tensor:
    """[B, classes] float32: smoothing / classes everywhere, the rest on the class. target: [B] indices."""
    rest = smoothing / classes
    return torch.where(F.one_hot(target, classes).bool(), 1 - smoothing + rest, rest)


def mixed_targets(target: Tensor, mix: Mix) -> Tensor:
    """[B, classes] soft targets mixed as their images were."""
    return target * mix.share + target.flip(0) * (1 - mix.share)
