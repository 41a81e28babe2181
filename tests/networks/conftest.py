"""Every registered network at its smallest, in every rank that it takes: what a test gets as `case`.

A test that takes `costly_case` instead runs in volumes, or in a network's only rank; its other half is slow.
A family that joins the registry says in FAMILIES how it is made small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medattn.networks import create, names
from medattn.networks.registry import family

# positions that a program can be exported for in general: sides of which are multiples of `Case.unit`
SMALL_BLOCKS: dict[str, dict[str, Any]] = {
    "unet_block": {"block": 2},
    "unet_block2": {"block": 2},
    "unet_halo": {"block": 2, "halo": 1},
    "unet_focal": {"window": 2, "focal_window": 3},
}


@dataclass(frozen=True)
class Case:
    """One network in one rank.

    size: of its inputs, one number per spatial axis. channels: of its inputs. unit: sides of an input are
    multiples of it where a program is made for many sizes. blocks: options that make its blocks small, so
    that `unit` is.
    """

    name: str
    size: tuple[int, ...]
    channels: int = 1
    unit: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return len(self.size)

    def network(self, **options: Any) -> nn.Module:
        """The same numbers every time; published starts at zero would hide other parts, so they are moved."""
        torch.manual_seed(0)
        network = create(self.name, **self.options | options)
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return network

    def input(self, batch: int = 2, size: tuple[int, ...] | None = None) -> Tensor:
        """[batch, channels, *size], the same numbers every time."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, self.channels, *(size or self.size), generator=generator)


def _unets(name: str) -> list[Case]:
    # the coarsest map is three positions long: PyTorch's gradient of a bfloat16 convolution to its weights
    # is not defined on a CPU where the first of three axes has two
    return [
        Case(
            name,
            (24, 16, 16)[:dims],
            blocks=SMALL_BLOCKS.get(name, {}),
            options={
                "spatial_dims": dims,
                "in_channels": 1,
                "out_channels": 3,
                "widths": (8, 12, 16, 20),
                "strides": (2, 2, 2),
            },
        )
        for dims in (2, 3)
    ]


def _block_unets(name: str) -> list[Case]:
    return [Case(name, (32, 48), unit=16, options={"out_channels": 3}, blocks={"block": 4, "halo": 2})]


def _eanets(name: str) -> list[Case]:
    small = {"depths": (1, 1, 2, 2), "widths": (4, 4, 8, 8), "channels": 16, "dropout": 0.0}
    return [Case(name, (24, 40), options={"in_channels": 1, "out_channels": 3} | small)]


FAMILIES: dict[str, Callable[[str], list[Case]]] = {
    "unet": _unets,
    "block_unet": _block_unets,
    "eanet": _eanets,
}
CASES = [case for name in names() if family(name) in FAMILIES for case in FAMILIES[family(name)](name)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every case to the tests that ask for one."""
    ranks: dict[str, set[int]] = {}
    for case in CASES:
        ranks.setdefault(case.name, set()).add(case.dims)
    for argument in {"case", "costly_case"} & set(metafunc.fixturenames):
        costly = argument == "costly_case"
        parameters = [
            pytest.param(
                case,
                id=f"{case.name}-{case.dims}d",
                marks=[pytest.mark.slow] if costly and case.dims < max(ranks[case.name]) else [],
            )
            for case in CASES
        ]
        metafunc.parametrize(argument, parameters)


@pytest.fixture
def cases_by_id() -> dict[str, Case]:
    """One case by its name and rank, as in "unet-3d"."""
    return {f"{case.name}-{case.dims}d": case for case in CASES}


@pytest.fixture
def families_with_cases() -> set[str]:
    """Families that tests know how to make small."""
    return set(FAMILIES)
