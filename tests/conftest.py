"""Shared fixtures: the real data beside the checkout, where it is there, and weights as others name them."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# without a GPU, Triton's kernels run in its interpreter; it reads this before its first import
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# torchvision's package is compiled for CUDA and does not load on other machines; what it then misses are
# these names, which its import gives shapes to and which no classifier and no transform calls
OPERATORS = (
    "nms qnms roi_align _roi_align_backward ps_roi_align _ps_roi_align_backward roi_pool _roi_pool_backward "
    "ps_roi_pool _ps_roi_pool_backward qroi_align deform_conv2d _deform_conv2d_backward"
)
_LIBRARY: list[torch.library.Library] = []


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real sample data, or a skip that says so."""
    if not SHARED.is_dir():
        pytest.skip(f"real sample data not present at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def block_unet_state() -> Callable[..., dict[str, Tensor]]:
    """Makes a state dict of the published block U-Net, `outputs=7`, as its authors name and shape it."""
    return _block_unet_state


def _block_unet_state(outputs: int = 7) -> dict[str, Tensor]:
    """Random numbers, the same for every call; three attentions, of which two are used."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def conv(name: str, inputs: int, outputs: int, side: int) -> None:
        std = (inputs * side**2) ** -0.5
        state[f"{name}.weight"] = torch.randn(outputs, inputs, side, side, generator=generator) * std
        state[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1

    def double(name: str, inputs: int, outputs: int) -> None:
        for index, width in ((0, inputs), (3, outputs)):
            conv(f"{name}.conv.{index}", width, outputs, 3)
            norm = f"{name}.conv.{index + 1}"
            state[f"{norm}.weight"] = torch.rand(outputs, generator=generator) + 0.5
            state[f"{norm}.bias"] = torch.randn(outputs, generator=generator) * 0.1
            state[f"{norm}.running_mean"] = torch.randn(outputs, generator=generator) * 0.1
            state[f"{norm}.running_var"] = torch.rand(outputs, generator=generator) + 0.5
            state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    double("inc.conv", 1, 64)
    for n, (a, b) in enumerate(pairwise((64, 128, 256, 512, 512)), start=1):
        double(f"down{n}.mpconv.1", a, b)
    for n, (a, b) in enumerate([(1024, 256), (512, 128), (256, 64), (128, 64)], start=1):
        double(f"up{n}.conv", a, b)
    conv("outc.conv", 64, outputs, 1)
    for n, part in product((1, 2, 3), ("query", "key", "value")):
        conv(f"Block_SA{n}.inter_block_SA.{part}_conv", 64, 64, 1)
        state[f"Block_SA{n}.inter_block_SA.gamma"] = torch.zeros(1)
    return state


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision, or a skip that says what to install."""
    reason = "needs `pip install --no-deps torchvision`, as make test does"
    try:
        found = import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS.split():
            library.define(f"{name}() -> ()")
        _LIBRARY.append(library)  # its operators live as long as it does
        found = import_module("torchvision")
    except ImportError:
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def timm(torchvision: ModuleType) -> ModuleType:
    """timm, or a skip that says what to install."""
    return pytest.importorskip("timm", reason="needs `pip install --no-deps timm`, as make test does")


# a busy machine is no reason for a red test: times are measured by benchmarks, never asserted here
settings.register_profile("medattn", deadline=None)
settings.load_profile("medattn")
