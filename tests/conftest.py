"""Shared fixtures: the real data beside the checkout, where it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# without a GPU, Triton's kernels run in its interpreter; it reads this before its first import
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real sample data, or a skip that says so."""
    if not SHARED.is_dir():
        pytest.skip(f"real sample data not present at {SHARED}")
    return SHARED


# a busy machine is no reason for a red test: times are measured by benchmarks, never asserted here
settings.register_profile("medattn", deadline=None)
settings.load_profile("medattn")
