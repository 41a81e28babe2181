"""Multiplications that networks need, against those that references confirm."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import medattn.layers.lambda_convolution as lambda_convolution
import medattn_kernels.flops  # noqa: F401  so that the counter knows the operators
from medattn.layers.halo import HaloAttention
from medattn.networks import create
from medattn_kernels import lambda_attention


def _multiplications(network: nn.Module, size: int) -> int:
    """Of one image, without memory for any number; network: on the meta device."""
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        network.to_empty(device="cpu").eval()(torch.empty(1, 3, size, size))
    total: int = counter.get_total_flops()
    return total // 2


def _ours(name: str, size: int, **options: Any) -> int:
    with torch.device("meta"):
        network = create(name, **options)
    return _multiplications(network, size)


def test_resnet50_needs_what_is_published() -> None:
    assert _ours("resnet50", 224) == pytest.approx(4.11e9, rel=0.02)


@pytest.mark.parametrize(
    ("name", "published", "options"),
    [
        ("halonet_h1", 3.00e9, {"padding": "zero"}),
        ("halonet26t", 3.19e9, {}),
        ("halonet50ts", 5.30e9, {}),
        ("eca_halonext26ts", 2.44e9, {}),
    ],
)
def test_halonets_need_what_timm_counts_less_rows_that_no_pair_reads(
    name: str, published: float, options: dict[str, Any], timm: ModuleType
) -> None:
    """timm multiplies queries with all 2 n - 1 rows of a table, of which n have a key in the window."""
    with torch.device("meta"):
        network, theirs = create(name, **options), timm.create_model(name)
    unread = 0

    def count(layer: HaloAttention, inputs: Any, out: Tensor) -> None:
        nonlocal unread
        window = layer.block + 2 * layer.halo
        unread += 2 * out[0, 0].numel() * layer.q.out_channels * (window - 1)

    for layer in network.modules():
        if isinstance(layer, HaloAttention):
            layer.register_forward_hook(count)
    with_all_rows = _multiplications(network, 256) + unread
    assert with_all_rows == _multiplications(theirs, 256)
    assert with_all_rows == pytest.approx(published, rel=0.02)


def test_lambda_resnet50_needs_what_its_authors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the specification, that of their convolution, with the zeros around the map."""
    run = partial(lambda_attention, impl="naive")
    monkeypatch.setattr(lambda_convolution, "lambda_attention", run)
    assert _ours("lambda_resnet50", 224) == pytest.approx(6.576e9, rel=0.02)
