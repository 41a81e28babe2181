"""Which images make the batch of a step, and their targets: a function of seed and step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from medattn.data.images.draws import AUGMENTATION, generator
from medattn.data.images.readahead import Submit, now, read_ahead
from medattn.data.images.reading import Skipped, Tolerance
from medattn.data.images.sampling import UNREADABLE_LIMIT, epoch_order
from medattn.data.panoptic.source import Picture
from medattn.data.panoptic.targets import TargetArrays
from medattn.data.panoptic.transforms import PanopticTransform, Sample
from medattn.errors import InputError
from medattn.panoptic import Categories, PanopticTargets

Read = tuple[int, tuple[Skipped, ...]]


class PanopticSource(Protocol):
    """A data set of images with segments. `PanopticImages` is one."""

    @property
    def categories(self) -> Categories:
        """What the targets count."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where the image is, for messages."""

    def read(self, index: int) -> Picture:
        """An image and its labels. Raises InputError."""


@dataclass(frozen=True)
class PanopticBatch:
    """Images of one step. image: [B, 3, h, w] float32. cases: [B] where each image came from.

    skipped: images that could not be used while these were read.
    """

    image: Tensor
    targets: PanopticTargets
    cases: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()

    def to(self, device: torch.device) -> PanopticBatch:
        """The batch on another device."""
        moved = PanopticTargets(*(t.to(device, non_blocking=True) for t in self.targets))
        return PanopticBatch(self.image.to(device, non_blocking=True), moved, self.cases, self.skipped)


@dataclass(frozen=True)
class TrainingPanoptic:
    """Batches without end, every epoch in a new order; what whole batches leave of an epoch is dropped.

    batch_size: over all processes. rank, world: this process of how many; together they read the same batch
    for any `world`. unreadable_limit: so many images may be damaged; the next one in the source takes the
    place, which depends on the files alone.

    Raises InputError when made with a batch that the images or the processes do not fit.
    """

    source: PanopticSource
    transform: PanopticTransform
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    unreadable_limit: int = UNREADABLE_LIMIT

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= len(self.source):
            raise InputError(
                f"batch of {self.batch_size} from {len(self.source)} images, expected 1 to "
                f"{len(self.source)}; lower the batch size"
            )
        if not 0 <= self.rank < self.world or self.batch_size % self.world:
            raise InputError(
                f"batch of {self.batch_size} for process {self.rank} of {self.world}, expected a multiple of "
                "the processes; change the batch size or their number"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in as many images as the source has."""
        return len(self.source) // self.batch_size

    @property
    def places(self) -> range:
        """The places in the global batch that this process reads."""
        return range(self.rank, self.batch_size, self.world)

    def batch(self, step: int) -> PanopticBatch:
        """This process's part of one step. Raises InputError when too many images cannot be used."""
        return self._begin(step, now)()

    def batches(self, start: int, workers: int, *, pin_memory: bool = False) -> Iterator[PanopticBatch]:
        """All batches from step `start` on, read ahead by `workers` threads; 0 reads in this thread.

        Raises InputError when more than `unreadable_limit` images could not be used. pin_memory: in
        page-locked memory, from where a copy to a GPU overlaps with computing.
        """
        steps = (partial(self._begin, step, pin_memory=pin_memory) for step in count(start))
        return read_ahead(steps, workers, Tolerance(self.unreadable_limit))

    def _begin(self, step: int, submit: Submit, *, pin_memory: bool = False) -> Callable[[], PanopticBatch]:
        epoch, within = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.source), self.seed, epoch)
        chosen = order[within * self.batch_size :][list(self.places)].tolist()
        image, wanted = _empty(len(chosen), self.transform.shape, pin_memory)
        reads = [
            submit(partial(self._read, index, partial(generator, self.seed, AUGMENTATION, step, place), out))
            for index, place, out in zip(chosen, self.places, _samples(image, wanted), strict=True)
        ]
        return partial(self._finish, image, wanted, reads)

    def _finish(
        self, image: Tensor, wanted: PanopticTargets, reads: Sequence[Callable[[], Read]]
    ) -> PanopticBatch:
        done = [read() for read in reads]
        skipped = tuple(one for _, several in done for one in several)
        return PanopticBatch(image, wanted, tuple(self.source.name(index) for index, _ in done), skipped)

    def _read(self, index: int, rng: Callable[[], np.random.Generator], out: Sample) -> Read:
        """Fill `out` from sample `index` or the next that can be used; returns it and what was skipped."""
        skipped: list[Skipped] = []
        limit = min(self.unreadable_limit, len(self.source) - 1)
        while True:
            used = (index + len(skipped)) % len(self.source)
            try:
                picture = self.source.read(used)
            except InputError as error:
                skipped.append(Skipped(self.source.name(used), "; ".join(error.problems)))
                Tolerance(limit).note(skipped)
                continue
            self.transform(picture, self.source.categories, rng(), out)
            return used, tuple(skipped)


def _empty(count: int, size: tuple[int, int], pin_memory: bool) -> tuple[Tensor, PanopticTargets]:
    """Memory of a batch; every sample is written to its place in it at once."""
    flat, maps = (count, *size), (count, 1, *size)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, pin_memory=pin_memory)

    semantic = torch.empty(flat, dtype=torch.int64, pin_memory=pin_memory)
    wanted = PanopticTargets(
        semantic, floats(*flat), floats(*maps), floats(*maps), floats(count, 2, *size), floats(*maps)
    )
    return floats(count, 3, *size), wanted


def _samples(image: Tensor, wanted: PanopticTargets) -> Iterator[Sample]:
    """Each sample's part of that memory."""
    for number, pixels in enumerate(image.numpy()):
        yield Sample(pixels, TargetArrays(*(target[number].numpy() for target in wanted)))
