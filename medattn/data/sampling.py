"""Which patch comes next: organ-balanced, and a function of seed and step alone, so that a run can resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from medattn.data.store import Prepared
from medattn.errors import InputError
from medattn.geometry import Size


@dataclass(frozen=True)
class Batch:
    """Patches for one step. image [B, 1, i, j, k] float32, label [B, i, j, k] uint8, drawn [B, K] bool."""

    image: Tensor
    label: Tensor
    drawn: Tensor
    cases: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        image, label, drawn = (t.to(device, non_blocking=True) for t in (self.image, self.label, self.drawn))
        return Batch(image, label, drawn, self.cases)


@dataclass(frozen=True)
class PatchSampler:
    """Draws patches so that each organ is looked at equally often, however small or rarely drawn it is.

    A share `foreground_share` of the patches is centred near a voxel of an organ: the organ is drawn first,
    then a case that has it. The others lie anywhere in any case.

    batch_size: over all processes. rank, world: this process of how many; together they read the same batch
    for any `world`. Raises InputError when made with a batch that the processes do not share equally.
    """

    cases: Sequence[Prepared]
    patch_size: Size
    batch_size: int
    foreground_share: float
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.world:
            raise InputError(
                f"training.batch_size: {self.batch_size} for {self.world} processes, expected a multiple of "
                f"{self.world}; change it or the number of processes"
            )

    def batch(self, step: int) -> Batch:
        """This process's patches of one step."""
        rng = np.random.default_rng([self.seed, step])
        drawn = [self._place(rng) for _ in range(self.batch_size)][self.rank :: self.world]
        patches = [case.patch(start, self.patch_size) for case, start in drawn]
        return Batch(
            image=torch.from_numpy(np.stack([image for image, _ in patches])[:, None]),
            label=torch.from_numpy(np.stack([label for _, label in patches])),
            drawn=torch.from_numpy(np.stack([case.drawn for case, _ in drawn])),
            cases=tuple(case.case.name for case, _ in drawn),
        )

    def batches(self, start: int, workers: int) -> Iterator[Batch]:
        """All batches from step `start` on, read ahead by `workers` threads."""
        if workers == 0:
            while True:
                yield self.batch(start)
                start += 1
        with ThreadPoolExecutor(workers) as pool:
            ahead: list[Future[Batch]] = [pool.submit(self.batch, start + n) for n in range(2 * workers)]
            while True:
                batch = ahead.pop(0).result()
                ahead.append(pool.submit(self.batch, start + 2 * workers))
                start += 1
                yield batch

    @cached_property
    def _with_organ(self) -> dict[int, list[int]]:
        """Organ -> the cases that hold voxels of it; organs without any are left out."""
        organs = range(len(self.cases[0].anchors))
        found = {o: [n for n, case in enumerate(self.cases) if len(case.anchors[o])] for o in organs}
        return {organ: cases for organ, cases in found.items() if cases}

    def _place(self, rng: np.random.Generator) -> tuple[Prepared, list[int]]:
        """A case and the first voxel of a patch in it."""
        if rng.random() < self.foreground_share:
            organ = int(rng.choice(list(self._with_organ)))
            case = self.cases[int(rng.choice(self._with_organ[organ]))]
            anchor = case.anchors[organ][rng.integers(len(case.anchors[organ]))]
            # the organ lies anywhere in the middle half of the patch, or its place would give it away
            shift = [int(rng.integers(-(n // 4), n // 4 + 1)) for n in self.patch_size]
            start = [int(a) - n // 2 + s for a, n, s in zip(anchor, self.patch_size, shift, strict=True)]
        else:
            case = self.cases[int(rng.integers(len(self.cases)))]
            start = [
                int(rng.integers(min(0, edge - n), max(0, edge - n) + 1))
                for edge, n in zip(case.image.shape, self.patch_size, strict=True)
            ]
        return case, start
