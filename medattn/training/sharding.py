"""Weights of which each process keeps its share (FSDP2, torch's `fully_shard`), and has all for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of a network whose weights are gathered, and whose activations are computed again, as one.

    What lists (Sequential, ModuleList, ModuleDict) hold, through lists in lists: each module that has parts
    of its own; and each Sequential of mere layers. The rest, such as a head, is the network's own.
    """
    listed, found = type(network) in LISTS, []
    for part in network.children():
        found += [part] if _is_block(part, listed) else blocks(part)
    return found


def _is_block(part: nn.Module, listed: bool) -> bool:
    layers = list(part.children())
    if type(part) is nn.Sequential:
        return bool(layers) and not any(list(layer.children()) for layer in layers)
    return bool(layers) and listed and type(part) not in LISTS


def shard(network: nn.Module, averaged: nn.Module, device: torch.device) -> None:
    """Leave each process a slice, of the first axis, of every parameter of a network and of its average.

    In place; an optimizer is to be made afterwards. Both start as the main process's. The network gathers a
    block when it runs forward and again when it runs backward, and leaves each process its slice of the mean
    gradient; all in the type of the weights. The average runs inside `whole` alone.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP takes no others, such as channels-last ones
    for tensor in (*network.parameters(), *network.buffers()):
        dist.broadcast(tensor.detach(), 0)
    # a network that wrote in place into what a block returns would lose its gradients; none does, by test
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in (*blocks(network), network):
        fully_shard(module, mesh=mesh)
    for owner in averaged.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            slices = distribute_tensor(parameter.detach().contiguous(), mesh, [Shard(0)])
            setattr(owner, name, nn.Parameter(slices, parameter.requires_grad))


def is_sharded(network: nn.Module) -> bool:
    """Whether each process keeps a share of the network only."""
    return isinstance(network, FSDPModule)


@contextmanager
def whole(averaged: nn.Module) -> Iterator[None]:
    """Inside, each process has all weights of an average that `shard` has sliced, and may run it alone.

    All processes enter together. Whatever is done to the weights inside is lost. Nothing for one not sliced.
    """
    sliced = [
        (owner, name, parameter)
        for owner in averaged.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    try:
        for owner, name, parameter in sliced:
            setattr(owner, name, nn.Parameter(parameter.full_tensor().detach(), parameter.requires_grad))
        yield
    finally:
        for owner, name, parameter in sliced:
            setattr(owner, name, parameter)
