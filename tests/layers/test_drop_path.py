"""Stochastic depth: whole samples go, the mean stays."""

from __future__ import annotations

import pytest
import torch

from medattn.layers.drop_path import DropPath


def test_samples_are_kept_or_zeroed_whole_and_the_mean_stays() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    y = DropPath(0.25)(x)
    torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / 0.75]))
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert float(y.mean()) == pytest.approx(1, abs=0.05)


def test_nothing_happens_in_evaluation_or_without_a_rate() -> None:
    x = torch.randn(5, 3)
    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_a_rate_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rate must be at least 0 and below 1, got rate=1\.0"):
        DropPath(1.0)
