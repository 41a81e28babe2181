"""Trainings in several processes, which torchrun starts, against the same in one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from medattn.training.checkpoint import load_checkpoint
from medattn.training.distributed import ALONE, held_gradients, joined, summed
from medattn.training.loop import State, averaged_model
from medattn.training.optimizers import make_optimizer
from medattn.training.synced_batch_norm import SyncedBatchNorm, synchronise_batch_norms

WORKER = Path(__file__).with_name("distributed_worker.py")


def torchrun(processes: int, *command: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    arguments = [*launcher, str(processes), *map(str, command)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=240, check=False)


def worker() -> ModuleType:
    spec = spec_from_file_location("distributed_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["distributed_worker"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_number_of_processes_changes_nothing(tmp_path: Path, world: int) -> None:
    """Losses, gradient norms, weights and buffers after six steps: accumulated, with synchronised batch norm,
    sharded, resumed from a checkpoint of one process; and signals and time."""
    worker().half_of_a_training(ALONE, tmp_path / "alone")
    done = torchrun(world, WORKER, "results", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["process 0 speaks"]
    assert "Warning" not in done.stderr
    ours = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    alone = worker().all_results(ALONE)
    for name in (name for name in alone if name != "sums"):
        for result in ours:
            same_training(result[name], alone[name])
            assert result[name]["tensors"] == ours[0][name]["tensors"], "all hold the same to the bit"
            assert result[name]["sharded"] == name.startswith("sharded")
    for result in ours:
        close(result["sums"], alone["sums"])
        same_training(result["resumed"], alone["accumulated"], start=3)
        assert (result["signal"]["reason"], result["signal"]["step"]) == ("SIGTERM", 3)
        assert (result["time"]["reason"], result["time"]["step"]) == ("time", 0)
        assert (result["time of others"]["reason"], result["time of others"]["step"]) == ("steps", 6)
        assert result["agreements"] == {
            "total": [sum(range(world)), world],
            "sums": [0.5 * world, sum(range(world))],
            "gathered": [f"process {rank}" for rank in range(world)],
        }

    kept = [result["sharded"]["kept"] for result in ours]
    # the last layer has one row, which is not cut up and is padded in the other processes
    assert alone["sharded"]["kept"] <= sum(kept) < 1.2 * alone["sharded"]["kept"]
    assert max(kept) < 1.5 * sum(kept) / world
    same_training(
        worker().trained(ALONE, accumulate=2, begin=tmp_path / "many"), alone["accumulated"], start=3
    )


def same_training(found: dict[str, Any], expected: dict[str, Any], *, start: int = 0) -> None:
    close(found["measured"], expected["measured"][start:])
    close(found["best"], expected["best"])
    assert found["tensors"].keys() == expected["tensors"].keys()
    for key, value in expected["tensors"].items():
        close(found["tensors"][key], value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "left", "second", "found"),
    [
        pytest.param(2, "sharded", 4, "sharded", id="2-sharded-4-sharded"),
        pytest.param(4, "sharded", 2, "whole", id="4-sharded-2-whole"),
        pytest.param(2, "whole", 4, "sharded", id="2-whole-4-sharded"),
    ],
)
def test_any_number_of_processes_goes_on(
    tmp_path: Path, first: int, left: str, second: int, found: str
) -> None:
    for world, task in ((first, f"leave {left}"), (second, f"go on {found}")):
        done = torchrun(world, WORKER, task, tmp_path)
        assert done.returncode == 0, done.stderr
    written = len(list((tmp_path / "last").glob("*.distcp")))
    assert written == (first if left == "sharded" else 1)
    expected = worker().trained(ALONE, accumulate=2)
    for rank in range(second):
        same_training(json.loads((tmp_path / f"{rank}.json").read_text()), expected, start=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "sentence"),
    [("full disk", "checkpoint of step 1 could not be written"), ("killed saving", "ended without a word")],
)
def test_a_process_that_fails_to_write_its_share_leaves_the_checkpoint_before(
    tmp_path: Path, task: str, sentence: str
) -> None:
    done = torchrun(2, WORKER, task, tmp_path)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("told: ")]
    assert len(told) == 1, done.stderr
    assert sentence in told[0]
    model = worker().network(norm=False)
    averaged, state = averaged_model(model, 0.9), State()
    load_checkpoint(tmp_path / "last", model, averaged, torch.optim.AdamW(model.parameters(), 0.01), state)
    assert state.step == 0 if task == "full disk" else state.step > 0


def alone_in_namespaces() -> bool:
    unshare = shutil.which("unshare")
    return unshare is not None and not subprocess.run([unshare, "-rm", "true"], check=False).returncode


@pytest.mark.skipif(not alone_in_namespaces(), reason="needs user namespaces, for a disk of its own")
def test_a_checkpoint_on_two_file_systems_does_not_replace_one_on_one(tmp_path: Path) -> None:
    """Process 1 sees an empty disk where process 0 has the run."""
    worker().half_of_a_training(ALONE, tmp_path / "last")
    own_disk = tmp_path / "process"
    own_disk.write_text(
        'if [ "$LOCAL_RANK" = 1 ]; then\n'
        '  exec unshare -rm sh -c \'mount -t tmpfs none "$0" && exec "$@"\' "$@"\n'
        "fi\n"
        'shift; exec "$@"\n'
    )
    done = torchrun(
        2, "--no-python", "sh", own_disk, tmp_path, sys.executable, WORKER, "leave sharded", tmp_path
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("told: ")]
    assert len(told) == 1, done.stderr
    assert "another process has written; all processes must see one file system" in told[0]
    model = worker().network(norm=False)
    averaged, state = averaged_model(model, 0.9), State()
    load_checkpoint(tmp_path / "last", model, averaged, make_optimizer("adamw", model, 0.01), state)
    assert state.step == 3
    assert not (tmp_path / ".writing-last").exists()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("diverge", "the loss is not finite at step 0 on cases case_7"),
        ("disagree", "only the main process fails"),
        ("load elsewhere", "only some of the processes see this checkpoint; all must see one file system"),
        ("killed", "another process of this command ended without a word"),
    ],
)
def test_one_that_fails_ends_all_with_one_sentence(tmp_path: Path, task: str, sentence: str) -> None:
    """Within the limit of `torchrun` above, and not by its waiting for anyone."""
    done = torchrun(2, WORKER, task, tmp_path)
    assert done.returncode == 1, "torchrun's own code"
    told = [line for line in done.stderr.splitlines() if line.startswith("told: ")]
    assert len(told) == 1, done.stderr
    assert sentence in told[0]


def test_alone_everything_is_as_without() -> None:
    network = nn.Linear(2, 1)
    assert ALONE.wrap(network) is network
    assert (ALONE.total(3, 4), ALONE.sums(0.1), ALONE.gathered("x")) == ([3, 4], [0.1], ["x"])
    values = torch.ones(2)
    assert summed(values) is values
    with joined(torch.device("cpu")) as processes, processes.main_first(), held_gradients(network, True):
        assert (processes.world, processes.main) == (1, True)
    assert not torch.distributed.is_initialized()


def test_synchronised_batch_norm_keeps_names_and_values() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    before, x = {k: v.clone() for k, v in network.state_dict().items()}, torch.randn(4, 1, 5, 5)
    parameters = list(network.parameters())
    expected = network.eval()(x)
    synchronise_batch_norms(network)
    assert sum(isinstance(module, SyncedBatchNorm) for module in network.modules()) == 2
    assert network.state_dict().keys() == before.keys()
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert torch.equal(network(x), expected)
