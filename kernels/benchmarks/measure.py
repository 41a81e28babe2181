"""Errors, times and peak memory of a computation, on a GPU or a CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median, quantiles

import torch
from shapes import Entry
from torch import Tensor

SAMPLE = 2**20  # entries of a tensor that are compared
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of an error by norm
FLUSH_BYTES = 256 * 2**20  # several times any GPU's cache
BUDGET_S = {"cuda": 0.5, "cpu": 6.0}  # per implementation and measurement
FEWEST = 3
COPIED_AT_ONCE = 2**30  # bytes: far beyond any cache, and small beside what the largest problems hold

Step = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds: the median and the 20th and 80th percentile of the repeats."""

    median: float
    p20: float
    p80: float
    repeats: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one forward and backward pass.

    tensors: inputs, outputs and the gradients of both. peak: the most that was held at once, these included.
    """

    tensors: int
    peak: int

    @property
    def beyond(self) -> int:
        """What was held at the peak that is neither input, output nor gradient."""
        return self.peak - self.tensors


@dataclass(frozen=True)
class Problem:
    """A computation with its leaves by name and the gradient of its output."""

    run: Callable[..., Tensor]
    leaves: Mapping[str, Tensor]
    dout: Tensor

    def forward(self) -> Tensor:
        """As in training: what the backward pass needs is kept."""
        return self.run(**self.leaves)

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward: the output and the gradient of every leaf."""
        out = self.forward()
        return out.detach(), *torch.autograd.grad(out, list(self.leaves.values()), self.dout)

    def memory(self, results: tuple[Tensor, ...], grown: int) -> Memory:
        """Of a pass with these results that grew what is held by so many bytes at most."""
        held = sum(map(_bytes, (*self.leaves.values(), self.dout)))
        return Memory(held + sum(map(_bytes, results)), held + grown)


def leaves(tensors: Mapping[str, Tensor], without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors that a candidate takes, as leaves of the graph of gradients."""
    return {name: x.detach().requires_grad_() for name, x in tensors.items() if name not in without}


def samples(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Some entries of each tensor in float64, at places that depend on its shape only; of small ones all."""
    found = []
    for x in tensors:
        if x.numel() <= SAMPLE:
            found.append(x.double())
            continue
        generator = torch.Generator().manual_seed(0)
        places = torch.randint(x.numel(), (SAMPLE,), generator=generator).to(x.device)
        found.append(x[torch.unravel_index(places, x.shape)].double())
    return found


def error(actual: list[Tensor], truth: list[Tensor]) -> float:
    """Norm of the difference over norm of the truth, the worst of all tensors; NaN stays NaN."""
    errors = [float((a - t).norm() / t.norm()) for a, t in zip(actual, truth, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def cuda_times(step: Step, most: int) -> Times:
    """By events, every repeat with a cold cache."""
    step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    ms: list[float] = []
    while len(ms) < FEWEST or (len(ms) < most and sum(ms) < 1e3 * BUDGET_S["cuda"]):
        _cold_cache().zero_()
        start.record()
        step()
        end.record()
        end.synchronize()
        ms.append(start.elapsed_time(end))
    return summary(ms)


def cpu_times(steps: Mapping[str, Step], most: int) -> dict[str, Times]:
    """By the clock, the steps in turn, so that whatever else the machine does hits all of them alike."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    begun = time.perf_counter()
    for round_ in range(max(most, FEWEST)):
        if round_ >= FEWEST and time.perf_counter() - begun > BUDGET_S["cpu"] * len(steps):
            break
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: summary(ms) for name, ms in found.items()}


def summary(ms: list[float]) -> Times:
    """Median and percentiles of at least two times."""
    fifths = quantiles(ms, n=5, method="inclusive")
    return Times(median(ms), fifths[0], fifths[-1], len(ms))


def cuda_memory(problem: Problem) -> Memory:
    """From the allocator's counters."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = problem.both()
    torch.cuda.synchronize()
    return problem.memory(results, torch.cuda.max_memory_allocated() - before)


def copy_of(moved: int, device: str) -> Step:
    """A plain copy that reads and writes so many bytes in all: what the memory allows in the same run."""
    whole, rest = divmod(moved // 2, COPIED_AT_ONCE)
    piece = COPIED_AT_ONCE if whole else rest
    source, target = (torch.zeros(piece, dtype=torch.uint8, device=device) for _ in range(2))

    def step() -> None:
        for _ in range(whole):
            target.copy_(source)
        target[:rest].copy_(source[:rest])

    return step


def cpu_memory(entry: Entry, candidate: str) -> Memory:
    """From the resident memory of a process of its own, see `peak.py`. Raises RuntimeError."""
    # memory that is freed goes back at once, so that resident memory follows what tensors hold
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, str(Path(__file__).with_name("peak.py")), json.dumps(asdict(entry)), candidate]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rsplit("\n", 1)[-1])
    return Memory(**json.loads(done.stdout))


@cache
def _cold_cache() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
