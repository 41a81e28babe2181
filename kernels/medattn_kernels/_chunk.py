"""Work in pieces: how much the eager implementations hold at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

LOGITS_CPU = 2**19  # what stays in a core's cache
LOGITS_ELSEWHERE = 2**26  # enough work for one launch


def chunk_size(x: Tensor) -> int:
    """Logits to form at a time on x's device."""
    return LOGITS_CPU if x.device.type == "cpu" else LOGITS_ELSEWHERE


def pieces(outer: int, inner: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Cut outer x inner into pieces of at most `limit` entries, at least one: whole rows or parts of one."""
    limit = max(1, limit)
    step, part = max(1, limit // inner), min(inner, limit)
    for start in range(0, outer, step):
        for first in range(0, inner, part):
            yield slice(start, min(start + step, outer)), slice(first, min(first + part, inner))
