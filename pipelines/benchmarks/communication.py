"""The bytes that processes of a training really send in a step, against those that step_messages.py derives.

    torchrun --standalone --nproc-per-node 2 pipelines/benchmarks/communication.py
    torchrun --standalone --nproc-per-node 4 pipelines/benchmarks/communication.py

Steps of the real loop (`medattn.training.loop.fit`) on the CPU, over gloo. Counted are what the kernel's
counters of each TCP connection (Linux 4.19 or newer) say was sent, repeats aside; the table has the mean over
processes. `gloo` adds to the derived bytes the headers that gloo sends: 48 bytes with each piece of a tensor,
and twice 48 for the two sides to agree on it. A ring takes tensors in pieces of at most 1 MiB, at least two
per process. It scatters by reducing all, which doubles the bytes.

Predicted before the first run: within 0.5% of the derived bytes without synchronised norms, whose messages
are of the size of their headers, within 3% with them, and within 0.1% of `gloo` throughout; buffers once per
step, however many batches it has. What came out is in docs/scaling.md.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from step_messages import ORGANS, Message, Work, counted, messages, sharded_messages
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.losses import segmentation_loss
from medattn.networks import create
from medattn.training.distributed import Processes, joined, summed
from medattn.training.loop import Limits, Schedule, State, averaged_model, fit
from medattn.training.sharding import shard
from medattn.training.synced_batch_norm import synchronise_batch_norms
from medattn_pipelines.progress import print_table

STEPS, WARMUP = 5, 2  # DistributedDataParallel arranges its buckets after the first step
HEADERS = 3 * 48  # bytes with each piece of a tensor
SENT, REPEATED = 200, 208  # bytes into struct tcp_info of linux/tcp.h


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    network: str
    options: Mapping[str, Any]
    shape: tuple[int, ...]
    synced: bool = False
    accumulate: int = 1
    sharded: bool = False

    def build(self) -> nn.Module:
        """The network."""
        network = create(self.network, **self.options)
        if self.synced:
            synchronise_batch_norms(network)
        return network

    @property
    def volumes(self) -> bool:
        """Whether it segments volumes, and does not classify images."""
        return len(self.shape) == 4

    def work(self) -> Work:
        """Counted without memory."""
        with torch.device("meta"):
            network = self.build()
        return counted(self.network, network, self.shape, loss=12 * ORGANS if self.volumes else 0)


VOLUMES = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1 + ORGANS, "residual": True}
CASES = (
    *(Case("unet_block", VOLUMES, (1, 32, 32, 32), accumulate=a) for a in (1, 2)),
    *(Case("halonet_h1", {}, (3, 64, 64), s, a) for s in (False, True) for a in (1, 2)),
    *(Case("halonet_h1", {}, (3, 64, 64), accumulate=a, sharded=True) for a in (1, 2)),
)


@dataclass(frozen=True)
class Samples:
    """A batch at random."""

    image: Tensor
    target: Tensor
    cases: tuple[str, ...] = ("random",)


def samples(case: Case, batch: int = 2) -> Samples:
    """Images [B, C, *size], and voxel labels or classes."""
    shape = (batch, *case.shape[1:]) if case.volumes else (batch,)
    return Samples(torch.randn(batch, *case.shape), torch.randint(1 + ORGANS, shape))


def loss_of(model: nn.Module, batch: Samples) -> Tensor:
    """The loss of the pipeline for volumes, or of that for images."""
    outputs = model(batch.image)
    if batch.target.ndim == 1:
        return F.cross_entropy(outputs, batch.target)
    return segmentation_loss(
        outputs, batch.target, batch.target.new_ones(len(outputs), ORGANS).bool(), summed
    )


def sent_bytes() -> int:
    """Bytes that this process has sent over its TCP connections, once each, while they are open."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not link.readlink().name.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent, repeated = struct.unpack_from("=QQ", info, SENT)
                    total += sent - repeated
        except FileNotFoundError:  # closed in the meantime, as the listing itself is
            continue
    return total


