"""Batches of coming steps are read by threads while one is used, in order, whatever the threads' number.

Threads, not processes: Pillow decodes, resizes and transforms without the interpreter lock, so they use every
core, need no copies between processes, and no state that a resumed run would have to restore.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from medattn.data.images.reading import Skipped, Tolerance

AHEAD = 2  # batches that are read while one is used

T = TypeVar("T")


class Submit(Protocol):
    """Starts reading one sample; the result waits for it."""

    def __call__(self, read: Callable[[], T], /) -> Callable[[], T]: ...


class Batch(Protocol):
    """What is read ahead."""

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Samples that could not be used while these were read."""


B = TypeVar("B", bound=Batch)
Begin = Callable[[Submit], Callable[[], B]]  # starts reading a batch; the result waits for it


def now(read: Callable[[], T]) -> Callable[[], T]:
    """Submit without threads: read at once."""
    done = read()
    return lambda: done


def read_ahead(steps: Iterable[Begin[B]], workers: int, tolerance: Tolerance) -> Iterator[B]:
    """The batches of `steps` in order, AHEAD of them in work by `workers` threads; 0 reads in this thread.

    Raises InputError when more samples were skipped than are tolerated.
    """
    with ThreadPoolExecutor(
        max(1, workers), thread_name_prefix="images"
    ) as pool:  # starts threads when needed

        def later(read: Callable[[], T]) -> Callable[[], T]:
            return pool.submit(read).result

        begun = (begin(later if workers else now) for begin in steps)
        try:
            for finish in delayed(begun, AHEAD if workers else 0):
                batch = finish()
                tolerance.note(batch.skipped)
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)  # nobody waits for what was read ahead


def delayed(items: Iterable[T], by: int) -> Iterator[T]:
    """The items, each handed out when `by` more have been made.

    >>> made = []
    >>> first = next(delayed((made.append(n) or n for n in range(9)), 2))
    >>> first, made
    (0, [0, 1, 2])
    """
    held: deque[T] = deque()
    for item in items:
        held.append(item)
        if len(held) > by:
            yield held.popleft()
    yield from held
