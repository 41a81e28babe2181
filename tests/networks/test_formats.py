"""Every network in bfloat16 and with channels last: the numbers that it gives otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _step(network: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients, of the input too."""
    x = x.detach().requires_grad_()
    out = network(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    (out * weight).sum().backward()
    found = {"input": x.grad, **{name: parameter.grad for name, parameter in network.named_parameters()}}
    return out.detach(), {name: gradient for name, gradient in found.items() if gradient is not None}


def test_a_network_in_bfloat16_trains_close_to_float32(case: Any) -> None:
    """Weights, features and gradients in bfloat16 throughout, without autocast."""
    x = case.input()
    full, expected = _step(case.network(), x)
    low, got = _step(case.network().bfloat16(), x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low - full).abs().max() < 0.1 * full.abs().max()
    assert got.keys() == expected.keys()
    assert [name for name, gradient in got.items() if not gradient.isfinite().all()] == []
    a, b = (torch.cat([g.flatten().float() for g in gradients.values()]) for gradients in (got, expected))
    assert torch.cosine_similarity(a, b, dim=0) > 0.8  # block_unet_2d is at 0.89, its attention left out too


def test_channels_last_gives_the_same_output_and_gradients(case: Any) -> None:
    """Input and parameters in the format; compared by value, gradients in float64, where no kink is near."""
    layout = torch.channels_last if case.dims == 2 else torch.channels_last_3d
    x = case.input()
    with torch.no_grad():
        full = case.network()(x)
        last = case.network().to(memory_format=layout)(x.contiguous(memory_format=layout))
    assert (last - full).abs().max() < 1e-5 * full.abs().max()
    full, expected = _step(case.network().double(), x.double())
    network = case.network().double().to(memory_format=layout)
    last, got = _step(network, x.double().contiguous(memory_format=layout))
    torch.testing.assert_close(last, full)
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(got[name], want, rtol=1e-7, atol=1e-10, msg=name)
