"""3D convolutions of thin maps, whose gradients are wrong in bfloat16 on a CPU, in float32.

oneDNN, as torch 2.13 has it, leaves parts of the gradient of a 3 x 3 x 3 kernel as the memory was before, up
to 1e38 and NaN, where the map has two slices. With larger kernels thicker maps suffer, and it writes beyond
its memory. Seen on an AMD EPYC that computes in bfloat16; float32 is right, and so are all other shapes that
a U-Net has.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

LARGEST = 3  # kernel whose gradients are right but for maps thinner than itself


def spare_thin_maps(network: nn.Module) -> None:
    """Let the 3D convolutions of a network leave autocast where its gradients would be wrong, in place."""
    convolutions: list[nn.Module] = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
    for conv in convolutions:
        conv.forward = MethodType(_forward, conv)  # not a closure, which a copy would share


def _forward(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """x [B, C, d, h, w], of which only the slices d matter."""
    kernel = conv.kernel_size[0]
    if kernel <= LARGEST and x.shape[2] >= kernel:
        return type(conv).forward(conv, x)
    with torch.autocast("cpu", enabled=False):
        return type(conv).forward(conv, x.to(conv.weight.dtype))