def measured(case: Case, processes: Processes, steps: int = STEPS) -> list[float]:
    """Bytes that each process sends in a step, the mean of `steps`."""
    torch.manual_seed(0)
    network = case.build()
    averaged = averaged_model(network, 0.0)
    if case.sharded:
        shard(network, averaged, processes.device)
    model = network if case.sharded else processes.wrap(network)
    sent: list[int] = []
    fit(
        model,
        repeat(samples(case)),
        loss_of,
        torch.optim.SGD(network.parameters(), 1e-3),
        Schedule(1e-3, 0, "cosine"),
        averaged=averaged,
        state=State(),
        limits=Limits(WARMUP + steps, None, None, 1000, 1000),
        clip=None,
        on_step=lambda _: sent.append(sent_bytes()),
        validate=lambda: 0.0,
        keep_best=lambda: None,
        save=lambda: None,
        started=time.monotonic(),
        accumulate=case.accumulate,
        processes=processes,
    )
    return processes.gathered((sent[-1] - sent[WARMUP - 1]) / steps)


def derived(case: Case, world: int) -> list[Message]:
    """The messages of a step, on paper."""
    work = case.work()
    if case.sharded:
        return sharded_messages(work, world, accumulate=case.accumulate)
    return messages(work, synced=case.synced, accumulate=case.accumulate)


def gloo_sent(message: Message, world: int) -> float:
    """Bytes that a process sends by gloo's algorithms, headers too, the mean over processes."""
    return message.times * GLOO[message.kind](message.size, world)


def _reduced(size: int, world: int) -> float:
    pieces = ceil(max(ceil(size / 2**20), 2 * world) / world) * world
    piece = 4 * ceil(ceil(size / pieces) / 4)
    return 2 * (world - 1) / world * (size + HEADERS * ceil(size / piece))


def _broadcast(size: int, world: int) -> float:
    return (world - 1) / world * (size + HEADERS)


def _gathered(size: int, world: int) -> float:
    return (world - 1) / world * size + (world - 1) * 2 * HEADERS


GLOO: dict[str, Callable[[int, int], float]] = {
    "all-reduce": _reduced,
    "reduce-scatter": _reduced,
    "broadcast": _broadcast,
    "all-gather": _gathered,
}


def control_seconds(processes: Processes, times: int = 500) -> float:
    """Of one small message to all and back, as a training sends in each step; the median."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        processes.sums(0.0)
        seconds.append(time.perf_counter() - begun)
    return median(seconds)


def rows(processes: Processes) -> Iterator[tuple[str | float | None, ...]]:
    """A row for each case."""
    world = processes.world
    for case in CASES:
        expected = derived(case, world)
        paper = sum(one.sent(world) for one in expected)
        gloo = sum(gloo_sent(one, world) for one in expected)
        found = measured(case, processes)
        mean = sum(found) / world
        yield (
            case.network,
            "FSDP" if case.sharded else "DDP, norms synced" if case.synced else "DDP",
            str(case.accumulate),
            *(f"{number / 1e6:.3f}" for number in (paper, gloo, mean, max(found))),
            f"{mean / paper:.4f}",
            f"{mean / gloo:.4f}",
        )


COLUMNS = ("network", "kind", "batches", "derived", "gloo", "measured", "largest", "ratio", "to gloo")


def main() -> None:
    """Measure the cases and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as processes:
        print_table(
            f"MB (10^6 bytes) sent in a step by {processes.world} processes", COLUMNS, rows(processes)
        )
        seconds = control_seconds(processes)
        hops = 2 * (processes.world - 1)
        print(
            f"control message: {1e6 * seconds:.0f} us, {1e6 * seconds / hops:.0f} us for each of {hops} hops"
        )


if __name__ == "__main__":
    main()
