"""What each process of tests/training/test_distributed.py does: trainings that one process repeats alone."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medattn.training.distributed import Processes, joined, summed
from medattn.training.loop import Limits, Schedule, State, averaged_model, fit
from medattn.training.synced_batch_norm import synchronise_batch_norms

SHARED_BATCH = 8


@dataclass
class Rows:
    """A share of a batch."""

    rows: Tensor
    cases: tuple[str, ...] = ("case_7",)


def shares(processes: Processes, accumulate: int) -> Iterator[Rows]:
    """Each process's share of batches that are the same for any number of processes."""
    generator = torch.Generator().manual_seed(3)
    size = SHARED_BATCH // accumulate
    while True:
        yield Rows(torch.randn(size, 6, generator=generator)[processes.rank :: processes.world])


def network(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(12) if norm else nn.LayerNorm(12)
    # a bias before batch norm has no gradient but rounding, which Adam makes as large as any
    return nn.Sequential(nn.Linear(6, 12, bias=not norm), middle, nn.GELU(), nn.Linear(12, 1))


def loss_of(model: nn.Module, batch: Rows) -> Tensor:
    return ((model(batch.rows)[:, 0] - batch.rows.sum(1).tanh()) ** 2).mean()


def trained(
    processes: Processes, *, norm: bool = False, accumulate: int = 1, **events: Any
) -> dict[str, Any]:
    """Losses, weights, buffers and the reason of a small training."""
    model = network(norm)
    if norm:
        synchronise_batch_norms(model)
    averaged, state, losses = averaged_model(model, 0.9), State(), []
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)

    def on_step(values: Any) -> None:
        losses.append(values["loss"])
        if events.get("interrupted") == (processes.rank, len(losses)):
            os.kill(os.getpid(), signal.SIGTERM)

    reason = fit(
        processes.wrap(model),
        shares(processes, accumulate),
        events.get("loss_of", loss_of),
        optimizer,
        Schedule(0.01, 2, "cosine"),
        averaged=averaged,
        state=state,
        limits=Limits(events.get("steps", 6), events.get("max_seconds"), None, 3, 100),
        clip=1.0,
        on_step=on_step,
        validate=lambda: 0.0,
        keep_best=lambda: None,
        save=lambda: None,
        started=time.monotonic() - (1000 * processes.rank if "max_seconds" in events else 0),
        accumulate=accumulate,
        processes=processes,
    )
    tensors = {name: value.tolist() for name, value in averaged.module.state_dict().items()}
    return {"reason": reason, "step": state.step, "losses": losses, "tensors": tensors}


def all_results(processes: Processes) -> dict[str, Any]:
    """One entry per thing that the number of processes may not change."""
    results = {
        "plain": trained(processes),
        "accumulated": trained(processes, accumulate=2),
        "batch norm": trained(processes, norm=True),
        "sums": gradient_of_sums(processes),
    }
    if processes.world > 1:
        last = processes.world - 1
        # caught by the last process in its third step: all stop after it
        results["signal"] = trained(processes, interrupted=(last, 3))
        # the clocks of the others are 1000 s ahead: the main one's counts
        results["time"] = trained(processes, steps=10**9, max_seconds=0.5)
        results["agreements"] = {
            "total": processes.total(processes.rank, 1),
            "largest": processes.largest(-processes.rank, processes.rank),
            "mean": processes.mean(processes.rank),
            "gathered": processes.gathered(f"process {processes.rank}"),
        }
    return results


def gradient_of_sums(processes: Processes) -> list[float]:
    """Of the square of a sum over everyone's rows, as the mean over processes that training takes."""
    weight = torch.ones(3, requires_grad=True)
    rows = torch.arange(24.0).reshape(8, 3)[processes.rank :: processes.world]
    (summed((rows * weight).sum(0)) ** 2).sum().backward()
    assert weight.grad is not None
    return [processes.mean(value) for value in weight.grad.tolist()]


def not_finite(model: nn.Module, batch: Rows) -> Tensor:
    return loss_of(model, batch) * float("nan")


def main(task: str, folder: Path) -> None:
    rank = 0
    try:
        with joined(torch.device("cpu")) as processes:
            rank = processes.rank
            with joined(torch.device("cpu")) as again:
                assert again is processes
            sys.stdout.write(f"process {rank} speaks\n")
            if task == "results":
                (folder / f"{rank}.json").write_text(json.dumps(all_results(processes)))
            elif task == "diverge":
                trained(processes, loss_of=not_finite if rank == 1 else loss_of)
            elif task == "killed":
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                trained(processes, steps=10**9)
            elif task == "disagree" and rank == 0:
                raise ValueError("only the main process fails")
    except ValueError as error:
        sys.stderr.write(f"told: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
