"""Test-time augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def with_flip(predict: Callable[[Tensor], Tensor], mirror: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Average logits with those of the left-right mirrored input, paired organs swapped back.

    Axes run L, P, S, so the first spatial axis is left-right. mirror: organ -> organ (`LabelSet.mirror`).
    """
    channels = [0, *(organ + 1 for organ in mirror)]

    def both(x: Tensor) -> Tensor:
        return (predict(x) + predict(x.flip(2)).flip(2)[:, channels]) / 2

    return both
