"""What can be sharded, and what a user is told of what cannot."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from medattn.errors import InputError
from medattn.training.sharding import blocks, shard

CPU = torch.device("cpu")


class Branches(nn.Module):
    """Two lists that hold the same part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.ModuleList([part]), nn.ModuleList([part])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight
        self.scale = nn.Parameter(torch.tensor(1.0))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_parameters_that_cannot_be_sharded_are_named_at_once() -> None:
    network = Tied()
    sentence = (
        "training.shard_weights: this network cannot be sharded, as scale is a single number; "
        "encoder.weight and decoder.weight are one parameter; leave it out"
    )
    with pytest.raises(InputError, match=re.escape(sentence)):
        shard(network, copy.deepcopy(network), CPU)
    branches = Branches(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(InputError, match=r"first.0.0.weight and second.0.0.weight are one parameter"):
        shard(branches, copy.deepcopy(branches), CPU)


@pytest.mark.usefixtures("one_process")
def test_a_part_in_two_lists_is_one_block() -> None:
    network = Branches(nn.Sequential(nn.GELU(), nn.Dropout()))
    assert blocks(network) == [network.first[0]]
    shard(network, copy.deepcopy(network), CPU)
