"""One sample from its bytes to a tensor, and what happens to files that cannot be decoded.

They are skipped and named: in training the next sample takes the place, which depends on the files alone, in
evaluation the place stays empty. Past a limit the run stops with the first five and their reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from medattn.data.images.classes import LISTED, Classes
from medattn.data.images.decode import ImageError, decode
from medattn.errors import InputError


class ImageSource(Protocol):
    """A data set: encoded images by number. `ImageFolder` and `Shards` are two."""

    @property
    def classes(self) -> Classes:
        """What the targets count."""

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """[n] class indices."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where the image is, for messages."""

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError."""


class Transform(Protocol):
    """`TrainingTransform` and `EvaluationTransform` are two."""

    @property
    def size(self) -> int:
        """Height and width of the result in pixels."""

    def __call__(self, image: Image.Image, rng: np.random.Generator, /) -> Tensor:
        """[3, size, size] float32 from an RGB image."""


@dataclass(frozen=True)
class Skipped:
    """An image that could not be used."""

    name: str
    reason: str


@dataclass
class Tolerance:
    """Counts the images that were skipped, each once, and raises when there are more than `limit`."""

    limit: int
    found: dict[str, str] = field(default_factory=dict)

    def note(self, skipped: Iterable[Skipped]) -> None:
        """Count these. Raises InputError with the first five names and reasons when it is too many."""
        for image in skipped:
            self.found.setdefault(image.name, image.reason)
        if len(self.found) > self.limit:
            raise InputError(_too_many([Skipped(*item) for item in self.found.items()], self.limit))


@dataclass(frozen=True)
class Reader:
    """Reads samples of a source. upright: turn images by their EXIF orientation, see `decode`.

    replace: the next image takes the place of one that cannot be decoded; at most `limit` in a row are tried.
    """

    source: ImageSource
    transform: Transform
    upright: bool
    replace: bool
    limit: int

    def read(
        self, index: int, rng: Callable[[], np.random.Generator], out: npt.NDArray[np.float32]
    ) -> tuple[int | None, tuple[Skipped, ...]]:
        """Fill `out` [3, size, size] from sample `index`, or the next that can be read.

        Returns the sample that was used, None where it could not be and is not replaced, and the images that
        were skipped. rng makes the chance of this place in the batch, the same for whichever image takes it.

        Raises InputError when `limit` replacements could not be decoded either.
        """
        skipped = []
        limit = min(self.limit, len(self.source) - 1)
        for attempt in range(1 + limit if self.replace else 1):
            used = (index + attempt) % len(self.source)
            try:
                image = decode(self.source.read(used), upright=self.upright)
            except (OSError, ImageError) as error:
                skipped.append(Skipped(self.source.name(used), str(error)))
                continue
            out[...] = self.transform(image, rng()).numpy()
            return used, tuple(skipped)
        if self.replace:
            raise InputError(_too_many(skipped, limit))
        return None, tuple(skipped)


def _too_many(skipped: list[Skipped], limit: int) -> str:
    first = "; ".join(f"{image.name}: {image.reason}" for image in skipped[:LISTED])
    return (
        f"{len(skipped)} images cannot be decoded, expected at most {limit}; restore or remove them, or "
        f"raise the limit. The first: {first}"
    )
