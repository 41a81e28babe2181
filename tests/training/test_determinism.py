"""The deterministic mode: what it sets, what it puts back, what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from medattn.errors import InputError
from medattn.training.determinism import deterministic


@pytest.fixture(autouse=True)
def without_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


@pytest.fixture(params=[(False, False, False), (True, True, True), (True, False, True)])
def modes(request: pytest.FixtureRequest) -> Iterator[tuple[bool, ...]]:
    """Enabled or not, with warnings alone or not, and cuDNN's choice of what is fastest."""
    enabled, warn_only, benchmark = request.param
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.backends.cudnn.benchmark = benchmark
    yield request.param
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def current() -> tuple[bool, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )


@pytest.mark.parametrize("wanted", [False, True])
def test_the_mode_lasts_as_long_as_its_block(modes: tuple[bool, ...], wanted: bool) -> None:
    with deterministic(wanted):
        assert current() == ((True, False, False) if wanted else modes)
    assert current() == modes


def test_an_operation_without_an_algorithm_is_named() -> None:
    refused = pytest.raises(InputError, match=r"training.deterministic: .*algorithm for put_ on this device")
    with refused, deterministic(True):
        torch.zeros(4).put_(torch.tensor([1]), torch.ones(1))  # one of few that torch refuses on a CPU
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="must match the size"), deterministic(True):
        torch.zeros(2) + torch.zeros(3)
