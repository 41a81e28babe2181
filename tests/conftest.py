"""Shared fixtures: the real data beside the checkout, where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real sample data, or a skip that says so."""
    if not SHARED.is_dir():
        pytest.skip(f"real sample data not present at {SHARED}")
    return SHARED
