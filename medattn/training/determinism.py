"""The same bits from the same run: only algorithms that add in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from medattn.errors import InputError

MISSING = "does not have a deterministic implementation"  # torch's words


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """While `wanted`, torch takes only algorithms that give the same bits each time; on CUDA they are slower.

    To be entered before CUDA computes for the first time: cuBLAS looks at its setting once, which stays.
    Raises InputError for an operation that has no such algorithm.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else its sums depend on what else runs
    enabled, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # which algorithm is fastest differs from run to run
    try:
        yield
    except RuntimeError as error:
        if MISSING not in str(error):
            raise
        operation = str(error).partition(f" {MISSING}")[0]
        raise InputError(
            f"training.deterministic: torch has no deterministic algorithm for {operation} on this device, "
            "which this training needs; choose another network or set it to false"
        ) from None
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
