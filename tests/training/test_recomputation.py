"""Activation checkpointing: less is kept for the backward pass, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medattn.networks import create, names
from medattn.networks.registry import task_of
from medattn.training.loop import averaged_model
from medattn.training.recomputation import recompute_activations
from medattn.training.sharding import blocks

UNET: dict[str, Any] = {"in_channels": 1, "out_channels": 3, "widths": (8, 12, 16), "strides": (2, 2)}
VOLUME = {"spatial_dims": 3, "deep_supervision": True, **UNET}
IMAGE = (2, 3, 64, 64)
QUICK = [
    pytest.param("unet_block", VOLUME, (2, 1, 16, 16, 16), id="unet_block"),
    pytest.param("resnet26", {"widths": [4, 8, 16, 32], "drop_path": 0.5}, IMAGE, id="batch-norm"),
    pytest.param("halonet26t", {"image_size": 64}, IMAGE, id="halonet26t"),
    pytest.param("xcit_nano_12_p16", {"drop_path": 0.5}, IMAGE, id="xcit-drop-path"),
]
SLOW = [
    *(pytest.param(name, VOLUME, (2, 1, 24, 24, 24), id=name) for name in names("unet*")),
    pytest.param("axial_resnet26_s", {"image_size": 64}, IMAGE, id="axial_resnet26_s"),
    pytest.param("lambda_resnet26t", {"image_size": 64}, IMAGE, id="lambda_resnet26t"),
    pytest.param("lesa_resnet50", {"image_size": 64}, IMAGE, id="lesa_resnet50"),
    pytest.param("eamlp_7", {"image_size": 64, "dropout": 0.5}, IMAGE, id="eamlp-dropout"),
    pytest.param("focal_tiny", {"image_size": 64, "drop_path": 0.5}, IMAGE, id="focal_tiny"),
    pytest.param("panoptic_deeplab_resnet50", {}, IMAGE, id="panoptic-aspp"),
    pytest.param("axial_deeplab_s", {"image_size": 65}, IMAGE, id="axial_deeplab_s"),
    pytest.param("block_unet_2d", {"in_channels": 1}, (1, 1, 48, 48), id="block_unet_2d"),
    pytest.param("eanet_resnet50", {"in_channels": 3, "out_channels": 3}, IMAGE, id="eanet_resnet50"),
]

FAMILIES = [
    *("unet", "unet_block", "block_unet_2d", "eanet_resnet50", "panoptic_deeplab", "axial_deeplab_s"),
    *("resnet50", "axial_resnet50_s", "halonet_h4", "lambda_resnet50", "lesa_resnet50"),
    *("xcit_small_12_p16", "focal_tiny", "eamlp_14"),
]


def built(name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    network = create(name, **options)
    for parameter in network.parameters():
        if not parameter.any():  # what starts at zero would hide what goes wrong behind it
            nn.init.normal_(parameter, std=0.1)
    return network


def loss_of(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        outputs = network(x)
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    return torch.stack([output.float().square().mean() for output in outputs]).sum()


def trained(network: nn.Module, size: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights, running statistics and gradients after two steps, and the next random number."""
    averaged = averaged_model(network, 0.9)
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    torch.manual_seed(1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(network, torch.randn(size), dtype).backward()
        optimizer.step()
        averaged.update_parameters(network)
    gradients = {f"d {n}": p.grad for n, p in network.named_parameters() if p.grad is not None}
    return network.state_dict() | gradients | averaged.state_dict() | {"random": torch.rand(1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "options", "size"),
    [*QUICK, *(pytest.param(*case.values, id=f"{case.id}-too", marks=pytest.mark.slow) for case in SLOW)],
)
def test_training_is_the_same_to_the_bit(
    name: str, options: dict[str, Any], size: tuple[int, ...], dtype: torch.dtype
) -> None:
    """With what is random in a network, and statistics that a second pass may not count again."""
    plain = built(name, options)
    network = copy.deepcopy(plain)
    recompute_activations(network)
    expected, found = trained(plain, size, dtype), trained(network, size, dtype)
    assert found.keys() == expected.keys()
    different = [key for key, value in expected.items() if not torch.equal(found[key], value)]
    assert different == []


@contextmanager
def kept_bytes(counts: list[int]) -> Iterator[None]:
    """Adds up what is kept for backward passes, each piece of memory once."""
    pieces: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            pieces[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    counts.append(sum(pieces.values()))


@pytest.mark.parametrize(
    ("name", "options", "size", "share"),
    [
        pytest.param("unet_block", VOLUME, (1, 1, 32, 32, 32), 0.6, id="unet_block"),
        pytest.param("resnet50", {}, (4, 3, 64, 64), 0.45, id="resnet50"),
        pytest.param("xcit_nano_12_p16", {}, (1, 3, 224, 224), 0.2, id="xcit_nano_12_p16"),
    ],
)
def test_less_is_kept(name: str, options: dict[str, Any], size: tuple[int, ...], share: float) -> None:
    network, counts = built(name, options), list[int]()
    x = torch.randn(size)
    for _ in range(2):
        with kept_bytes(counts):
            loss = loss_of(network, x, torch.float32)
        del loss
        recompute_activations(network)
    assert counts[1] < share * counts[0]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return scale * self.layer(x)


@pytest.mark.parametrize("training", [True, False])
def test_blocks_may_be_called_with_keywords(training: bool) -> None:
    network = nn.ModuleList([Scaled()]).train(training)
    x = torch.ones(2, 3)
    expected = network[0](x, scale=2.0)
    recompute_activations(network)
    assert blocks(network) == [network[0]]
    assert torch.equal(network[0](x, scale=2.0), expected)


def test_outside_of_training_nothing_is_computed_twice() -> None:
    network = built("resnet26", {"widths": [4, 8, 16, 32]}).eval()
    recompute_activations(network)
    calls = list[int]()
    blocks(network)[0].register_forward_hook(lambda *_: calls.append(1))
    first, second = list[int](), list[int]()
    with kept_bytes(first):
        loss_of(network, torch.randn(IMAGE), torch.float32).backward()
    with kept_bytes(second), torch.no_grad():
        loss_of(network, torch.randn(IMAGE), torch.float32)
    assert len(calls) == 2
    assert first[0] > second[0] == 0


def test_a_copy_computes_with_its_own_weights() -> None:
    network = built("resnet26", {"widths": [4, 8, 16, 32]})
    recompute_activations(network)
    copied = copy.deepcopy(network)
    for parameter in copied.parameters():
        nn.init.zeros_(parameter)
    assert copied(torch.randn(IMAGE)).abs().max() == 0
    assert network(torch.randn(IMAGE)).abs().max() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_nearly_all_of_a_network_is_in_blocks(name: str) -> None:
    """By the number of weights, the head with its thousand classes aside; and each block is a small part."""
    options = {} if task_of(name) != "segmentation" else {"in_channels": 1, "out_channels": 3}
    dims = {"spatial_dims": 3} if name.startswith("unet") else {}
    with torch.device("meta"):
        network = create(name, **options, **dims)
    if task_of(name) == "classification":
        network.head = nn.Identity()
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(network)]
    everything = sum(p.numel() for p in network.parameters())
    assert sum(sizes) > 0.8 * everything
    assert max(sizes) < 0.4 * everything
