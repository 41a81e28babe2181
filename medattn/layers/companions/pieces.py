"""Work in pieces that are formed once more in the backward pass, so that no piece outlives its step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PAIRS = 2**22  # pairs of a query and a key to hold at a time: 16 MB of logits in float32


def by_pieces(work: Callable[[slice], Tensor], count: int, pairs_each: int, dim: int) -> Tensor:
    """Concatenate work(part) along dim over parts of range(count), each of at most PAIRS pairs.

    pairs_each: pairs per item of the range. A single piece is kept, several are checkpointed.
    """
    step = max(1, PAIRS // pairs_each)
    if step >= count:
        return work(slice(0, count))
    parts = [
        checkpoint(work, slice(start, start + step), use_reentrant=False, preserve_rng_state=False)
        for start in range(0, count, step)
    ]
    return torch.cat(parts, dim)
