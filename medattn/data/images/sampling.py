"""Which images make the batch of a step: a function of seed and step alone, whatever reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import count

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medattn.data.images.draws import AUGMENTATION, ORDER, generator
from medattn.data.images.readahead import Submit, now, read_ahead
from medattn.data.images.reading import ImageSource, Reader, Skipped, Tolerance, Transform
from medattn.errors import InputError

UNREADABLE_LIMIT = 100

Read = tuple[int | None, tuple[Skipped, ...]]


@dataclass(frozen=True)
class ImageBatch:
    """Images of one step. image [B, 3, h, w] float32; target [B] int64 class indices or [B, classes] float32.

    cases: [B] where each image came from. skipped: images that could not be decoded while these were read.
    """

    image: Tensor
    target: Tensor
    cases: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()

    def to(self, device: torch.device) -> ImageBatch:
        """The batch on another device."""
        image, target = (t.to(device, non_blocking=True) for t in (self.image, self.target))
        return ImageBatch(image, target, self.cases, self.skipped)


@dataclass(frozen=True)
class TrainingImages:
    """Batches without end, every epoch in a new order; what whole batches leave of an epoch is dropped.

    batch_size: over all processes. repeats: repeated augmentation (Hoffer et al. 2020; 3 in DeiT and XCiT):
    each image is drawn so many times in a row, differently changed, and an epoch, as long as without, sees so
    many fewer images. rank, world: this process of how many; together they read the same batch for any
    `world`, and images at mirrored places, which `Mixing` mixes, are in one process.

    Raises InputError when made with a batch that the images or the processes do not fit.
    """

    source: ImageSource
    transform: Transform
    batch_size: int
    seed: int
    repeats: int = 1
    rank: int = 0
    world: int = 1
    upright: bool = True
    unreadable_limit: int = UNREADABLE_LIMIT

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= len(self.source):
            raise InputError(
                f"batch of {self.batch_size} from {len(self.source)} images, expected 1 to "
                f"{len(self.source)}; lower the batch size"
            )
        if not 0 <= self.rank < self.world or (self.world > 1 and self.batch_size % (2 * self.world)):
            raise InputError(
                f"batch of {self.batch_size} for process {self.rank} of {self.world}, expected a multiple of "
                f"{2 * self.world}, twice the processes; change the batch size or their number"
            )
        if self.repeats < 1:
            raise InputError(f"{self.repeats} repeats of each image, expected at least 1")

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in as many images as the source has."""
        return len(self.source) // self.batch_size

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The places in the global batch that this process reads."""
        last = self.batch_size - 1
        return tuple(n for n in range(self.batch_size) if min(n, last - n) % self.world == self.rank)

    def batch(self, step: int) -> ImageBatch:
        """This process's part of one step. Raises InputError when too many images cannot be decoded."""
        return self._begin(step, now)()

    def batches(self, start: int, workers: int, *, pin_memory: bool = False) -> Iterator[ImageBatch]:
        """All batches from step `start` on, read ahead by `workers` threads.

        Raises InputError when more than `unreadable_limit` images could not be decoded. pin_memory: in
        page-locked memory, from where a copy to a GPU overlaps with computing.
        """
        steps = (partial(self._begin, step, pin_memory=pin_memory) for step in count(start))
        return read_ahead(steps, workers, Tolerance(self.unreadable_limit))

    def _begin(self, step: int, submit: Submit, *, pin_memory: bool = False) -> Callable[[], ImageBatch]:
        epoch, within = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.source), self.seed, epoch, self.repeats)
        chosen = order[within * self.batch_size :][list(self.places)]
        chance = [partial(generator, self.seed, AUGMENTATION, step, place) for place in self.places]
        reader = Reader(self.source, self.transform, self.upright, True, self.unreadable_limit)
        return _begin_batch(reader, chosen.tolist(), chance, submit, pin_memory)


@dataclass(frozen=True)
class EvaluationImages:
    """Every image once, in the order of the source; the last batch may be smaller.

    rank, world: this process of how many, which take the batches in turn: whole ones, as what a network
    computes of an image may depend in the last bit on those beside it. Images that cannot be decoded are left
    out, so the score is over fewer: by default the first one is an error.
    """

    source: ImageSource
    transform: Transform
    batch_size: int
    rank: int = 0
    world: int = 1
    upright: bool = True
    unreadable_limit: int = 0

    @property
    def parts(self) -> list[range]:
        """The images of each of this process's batches."""
        all_images, size = range(len(self.source)), self.batch_size
        return [all_images[n : n + size] for n in all_images[self.rank * size :: self.world * size]]

    def batches(self, workers: int, *, pin_memory: bool = False) -> Iterator[ImageBatch]:
        """This process's batches, read ahead by `workers` threads; empty where nothing could be decoded.

        Raises InputError when more than `unreadable_limit` images could not be decoded.
        """
        reader = Reader(self.source, self.transform, self.upright, False, self.unreadable_limit)
        steps = (partial(self._begin, reader, part, pin_memory) for part in self.parts)
        return read_ahead(steps, workers, Tolerance(self.unreadable_limit))

    @staticmethod
    def _begin(
        reader: Reader, part: Sequence[int], pin_memory: bool, submit: Submit
    ) -> Callable[[], ImageBatch]:
        chance = [partial(generator, 0, AUGMENTATION, index) for index in part]
        return _begin_batch(reader, part, chance, submit, pin_memory)


@lru_cache(maxsize=2)  # the order of a million images takes longer than their batch
def epoch_order(images: int, seed: int, epoch: int, repeats: int = 1) -> npt.NDArray[np.int64]:
    """[images] sample numbers of an epoch, shuffled, each `repeats` times in a row, cut to its length.

    As in DeiT's sampler, where neighbours go to different processes; it ends at a multiple of 256 images,
    this one at a multiple of the batch.
    """
    shuffled = generator(seed, ORDER, epoch).permutation(images)
    order = np.repeat(shuffled[: -(-images // repeats)], repeats)[:images]
    order.setflags(write=False)
    return order


def _begin_batch(
    reader: Reader,
    indices: Sequence[int],
    chance: Sequence[Callable[[], np.random.Generator]],
    submit: Submit,
    pin_memory: bool,
) -> Callable[[], ImageBatch]:
    """Start reading; the result waits for the batch. Each image is written to its place in memory at once."""
    size = reader.transform.size
    image = torch.empty(len(indices), 3, size, size, pin_memory=pin_memory)
    reads = [
        submit(partial(reader.read, index, rng, out))
        for index, rng, out in zip(indices, chance, image.numpy(), strict=True)
    ]
    return partial(_finish_batch, reader, image, reads)


def _finish_batch(reader: Reader, image: Tensor, reads: Sequence[Callable[[], Read]]) -> ImageBatch:
    done = [read() for read in reads]
    skipped = tuple(one for _, several in done for one in several)
    used = [(place, index) for place, (index, _) in enumerate(done) if index is not None]
    if len(used) < len(done):
        image = image[[place for place, _ in used]]
    target = torch.from_numpy(reader.source.targets[[index for _, index in used]])
    return ImageBatch(image, target, tuple(reader.source.name(index) for _, index in used), skipped)
