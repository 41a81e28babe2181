"""Weights of which each process keeps its share (FSDP2, torch's `fully_shard`), and has all for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only

from medattn.errors import InputError

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of a network whose weights are gathered, and whose activations are computed again, as one.

    What lists (Sequential, ModuleList, ModuleDict) hold, through lists in lists: each module that has parts
    of its own; and each Sequential of mere layers. The rest, such as a head, is the network's own.
    """
    listed, found = type(network) in LISTS, []
    for part in network.children():
        found += [part] if _is_block(part, listed) else blocks(part)
    return list(dict.fromkeys(found))  # two lists may hold the same


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

    Raises InputError for parameters without an axis, and for one with two names.
    """
    _require_slices(network)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP takes no others, such as channels-last ones
    for tensor in (*network.parameters(), *network.buffers()):
        dist.broadcast(tensor.detach(), 0)
    for module in (*blocks(network), network):
        module.register_forward_hook(_without_views)
        fully_shard(module, mesh=mesh)
    for owner in averaged.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            slices = distribute_tensor(parameter.detach().contiguous(), mesh, [Shard(0)])
            setattr(owner, name, nn.Parameter(slices, parameter.requires_grad))


def _require_slices(network: nn.Module) -> None:
    names: dict[nn.Parameter, str] = {}
    wrong = []
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if names.setdefault(parameter, name) != name:
            wrong.append(f"{names[parameter]} and {name} are one parameter")
        elif not parameter.ndim:
            wrong.append(f"{name} is a single number")
    if wrong:
        raise InputError(
            f"training.shard_weights: this network cannot be sharded, as {'; '.join(wrong)}; leave it out"
        )


def _without_views(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """A forward hook; FSDP's own, on what is returned, would be lost where a network writes into a view."""
    return tree_map_only(Tensor, _Same.apply, outputs)


class _Same(torch.autograd.Function):
    """The same values in the same memory, and no view of another tensor to autograd."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


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
    with replaced(sliced, lambda p: nn.Parameter(p.full_tensor().detach(), p.requires_grad)):
        yield


@contextmanager
def replaced(tensors: Sequence[tuple[nn.Module, str, Any]], make: Callable[[Any], Tensor]) -> Iterator[None]:
    """Inside, each tensor's owner has in its place what is made of it."""
    try:
        for owner, name, tensor in tensors:
            setattr(owner, name, make(tensor))
        yield
    finally:
        for owner, name, tensor in tensors:
            setattr(owner, name, tensor)
