"""What each process of tests/training/test_sharded_networks.py does: sharded networks against themselves."""

from __future__ import annotations

import copy
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from medattn.training.distributed import joined
from medattn.training.loop import averaged_model
from medattn.training.recomputation import recompute_activations
from medattn.training.sharding import shard, whole


def beside(name: str) -> ModuleType:
    spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


networks = beside("test_recomputation")


def gradients(network: nn.Module, size: tuple[int, ...]) -> dict[str, Tensor]:
    """Of the same batch, with the same chance, in all processes; so that the mean is each one's."""
    torch.manual_seed(1)
    networks.loss_of(network, torch.randn(size), torch.float32).backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def difference(name: str, options: dict[str, Any], size: tuple[int, ...], recompute: bool) -> float:
    """Largest difference of a gradient of a sharded network, relative to the largest gradient.

    Infinite where parameters or running statistics are others.
    """
    plain = networks.built(name, options)
    sharded, weights = copy.deepcopy(plain), copy.deepcopy(plain.state_dict())
    averaged = averaged_model(sharded, 0.9)
    if recompute:
        recompute_activations(sharded)
    shard(sharded, averaged, torch.device("cpu"))
    expected, found = gradients(plain, size), gradients(sharded, size)
    buffers = [torch.equal(a, b) for a, b in zip(plain.buffers(), sharded.buffers(), strict=True)]
    with whole(averaged):
        kept = averaged.module.state_dict()
        same = all(torch.equal(kept[name], value) for name, value in weights.items())
    if not (same and all(buffers) and expected.keys() == found.keys() and kept.keys() == weights.keys()):
        return float("inf")
    largest = max(float(g.abs().max()) for g in expected.values())
    return max(float((found[name] - g).abs().max()) for name, g in expected.items()) / largest


def main(folder: Path) -> None:
    with joined(torch.device("cpu")) as processes:
        found = {
            f"{case.id}, {recompute=}": difference(*case.values[:3], recompute)
            for case in (*networks.QUICK, *networks.SLOW)
            for recompute in (False, True)
        }
        (folder / f"{processes.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
