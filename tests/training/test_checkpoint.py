"""Checkpoints: whole or not at all, and exactly what was saved."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from medattn.errors import InputError
from medattn.training.checkpoint import load_checkpoint, save_checkpoint
from medattn.training.loop import State, averaged_model
from medattn.training.optimizers import OPTIMIZERS, make_optimizer

Parts = tuple[nn.Module, AveragedModel, torch.optim.Optimizer, State]


def parts(seed: int, steps: int = 0) -> Parts:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    averaged = averaged_model(model, 0.9)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(steps):
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
    return model, averaged, optimizer, State(step=steps, seconds=1.5, best=0.25, best_step=1, stale=2)


def advance(made: Parts) -> list[float]:
    model, averaged, optimizer, _ = made
    losses = []
    for _ in range(3):
        loss = model(torch.randn(8, 3)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        losses.append(loss.item())
    return [*losses, *averaged.module[0].weight.flatten().tolist()]


def test_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    first = parts(0, steps=5)
    save_checkpoint(tmp_path / "last", *first)
    expected = advance(first)
    second = parts(99)
    load_checkpoint(tmp_path / "last", *second)
    assert second[3] == State(step=5, seconds=1.5, best=0.25, best_step=1, stale=2)
    assert advance(second) == expected


def test_a_newer_checkpoint_replaces_the_older_and_leaves_nothing_else(tmp_path: Path) -> None:
    for steps in (1, 2, 3):
        save_checkpoint(tmp_path / "last", *parts(0, steps))
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    loaded = parts(1)
    load_checkpoint(tmp_path / "last", *loaded)
    assert loaded[3].step == 3


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last", *parts(0, 4))
    (tmp_path / "last").rename(tmp_path / ".previous-last")
    shutil.copytree(tmp_path / ".previous-last", tmp_path / ".writing-last")
    loaded = parts(1)
    load_checkpoint(tmp_path / "last", *loaded)
    assert loaded[3].step == 4


def test_missing_and_foreign_checkpoints_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        load_checkpoint(tmp_path / "last", *parts(0))
    save_checkpoint(tmp_path / "last", *parts(0))
    other = nn.Linear(7, 7)
    with pytest.raises(InputError, match="another network or is damaged"):
        load_checkpoint(
            tmp_path / "last",
            other,
            averaged_model(other, 0.9),
            torch.optim.AdamW(other.parameters()),
            State(),
        )


class Resting(nn.Module):
    """Has a parameter that no gradient ever reaches."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 1), nn.Linear(2, 2)
        self.unused.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def resting(name: str, steps: int, **options: bool) -> Parts:
    torch.manual_seed(steps)
    model = Resting(**options)
    averaged, optimizer = averaged_model(model, 0.9), make_optimizer(name, model, 0.01, 0.01)
    for _ in range(steps):
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, averaged, optimizer, State(step=steps)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_gradient_has_no_moments_after_loading_either(tmp_path: Path, name: str) -> None:
    first = resting(name, 7)
    save_checkpoint(tmp_path / "last", *first)
    second = resting(name, 0)
    load_checkpoint(tmp_path / "last", *second)
    for model, _, optimizer, _ in (first, second):
        assert set(optimizer.state) == set(model.used.parameters())
        model(torch.full((4, 3), 2.0)).sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))


@pytest.mark.parametrize("lost", ["", ".exp_avg"], ids=["frozen-then", "half-of-the-moments"])
def test_moments_that_should_be_there_are_missed(tmp_path: Path, lost: str) -> None:
    made = resting("adamw", 2, frozen=not lost)
    save_checkpoint(tmp_path / "last", *made)
    table = tmp_path / "last/.metadata"
    if lost:
        content = pickle.loads(table.read_bytes())
        del content.state_dict_metadata[f"optimizer.state.used.weight{lost}"]
        table.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="another network or is damaged"):
        load_checkpoint(tmp_path / "last", *resting("adamw", 0))


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes every write beyond 2 kB fail, as a full disk does."""
    made = parts(0, 2)
    save_checkpoint(tmp_path / "last", *made)
    program = f"""
import resource, signal, torch, warnings
from pathlib import Path
from torch import nn
warnings.simplefilter("ignore")
from medattn.errors import InputError
from medattn.training.checkpoint import save_checkpoint
from medattn.training.loop import State, averaged_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = nn.Linear(300, 300)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    save_checkpoint(Path({str(tmp_path / "last")!r}), model, averaged_model(model, 0.9),
                    torch.optim.AdamW(model.parameters()), State(step=9))
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "checkpoint of step 9 could not be written" in done.stdout
    assert "previous one is intact" in done.stdout
    loaded = parts(1)
    load_checkpoint(tmp_path / "last", *loaded)
    assert loaded[3].step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
