"""What the processes of one training tell each other in a step, counted on networks that take no memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

import medattn_kernels.flops  # noqa: F401  so that the counter knows the operators
from medattn.networks import create
from medattn.training.distributed import BUCKET_MIB
from medattn.training.sharding import blocks
from medattn_pipelines.config import Config
from medattn_pipelines.configfile import load_any
from medattn_pipelines.imageconfig import ImageConfig

CONFIGS = Path(__file__).parents[2] / "configs"
ORGANS = 7
PATCH = (64, 64, 64)  # voxels, about what medattn.data.plan makes
BUCKET = BUCKET_MIB * 2**20  # bytes
HALVES = {"all-reduce": 2, "broadcast": 1, "all-gather": 1, "reduce-scatter": 1}


class Message(NamedTuple):
    """`times` collectives of a step that are alike. size: bytes of the whole tensor."""

    kind: str
    about: str
    size: int
    times: int = 1

    def sent(self, world: int) -> float:
        """Bytes that a process sends, the mean over processes."""
        return HALVES[self.kind] * (world - 1) / world * self.size * self.times


@dataclass(frozen=True)
class Work:
    """A network and one sample for it.

    flops: of a forward pass. gradients: of each parameter in the order in which they arrive, the share of the
    backward pass that is over by then, and bytes. units: shapes of the parameters of each block that sharding
    gathers as one, then of the rest. buffers: bytes of each type. norms: channels of each batch norm. loss:
    bytes that the loss sums over processes. batch: samples of a step by the config.
    """

    name: str
    flops: int
    gradients: tuple[tuple[float, int], ...]
    units: tuple[tuple[torch.Size, ...], ...]
    buffers: tuple[int, ...]
    norms: tuple[int, ...]
    loss: int
    batch: int

    @property
    def size(self) -> int:
        """Bytes of all gradients."""
        return sum(size for _, size in self.gradients)


def read_work(line: str) -> Work:
    """The work of a config: its name below configs/, then changes to it."""
    name, *changes = line.split()
    config = load_any(CONFIGS / f"{name}.yaml", changes)
    options: dict[str, Any] = dict(config.network.options)
    if isinstance(config, Config):
        shape = [1, *PATCH]
        options |= {"spatial_dims": 3, "in_channels": 1, "out_channels": 1 + ORGANS}
    elif isinstance(config, ImageConfig):
        shape = [3, config.image_size, config.image_size]
    else:
        shape = [3, *config.crop_size]
    batch = config.training.batch_size * getattr(config.training, "accumulate", 1)
    with torch.device("meta"):
        network = create(config.network.name, **options)
    loss = 3 * 4 * ORGANS if isinstance(config, Config) else 0
    return counted(config.network.name, network, shape, loss=loss, batch=batch)


def counted(name: str, network: nn.Module, shape: Sequence[int], *, loss: int = 0, batch: int = 0) -> Work:
    """The work of a network on the meta device. shape: [C, *size] of a sample."""
    before: dict[str, int] = {}

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, inputs: Any) -> None:
            before.setdefault(name, counter.get_total_flops())

        return note

    hooks = [module.register_forward_pre_hook(enter(name)) for name, module in network.named_modules()]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.empty(1, *shape, device="meta"))
    for hook in hooks:
        hook.remove()
    flops = counter.get_total_flops()
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    arrivals = [(1 - _entry(name, before) / flops, p.numel() * p.element_size()) for name, p in trained]
    arrivals.reverse()  # what a module uses last comes back first
    buffers: dict[torch.dtype, int] = {}
    for buffer in network.buffers():
        buffers[buffer.dtype] = buffers.get(buffer.dtype, 0) + buffer.numel() * buffer.element_size()
    return Work(
        name=name,
        flops=flops,
        gradients=tuple(sorted(arrivals, key=lambda arrival: arrival[0])),
        units=_units(network),
        buffers=tuple(buffers.values()),
        norms=tuple(m.num_features for m in network.modules() if isinstance(m, _BatchNorm)),
        loss=loss,
        batch=batch,
    )


def _units(network: nn.Module) -> tuple[tuple[torch.Size, ...], ...]:
    parts = [list(block.parameters()) for block in blocks(network)]
    inside = {id(p) for part in parts for p in part}
    parts.append([p for p in network.parameters() if id(p) not in inside])
    return tuple(tuple(p.shape for p in part) for part in parts)


def _entry(parameter: str, before: Mapping[str, int]) -> int:
    """FLOPs before the module of a parameter; where others use it for that module, before those."""
    module = parameter.rpartition(".")[0]
    while module not in before:
        module = module.rpartition(".")[0]
    return before[module]


def buckets(gradients: Sequence[tuple[float, int]], cap: int = BUCKET) -> list[tuple[float, int]]:
    """The gradients as DistributedDataParallel sends them: when each bucket is full, and its bytes."""
    done: list[tuple[float, int]] = []
    total = 0
    for share, size in gradients:
        total += size
        if total >= cap:
            done.append((share, total))
            total = 0
    return [*done, (gradients[-1][0], total)] if total else done


def messages(work: Work, *, synced: bool = False, accumulate: int = 1) -> list[Message]:
    """All that a process takes part in during a step under DistributedDataParallel.

    synced: batch norm over all processes. accumulate: batches per step.
    """
    return [
        *(Message("all-reduce", "gradients", size) for _, size in buckets(work.gradients)),
        *(Message("broadcast", "buffers", size) for size in work.buffers),
        *(Message("all-reduce", "norms", 4 * c, 4 * accumulate) for c in work.norms if synced),
        *_agreements(work, accumulate),
    ]


def sharded_messages(work: Work, world: int, *, accumulate: int = 1) -> list[Message]:
    """What a process takes part in during a step with sharded weights; LAMB adds sums of its norms.

    Blocks are gathered for each pass forward and each backward; what is in none stays whole in between.
    Gradients are scattered once. Every tensor is filled up to a multiple of `world` along its first axis.
    """
    *gathered, rest = [sum(_filled(shape, world) for shape in unit) for unit in work.units]
    return [
        *(Message("all-gather", "weights", size, 2 * accumulate) for size in gathered),
        Message("all-gather", "weights", rest, accumulate),
        *(Message("reduce-scatter", "gradients", size) for size in [*gathered, rest]),
        Message("all-reduce", "norm", 4),  # the sum of squares, for the gradient's norm
        *_agreements(work, accumulate),
    ]


def _filled(shape: Sequence[int], world: int) -> int:
    return 4 * ceil(shape[0] / world) * world * prod(shape[1:])


def _agreements(work: Work, accumulate: int) -> list[Message]:
    return [
        *(Message("all-reduce", "loss", work.loss, 2 * accumulate) for _ in range(work.loss > 0)),
        Message("all-reduce", "control", 40),  # Clock.agree: five float64
    ]
