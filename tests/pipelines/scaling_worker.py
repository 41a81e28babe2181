"""One of the processes that tests/pipelines/test_scaling.py starts with torchrun: FILE for what was found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines/benchmarks"))

from communication import VOLUMES, Case, derived, gloo_sent, loss_of, measured, samples
from step_messages import buckets

from medattn.training.distributed import Processes, joined

PATCH, IMAGE = (1, 16, 16, 16), (3, 32, 32)
SMALL = VOLUMES | {"widths": [16, 32, 64], "strides": [2, 2]}
CASES = {
    "one batch": Case("unet", SMALL, PATCH),
    "two batches": Case("unet", SMALL, PATCH, accumulate=2),
    "norms synced": Case("halonet_h0", {}, IMAGE, synced=True),
    "sharded, two batches": Case("unet", SMALL, PATCH, accumulate=2, sharded=True),
}


def volume(case: Case, processes: Processes) -> dict[str, float]:
    expected = derived(case, processes.world)
    return {
        "derived": sum(one.sent(processes.world) for one in expected),
        "gloo": sum(gloo_sent(one, processes.world) for one in expected),
        "measured": sum(measured(case, processes, steps=2)) / processes.world,
    }


def bucket_sizes(processes: Processes) -> dict[str, list[int]]:
    case = Case("unet", VOLUMES, (1, 32, 16, 16))
    model: Any = processes.wrap(case.build())
    for _ in range(3):  # the second arranges the buckets anew, the third tells
        loss_of(model, samples(case, 1)).backward()
    found = model._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    return {
        "derived": [size for _, size in buckets(case.work().gradients)],
        "found": [int(size) for size in found.split(",")],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as processes:
        result = {name: volume(case, processes) for name, case in CASES.items()}
        report = json.dumps({"volumes": result, "buckets": bucket_sizes(processes)})
        if processes.main:
            Path(sys.argv[1]).write_text(report)
