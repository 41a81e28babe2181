"""Where chance comes from: independent streams named by what they are for, so that none disturbs another."""

from __future__ import annotations

from typing import Protocol

import numpy as np

ORDER, AUGMENTATION, MIXING = range(3)


class Draws(Protocol):
    """Where random numbers come from; numpy's Generator is one."""

    def uniform(self, low: float, high: float, /) -> float:
        """A number in [low, high)."""

    def integers(self, end: int, /) -> int:
        """A whole number from 0 to end - 1."""


def generator(seed: int, stream: int, *place: int) -> np.random.Generator:
    """The random numbers of one stream at one place: an epoch, a step, a position in its batch.

    >>> generator(0, MIXING, 7).random() == generator(0, MIXING, 7).random()
    True
    """
    return np.random.default_rng([seed, stream, *place])
