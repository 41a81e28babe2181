"""The published 2D network: its integers, and its arithmetic written out from the authors' layer list."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medattn.errors import InputError
from medattn.networks import create


def _count(**options: object) -> int:
    return sum(p.numel() for p in create("block_unet_2d", **options).parameters())


@pytest.mark.parametrize(
    ("outputs", "plain", "as_coded"),
    [(7, 13_394_567, 13_432_010), (9, 13_394_697, 13_432_140), (12, 13_394_892, 13_432_335)],
)
def test_parameters_are_the_published_ones_to_the_integer(outputs: int, plain: int, as_coded: int) -> None:
    """Without attention, with two modules of 12,481, and with the third that the authors never call."""
    assert _count(out_channels=outputs, placement="none") == plain
    assert _count(out_channels=outputs) == plain + 2 * 12_481
    assert _count(out_channels=outputs, layers=3) == as_coded


def _scan(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Windows of 36 pixels every 24, each written over what the ones before it left."""
    out, side = x.clone(), x.shape[-1]
    for top, left in product(range(0, side, 24), repeat=2):
        window = (..., slice(top, top + 36), slice(left, left + 36))
        part = x[window]
        q, k, v = (
            F.conv2d(part, state[f"{name}.{p}_conv.weight"], state[f"{name}.{p}_conv.bias"]).flatten(2)
            for p in ("query", "key", "value")
        )
        out[window] = (v @ (q.mT @ k).softmax(-1).mT).view(part.shape) + part
    return out


def _published(x: Tensor, state: dict[str, Tensor], last: bool) -> Tensor:
    """The authors' forward pass, from their layer list."""

    def double(x: Tensor, name: str) -> Tensor:
        for index in (0, 3):
            x = F.conv2d(
                x, state[f"{name}.conv.{index}.weight"], state[f"{name}.conv.{index}.bias"], padding=1
            )
            norm = f"{name}.conv.{index + 1}"
            keys = ("running_mean", "running_var", "weight", "bias")
            x = F.batch_norm(x, *(state[f"{norm}.{key}"] for key in keys)).relu()
        return x

    def attend(x: Tensor) -> Tensor:
        return _scan(_scan(x, state, "Block_SA1.inter_block_SA"), state, "Block_SA2.inter_block_SA")

    skips = [double(x, "inc.conv")]
    for n in range(1, 5):
        skips.append(double(F.max_pool2d(skips[-1], 2), f"down{n}.mpconv.1"))
    x = skips.pop()
    for n in range(1, 5):
        x = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)(x)
        x = double(torch.cat([skips.pop(), x], 1), f"up{n}.conv")
        if n == (4 if last else 3):
            x = attend(x)
    return F.conv2d(x, state["outc.conv.weight"], state["outc.conv.bias"])


@pytest.mark.parametrize("placement", ["penultimate", "last"])
def test_the_authors_state_dicts_load_and_give_their_output(
    placement: str, block_unet_state: Callable[[], dict[str, Tensor]]
) -> None:
    """At 96 x 96, where windows overlap and are clipped at the border in both placements."""
    network = create("block_unet_2d", placement=placement).eval()
    network.load_state_dict(block_unet_state())
    x = torch.randn(1, 1, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = _published(x, block_unet_state(), last=placement == "last")
        assert (network(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_any_size_and_every_parameter_takes_part() -> None:
    network = create("block_unet_2d", out_channels=3)
    out = network(torch.randn(2, 1, 37, 50))
    assert out.shape == (2, 3, 37, 50)
    out.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_our_own_state_dict_loads_again() -> None:
    first, second = (create("block_unet_2d").eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 1, 32, 32)
    assert torch.equal(first(x), second(x))


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="images: spatial_dims is 3, expected 2"):
        create("block_unet_2d", spatial_dims=3)
    with pytest.raises(InputError, match="placement is 'deep', expected 'penultimate', 'last', 'none'"):
        create("block_unet_2d", placement="deep")
