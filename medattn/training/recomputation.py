"""Activation checkpointing: what is not kept is computed again (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medattn.training.sharding import blocks, replaced


def recompute_activations(network: nn.Module) -> None:
    """Let every block (see `blocks`) keep its input alone while the network trains, in place.

    Names, results, random numbers and running statistics are those of the network as it was, to the bit.
    """
    for block in blocks(network):
        block.forward = MethodType(_forward, block)  # not a closure, which a copy would share


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _spare_buffers(block)),
        **kwargs,
    )


def _spare_buffers(block: nn.Module) -> AbstractContextManager[None]:
    """Inside, the block has copies of its buffers: a second pass over a batch must not count as another."""
    own = [
        (owner, name, buffer)
        for owner in block.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    return replaced(own, Tensor.clone)
