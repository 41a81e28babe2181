"""Gradients of 3D convolutions in bfloat16 on a CPU are those in float32, whatever the size of the map."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medattn.networks import create
from medattn.training.thin_maps import spare_thin_maps


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_gradients_are_those_in_float32(kernel: int, slices: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(16, 16, kernel, padding=kernel // 2)
    exact, x = copy.deepcopy(conv), torch.randn(2, 16, slices, 4, 4)
    spare_thin_maps(conv)
    for _ in range(3):
        left_behind = [torch.full((size,), 1e30) for size in range(1000, 2000, 50)]
        del left_behind  # the memory is used again, and is not empty
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = conv(x)
        given = torch.randn(out.shape)
        (out.float() * given).sum().backward()
        exact.zero_grad()
        (exact(x) * given).sum().backward()
        assert conv.weight.grad is not None
        torch.testing.assert_close(conv.weight.grad, exact.weight.grad, rtol=0.05, atol=0.5)


def test_only_thin_maps_leave_autocast_and_copies_have_their_own_weights() -> None:
    shape = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "widths": (8, 16), "strides": (2,)}
    network = create("unet", **shape)
    names = network.state_dict().keys()
    spare_thin_maps(network)
    mean = copy.deepcopy(network)
    assert mean.state_dict().keys() == names
    with torch.no_grad():
        for parameter in mean.parameters():
            parameter.zero_()
    conv = next(module for module in mean.modules() if isinstance(module, nn.Conv3d))
    with torch.autocast("cpu", torch.bfloat16):
        thick, thin = (conv(torch.randn(1, 1, slices, 8, 8)) for slices in (8, 2))
    assert (thick.dtype, thin.dtype) == (torch.bfloat16, torch.float32)
    assert not thin.any()
