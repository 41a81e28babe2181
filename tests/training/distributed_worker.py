"""What each process of tests/training/test_distributed.py does: trainings that one process repeats alone."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from medattn.training.checkpoint import load_checkpoint, save_checkpoint
from medattn.training.distributed import Processes, is_sharded, joined, summed
from medattn.training.loop import Limits, Schedule, State, averaged_model, fit
from medattn.training.optimizers import make_optimizer
from medattn.training.sharding import shard, whole
from medattn.training.synced_batch_norm import synchronise_batch_norms
from medattn_pipelines.fitting import Learner

SHARED_BATCH = 8


@dataclass
class Rows:
    """A share of a batch."""

    rows: Tensor
    cases: tuple[str, ...] = ("case_7",)


def shares(processes: Processes, accumulate: int, start: int) -> Iterator[Rows]:
    """Each process's share of batches that are the same for any number of processes, from step `start` on."""
    generator = torch.Generator().manual_seed(3)
    size = SHARED_BATCH // accumulate
    batches = iter(lambda: torch.randn(size, 6, generator=generator), None)
    for batch in islice(batches, start * accumulate, None):
        yield Rows(batch[processes.rank :: processes.world])


def network(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(12) if norm else nn.LayerNorm(12)
    # a bias before batch norm has no gradient but rounding, which Adam makes as large as any
    first = nn.Sequential(nn.Linear(6, 12, bias=not norm), middle, nn.GELU())
    return nn.Sequential(first, nn.Linear(12, 1))


class Turned(nn.Module):
    """A block that returns a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flip(1).view(len(x), 6)


class Shifted(nn.Module):
    """Writes into what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return x


def loss_of(model: nn.Module, batch: Rows) -> Tensor:
    return ((model(batch.rows)[:, 0] - batch.rows.sum(1).tanh()) ** 2).mean()


def trained(
    processes: Processes,
    *,
    norm: bool = False,
    accumulate: int = 1,
    sharded: bool = False,
    optimizer_name: str = "adamw",
    begin: Path | None = None,
    end: Path | None = None,
    **events: Any,
) -> dict[str, Any]:
    """Losses, gradient norms, weights, buffers and the reason of a small training.

    begin, end: checkpoints to go on from and to leave.
    """
    model = network(norm)
    if events.get("views"):
        model = nn.Sequential(Turned(), Shifted(), Turned(), Shifted(), *model.children())
    if norm:
        synchronise_batch_norms(model)
    averaged, state, measured = averaged_model(model, 0.9), State(), []
    if sharded and processes.world > 1:
        shard(model, averaged, processes.device)
    optimizer = make_optimizer(optimizer_name, model, 0.01, 0.01)
    parts = (model, averaged, optimizer, state)
    if begin is not None:
        load_checkpoint(begin, *parts)

    def on_step(values: Any) -> None:
        measured.append((values["loss"], values["gradient_norm"]))
        if events.get("interrupted") == (processes.rank, len(measured)):
            os.kill(os.getpid(), signal.SIGTERM)

    def validate() -> float:
        """As in a training, where the processes have different numbers of cases: no forward pass may wait."""
        averaged.eval()
        with whole(averaged), torch.inference_mode():
            outputs = [averaged(torch.ones(2, 6)).mean() for _ in range(1 + processes.rank)]
        return float(outputs[0])

    reason = fit(
        processes.wrap(model),
        shares(processes, accumulate, state.step),
        events.get("loss_of", loss_of),
        optimizer,
        Schedule(0.01, 2, "cosine"),
        averaged=averaged,
        state=state,
        limits=Limits(events.get("steps", 6), events.get("max_seconds"), None, 3, 100),
        clip=1.0,
        on_step=on_step,
        validate=validate,
        keep_best=lambda: None,
        save=lambda: None,
        started=time.monotonic() - (1000 if processes.rank in events.get("late", ()) else 0),
        accumulate=accumulate,
        processes=processes,
    )
    if end is not None:
        save_checkpoint(end, *parts, processes)
    kept = kept_numbers(model, averaged, optimizer)
    with whole(averaged):
        tensors = {name: value.tolist() for name, value in averaged.module.state_dict().items()}
    results = {"reason": reason, "step": state.step, "measured": measured, "tensors": tensors}
    return results | {"kept": kept, "best": state.best, "sharded": is_sharded(model)}


def kept_numbers(model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """How many numbers of weights, averages and moments are in this process."""
    moments = [m for of_one in optimizer.state.values() for m in of_one.values() if isinstance(m, Tensor)]
    tensors = [*model.parameters(), *averaged.parameters(), *(m for m in moments if m.ndim)]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.untyped_storage().nbytes() // t.element_size() for t in local)


def all_results(processes: Processes) -> dict[str, Any]:
    """One entry per thing that the number of processes may not change."""
    return {
        "plain": trained(processes),
        "accumulated": trained(processes, accumulate=2),
        "batch norm": trained(processes, norm=True),
        "sharded": trained(processes, accumulate=2, sharded=True),
        "sharded batch norm": trained(processes, norm=True, sharded=True),
        "sharded lamb": trained(processes, sharded=True, optimizer_name="lamb"),
        "sharded lookahead": trained(processes, sharded=True, optimizer_name="radam_lookahead"),
        "sharded sgd": trained(processes, sharded=True, optimizer_name="sgd"),
        "sharded views": trained(processes, sharded=True, views=True),
        "sums": gradient_of_sums(processes),
    }


def results_of_many(processes: Processes, folder: Path) -> dict[str, Any]:
    """Those, what the processes agree on, and what becomes of checkpoints: one for another number of them
    is left in `folder`, and one of another number found there."""
    results = all_results(processes)
    last = processes.world - 1
    # caught by the last process in its third step: all stop after it
    results["signal"] = half_of_a_training(processes, folder / "many", sharded=True, by=last)
    results["resumed"] = trained(processes, accumulate=2, sharded=True, begin=folder / "alone")
    # where clocks differ by more than the limit, the main process's counts
    results["time"] = trained(processes, steps=10**9, max_seconds=500, late=[0])
    results["time of others"] = trained(processes, max_seconds=500, late=range(1, processes.world))
    results["agreements"] = {
        "total": processes.total(processes.rank, 1),
        "sums": processes.sums(0.5, processes.rank),
        "gathered": processes.gathered(f"process {processes.rank}"),
    }
    return results


def half_of_a_training(
    processes: Processes, end: Path, *, sharded: bool = False, by: int = 0
) -> dict[str, Any]:
    """The first three of six steps, two batches each; by: the process that SIGTERM then ends."""
    return trained(processes, accumulate=2, sharded=sharded, end=end, interrupted=(by, 3))


def gradient_of_sums(processes: Processes) -> list[float]:
    """Of the square of a sum over everyone's rows, as the mean over processes that training takes."""
    weight = torch.ones(3, requires_grad=True)
    rows = torch.arange(24.0).reshape(8, 3)[processes.rank :: processes.world]
    (summed((rows * weight).sum(0)) ** 2).sum().backward()
    assert weight.grad is not None
    return [total / processes.world for total in processes.sums(*weight.grad.tolist())]


def not_finite(model: nn.Module, batch: Rows) -> Tensor:
    return loss_of(model, batch) * float("nan")


def keep_saving(processes: Processes, folder: Path, *, full: bool = False, killed: bool = False) -> None:
    """Save one sharded network again and again.

    full: after the first time, as onto a full disk. killed: this process, at some moment after the second.
    """
    model = network(norm=False)
    averaged = averaged_model(model, 0.9)
    shard(model, averaged, processes.device)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(10**6):
        save_checkpoint(folder / "last", model, averaged, optimizer, State(step=step), processes)
        if full:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        if killed and step == 1:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()


def load_elsewhere(processes: Processes, folder: Path) -> None:
    """Go on with a checkpoint that the main process's disk alone has."""
    model = network(norm=False)
    learner = Learner(model, averaged_model(model, 0.9), torch.optim.AdamW(model.parameters()))
    if processes.main:
        (folder / "disk_0/checkpoints").mkdir(parents=True)
    learner.save(folder / "disk_0", processes)
    learner.load(folder / f"disk_{processes.rank}", processes)


def main(task: str, folder: Path) -> None:
    rank = 0
    if "killed" in task:  # torchrun ends the others with it, perhaps before they have told what they saw
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with joined(torch.device("cpu")) as processes:
            rank = processes.rank
            with joined(torch.device("cpu")) as again:
                assert again is processes
            sys.stdout.write(f"process {rank} speaks\n")
            if task == "results":
                (folder / f"{rank}.json").write_text(json.dumps(results_of_many(processes, folder)))
            elif task.startswith("leave"):
                half_of_a_training(processes, folder / "last", sharded=task == "leave sharded")
            elif task.startswith("go on"):
                found = trained(
                    processes, accumulate=2, sharded=task == "go on sharded", begin=folder / "last"
                )
                (folder / f"{rank}.json").write_text(json.dumps(found))
            elif task == "full disk":
                keep_saving(processes, folder, full=rank == 1)
            elif task == "killed saving":
                keep_saving(processes, folder, killed=rank == 1)
            elif task == "diverge":
                trained(processes, loss_of=not_finite if rank == 1 else loss_of)
            elif task == "killed":
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                trained(processes, steps=10**9)
            elif task == "load elsewhere":
                load_elsewhere(processes, folder)
            elif task == "disagree" and rank == 0:
                raise ValueError("only the main process fails")
    except ValueError as error:
        sys.stderr.write(f"told: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
