"""The processes of one training, as torchrun starts them: who they are, what they agree on, how they end.

Every process trains on its share of each batch, and gradients are averaged: by DistributedDataParallel, or by
FSDP2 where `sharding` has left each process a share of the weights. The first process is `main`: it speaks,
and it alone writes what is not shared out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from medattn.errors import InputError

# one process may prepare data or write a report for hours while the others wait; one that died is noticed
# at once by its closed connection, and torchrun ends the others
WAIT = timedelta(days=7)

# so much of the gradients is sent together. Torch's 25 hold most of a network of 30 MB, and are full when the
# backward pass ends, which then hides nothing (docs/scaling.md)
BUCKET_MIB = 5

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, and its device. Alone, everything here is done at once.

    control: group for agreements between CPUs, whatever the device; None alone.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """The process that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here.

        Without a tensor: gloo's thread might let go of that while Python ends, which aborts the process.
        """
        if self.control is not None:
            dist.barrier(group=self.control)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run a block in the main process, then in the others, which find what it left."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def total(self, *numbers: int) -> list[int]:
        """Each number summed over the processes."""
        values = torch.tensor(numbers)
        if self.control is not None:
            dist.all_reduce(values, group=self.control)
        return values.tolist()

    def sums(self, *numbers: float) -> list[float]:
        """Each number summed over the processes in float64, by the way that gradients take.

        Quicker than the others, which go from CPU to CPU, but NCCL waits for minutes only.
        """
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(values)
        return values.tolist()

    def gathered(self, item: T) -> list[T]:
        """What each process gives, in the order of ranks."""
        if self.control is None:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item, group=self.control)
        return items

    def collected(self, found: Mapping[K, T], order: Iterable[K]) -> list[T]:
        """What the processes found, of one key each, in an order of keys; some may stand for nothing."""
        everything = {key: value for share in self.gathered(found) for key, value in share.items()}
        return [everything[key] for key in order if key in everything]

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network with gradients that are means over the processes; it starts as the main process's.

        Its buffers, such as batch norm's running statistics, are the main process's at the first forward pass
        of each step. A network that is sharded sees to its gradients itself.
        """
        if self.world == 1 or is_sharded(network):
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices, bucket_cap_mb=BUCKET_MIB)

    def share_buffers(self, module: nn.Module) -> None:
        """Make the buffers those of the main process, so that all evaluate the model that it would save."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


ALONE = Processes()
_JOINED: ContextVar[Processes | None] = ContextVar("_JOINED", default=None)


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes of this training: those of torchrun, or this one alone. Inside itself it yields the same.

    device: cpu, or cuda, of which a process takes the one of its number on its machine. Processes but the
    main one are silent inside. At the end all wait for all. Where one raises, all end: the first to fail
    raises on, for the others, which it may have torn along, it is SystemExit with code 2.

    Raises InputError for more processes than CUDA devices on a machine.
    """
    if (around := _JOINED.get()) is not None:
        yield around
        return
    if not dist.is_torchelastic_launched():
        yield Processes(device)
        return
    store, rank, world = next(rendezvous("env://"))
    if world == 1:
        yield Processes(device)
        return
    store = _emptied(store, rank, world)
    processes = _start(own_device(device), store, rank, world)
    token, ended_well = _JOINED.set(processes), False
    try:
        with ExitStack() as quiet:
            if not processes.main:
                nowhere = quiet.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                quiet.enter_context(redirect_stdout(nowhere))
                quiet.enter_context(redirect_stderr(nowhere))
            yield processes
            processes.wait()
        ended_well = True
    except BaseException as error:
        if not _first_to_fail(store):
            raise SystemExit(2) from None
        if _lost(error):
            raise InputError(
                "another process of this command ended without a word, as when memory runs out; "
                "torchrun says below which one; a training continues with --resume"
            ) from None
        raise
    finally:
        _JOINED.reset(token)
        # after a failure, NCCL would wait for those who are gone; what it holds ends with the process
        if ended_well or device.type != "cuda":
            dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The CUDA device of this process's number on its machine; the CPU is everyone's.

    Raises InputError where there is none of that number.
    """
    if device.type != "cuda":
        return device
    number, found = dist.get_node_local_rank(0), torch.cuda.device_count()
    if number >= found:
        raise InputError(
            f"torchrun: process {number} of this machine has no CUDA device, found {found}; "
            f"start with --nproc-per-node {found}"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def held_gradients(model: nn.Module, held: bool) -> AbstractContextManager[None]:
    """While `held`, gradients add up in each process and are not averaged over processes yet."""
    if is_sharded(model):
        cast(Any, model).set_requires_gradient_sync(not held)
        return nullcontext()
    no_sync = getattr(model, "no_sync", None)
    return no_sync() if held and no_sync is not None else nullcontext()


def is_sharded(network: nn.Module) -> bool:
    """Whether each process keeps a share of it; by name, as importing FSDP takes half as long as torch."""
    return hasattr(network, "set_requires_gradient_sync")


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, which gradients flow through; the values themselves alone.

    Where all processes make the same loss of such sums, the mean gradient over processes is that of the loss.
    """
    if not dist.is_initialized():
        return values
    return _Sum.apply(values)  # type: ignore[no-any-return, no-untyped-call]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _emptied(store: Store, rank: int, world: int) -> Store:
    """The store without what earlier starts of these processes left there, which torchrun hands to restarts.

    Else some would look for others where those were before. The main process names a part of it that is new,
    and the number of restarts does not: machines count their own.
    """
    mine = uuid4().hex
    if rank:
        store.set(f"here/{rank}", mine)
        new = PrefixStore(store.get(mine).decode(), store)  # waits for the answer
        new.add("here", 1)
        return new
    new = PrefixStore(mine, store)
    while new.add("here", 0) < world - 1:
        for other in range(1, world):
            # it may still be the process before, whom an answer does no harm
            if store.check([f"here/{other}"]):
                store.set(store.get(f"here/{other}").decode(), mine)
        time.sleep(0.02)
    return new


def _start(device: torch.device, store: Store, rank: int, world: int) -> Processes:
    place: dict[str, Any] = {"store": PrefixStore("training", store), "rank": rank, "world_size": world}
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, **place)
        control = dist.new_group(backend="gloo", timeout=WAIT)
    else:
        dist.init_process_group("gloo", timeout=WAIT, **place)
        control = dist.group.WORLD
    return Processes(device, rank, world, control)


def _first_to_fail(store: Store) -> bool:
    try:
        return store.add("failed", 1) == 1
    except dist.DistError:  # the main process may keep the store, and be gone
        return False


def _lost(error: BaseException) -> bool:
    """What gloo and NCCL raise when the other side is gone."""
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in gone)
    )
