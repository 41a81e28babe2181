"""Axial-ResNet, LESA and EANet under their authors' names, against dense programs that read those names.

The programs share nothing with the networks: torch's functions on state dicts, with all logits as maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.networks import axial_resnet, eanet, lesa
from medattn.networks.axial_resnet import axial_resnet as build_axial
from medattn.networks.eanet import EANet
from medattn.networks.lesa import LesaResNet

HEADS, CLASSES = 8, 5
State = dict[str, Tensor]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
Middle = Callable[["Dense", str, Tensor, int], Tensor]


@dataclass
class Random:
    """A state dict that grows by the layers that are named; the same numbers for the same calls."""

    state: State = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def draw(self, name: str, *shape: int, std: float = 1.0) -> None:
        self.state[name] = torch.randn(shape, generator=self.generator, dtype=torch.float64) * std

    def conv(self, name: str, outputs: int, inputs: int, *side: int, bias: bool = False) -> None:
        self.draw(f"{name}.weight", outputs, inputs, *side, std=(inputs * prod(side)) ** -0.5)
        if bias:
            self.draw(f"{name}.bias", outputs, std=0.1)

    def norm(self, name: str, channels: int) -> None:
        for part in ("weight", "running_var"):
            numbers = torch.rand(channels, generator=self.generator, dtype=torch.float64)
            self.state[f"{name}.{part}"] = numbers + 0.5
        for part in ("bias", "running_mean"):
            self.draw(f"{name}.{part}", channels, std=0.1)
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(1)

    def attention(self, name: str, c: int, positions: int) -> None:
        self.conv(f"{name}.qkv_transform", 2 * c, c, 1)
        for norm, channels in (("bn_qkv", 2 * c), ("bn_similarity", 3 * HEADS), ("bn_output", 2 * c)):
            self.norm(f"{name}.{norm}", channels)
        self.draw(f"{name}.relative", 2 * c // HEADS, 2 * positions - 1, std=0.5)
        place = torch.arange(positions)
        self.state[f"{name}.flatten_index"] = (place[:, None] - place + positions - 1).flatten()

    def shortcut(self, name: str, outputs: int, inputs: int, stride: int) -> None:
        if stride > 1 or inputs != outputs:
            self.conv(f"{name}.downsample.0", outputs, inputs, 1, 1)
            self.norm(f"{name}.downsample.1", outputs)


@dataclass
class Dense:
    """Layers of a state dict by their names, in training or evaluation."""

    state: State
    training: bool

    def conv(self, name: str, x: Tensor, **options: Any) -> Tensor:
        run = F.conv1d if self.state[f"{name}.weight"].ndim == 3 else F.conv2d
        return run(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        get = lambda part: self.state[f"{name}.{part}"]  # noqa: E731
        moments = get("running_mean"), get("running_var")
        return F.batch_norm(x, *moments, get("weight"), get("bias"), self.training)

    def attention(self, name: str, x: Tensor) -> Tensor:
        """Position-sensitive attention on lines [n, c, L]: column i - j + L - 1, of keys j - i + L - 1."""
        (n, c, length), g = x.shape, x.shape[1] // HEADS
        qkv = self.norm(f"{name}.bn_qkv", self.conv(f"{name}.qkv_transform", x))
        q, k, v = qkv.view(n, HEADS, 2 * g, length).split([g // 2, g // 2, g], 2)
        table = self.state[f"{name}.relative"]
        place = torch.arange(length)
        rows = table[:, place[:, None] - place + (table.shape[1] - 1) // 2]
        r_q, r_k, r_v = rows.split([g // 2, g // 2, g])
        terms = [
            torch.einsum("nhci,nhcj->nhij", q, k),
            torch.einsum("nhci,cij->nhij", q, r_q),
            torch.einsum("nhcj,cji->nhij", k, r_k),
        ]
        logits = self.norm(f"{name}.bn_similarity", torch.cat(terms, 1))
        a = logits.view(n, 3, HEADS, length, length).sum(1).softmax(-1)
        content, position = torch.einsum("nhij,nhcj->nhci", a, v), torch.einsum("nhij,cij->nhci", a, r_v)
        both = torch.stack([content, position], 3).reshape(n, 2 * c, length)
        return self.norm(f"{name}.bn_output", both).view(n, c, 2, length).sum(2)

    def stages(self, x: Tensor, depths: Iterable[int], strides: Iterable[int], middle: Middle) -> Tensor:
        """The blocks layerN.M between their shortcuts."""
        for stage, (depth, stride) in enumerate(zip(depths, strides, strict=True), 1):
            for block in range(depth):
                name, step = f"layer{stage}.{block}", stride if block == 0 else 1
                out, identity = middle(self, name, x, step), x
                if f"{name}.downsample.0.weight" in self.state:
                    identity = self.norm(
                        f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride=step)
                    )
                x = (out + identity).relu()
        return x

    def classifier(self, image: Tensor, *stages: Any) -> Tensor:
        """Stem, stages and head of torchvision's ResNet."""
        x = self.norm("bn1", self.conv("conv1", image, stride=2, padding=3)).relu()
        x = self.stages(F.max_pool2d(x, 3, 2, 1), *stages).mean((2, 3))
        return F.linear(x, self.state["fc.weight"], self.state["fc.bias"])


def _copy(state: State, dtype: torch.dtype) -> State:
    return {
        name: value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
        for name, value in state.items()
    }


def _check(
    network: nn.Module,
    state: State,
    family: ModuleType,
    dense: Callable[[Dense, Tensor], Tensor],
    x: Tensor,
) -> None:
    """Every weight is taken. Outputs in both modes and then running statistics agree.

    In float64 to 1e-9. In float32 to 1e-5 or, where norms over few numbers magnify rounding, to twice the
    error of the dense program in float32.
    """
    names = family.our_names(state)
    assert all(name.endswith("flatten_index") for name in state if name not in names)
    for dtype, tolerance in TOLERANCES.items():
        network.to(dtype).load_state_dict(family.from_published(network, state))
        for training in (False, True):
            exact, rounded = (Dense(_copy(state, d), training) for d in (torch.float64, dtype))
            expected = dense(exact, x)
            scale = expected.abs().max()
            own = (dense(rounded, x.to(dtype)) - expected).abs().max() / scale
            error = (network.train(training)(x.to(dtype)) - expected).abs().max() / scale
            assert error <= max(tolerance, 2 * own), f"{dtype}, {training=}: {error:.1e}"
        statistics = network.state_dict()
        for name in (name for name in names if name.endswith("running_var")):
            got, want = statistics[names[name]].double(), exact.state[name]
            assert (got - want).abs().max() <= 10 * tolerance * want.abs().max(), name


def _axial_state(depths: tuple[int, ...], side: int) -> State:
    random = Random()
    random.conv("conv1", 16, 3, 7, 7)
    random.norm("bn1", 16)
    inputs = 16
    for stage, depth in enumerate(depths):
        width = 32 * 2**stage
        for block in range(depth):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            random.conv(f"{name}.conv_down", width, inputs, 1, 1)
            random.norm(f"{name}.bn1", width)
            random.attention(f"{name}.hight_block", width, side)
            random.attention(f"{name}.width_block", width, side)
            random.conv(f"{name}.conv_up", 2 * width, width, 1, 1)
            random.norm(f"{name}.bn2", 2 * width)
            random.shortcut(name, 2 * width, inputs, stride)
            inputs, side = 2 * width, side // stride
    random.conv("fc", CLASSES, inputs, bias=True)
    return random.state


def _axial_block(dense: Dense, name: str, x: Tensor, stride: int, *, striding: str) -> Tensor:
    x = dense.norm(f"{name}.bn1", dense.conv(f"{name}.conv_down", x)).relu()
    for axis, part in ((2, "hight_block"), (3, "width_block")):
        moved = x.movedim((1, axis), (2, 3))  # [B, other axis, c, L]
        lines = dense.attention(f"{name}.{part}", moved.flatten(0, 1))
        x = lines.view_as(moved).movedim((2, 3), (1, axis))
        if striding == "each":
            x = x[:, :, ::stride] if axis == 2 else x[:, :, :, ::stride]
    if striding == "both":
        x = F.avg_pool2d(x, stride)
    return dense.norm(f"{name}.bn2", dense.conv(f"{name}.conv_up", x.relu()))


@pytest.mark.parametrize("striding", ["both", "each"])
def test_axial_resnet_equals_the_dense_program(striding: str) -> None:
    depths, strides = (1, 2, 1, 1), (1, 2, 2, 2)
    state = _axial_state(depths, 16)
    network = build_axial(depths, 0.25, num_classes=CLASSES, image_size=64, striding=striding)
    block = partial(_axial_block, striding=striding)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = lambda layers, x: layers.classifier(x, depths, strides, block)  # noqa: E731
    _check(network, state, axial_resnet, dense, x)


def _lesa_state(depths: tuple[int, ...], positions: int) -> State:
    random = Random()
    random.conv("conv1", 64, 3, 7, 7)
    random.norm("bn1", 64)
    inputs = 64
    for stage, depth in enumerate(depths):
        c = 64 * 2**stage
        for block in range(depth):
            name = f"layer{stage + 1}.{block}"
            random.conv(f"{name}.conv1", c, inputs, 1, 1)
            random.norm(f"{name}.bn1", c)
            if stage == 3 or (stage == 2 and block):
                random.attention(f"{name}.conv2", c, positions)
                random.conv(f"{name}.conv2.x_transform.0", c, c // HEADS, 3, 3)
                random.conv(f"{name}.conv2.x_transform.1", c, c, 1, 1)
                random.norm(f"{name}.conv2.bn_x", c)
                random.conv(f"{name}.conv2.reasoning.1", c, 2 * c, 1, 1)
                random.norm(f"{name}.conv2.reasoning.2", c)
                random.conv(f"{name}.conv2.projection.0", c, c, 1, 1)
                random.norm(f"{name}.conv2.projection.1", c)
            else:
                random.conv(f"{name}.conv2", c, c, 3, 3)
                random.norm(f"{name}.bn2", c)
            random.conv(f"{name}.conv3", 4 * c, c, 1, 1)
            random.norm(f"{name}.bn3", 4 * c)
            random.shortcut(name, 4 * c, inputs, 2 if stage in (1, 2) and not block else 1)
            inputs = 4 * c
    random.conv("fc", CLASSES, inputs, bias=True)
    return random.state


def _lesa_block(dense: Dense, name: str, x: Tensor, stride: int) -> Tensor:
    x = dense.norm(f"{name}.bn1", dense.conv(f"{name}.conv1", x)).relu()
    part = f"{name}.conv2"
    if f"{part}.weight" in dense.state:
        x = dense.norm(f"{name}.bn2", dense.conv(part, x, stride=stride, padding=1))
    else:
        local = dense.conv(f"{part}.x_transform.0", x, padding=1, groups=HEADS)
        local = dense.norm(f"{part}.bn_x", dense.conv(f"{part}.x_transform.1", local))
        context = dense.attention(part, x.flatten(2)).view_as(x)
        gate = dense.conv(f"{part}.reasoning.1", torch.cat([local, context], 1).relu())
        gate = dense.conv(f"{part}.projection.0", dense.norm(f"{part}.reasoning.2", gate).relu())
        x = local + dense.norm(f"{part}.projection.1", gate).sigmoid() * context
    return dense.norm(f"{name}.bn3", dense.conv(f"{name}.conv3", x.relu()))


def test_lesa_resnet_equals_the_dense_program() -> None:
    depths, strides = (1, 1, 2, 1), (1, 2, 2, 1)
    state = _lesa_state(depths, 9)
    network = LesaResNet(depths=depths, num_classes=CLASSES, image_size=48)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = lambda layers, x: layers.classifier(x, depths, strides, _lesa_block)  # noqa: E731
    _check(network, state, lesa, dense, x)


STEM = ((0, 64, 3), (3, 64, 64), (6, 128, 64))  # index, channels out and in


def _eanet_state(depths: tuple[int, ...]) -> State:
    random = Random()
    for index, outputs, inputs in STEM:
        random.conv(f"extractor.0.{index}", outputs, inputs, 3, 3)
        random.norm(f"extractor.0.{index + 1}" if index < 6 else "extractor.1", outputs)
    inputs = 128
    for stage, depth in enumerate(depths):
        c = 64 * 2**stage
        for block in range(depth):
            name = f"extractor.{stage + 4}.{block}"
            for part, (o, i, k) in enumerate(((c, inputs, 1), (c, c, 3), (4 * c, c, 1)), 1):
                random.conv(f"{name}.conv{part}", o, i, k, k)
                random.norm(f"{name}.bn{part}", o)
            random.shortcut(name, 4 * c, inputs, 1 + (stage == 1 and not block))
            inputs = 4 * c
    random.conv("fc0.conv", 512, 2048, 3, 3)
    random.norm("fc0.bn", 512)
    random.conv("linu.conv1", 512, 512, 1, 1, bias=True)
    random.conv("linu.linear_0", 64, 512, 1)
    random.conv("linu.linear_1", 512, 64, 1)
    random.conv("linu.conv2.0", 512, 512, 1, 1)
    random.norm("linu.conv2.1", 512)
    random.conv("fc1.0.conv", 256, 512, 3, 3)
    random.norm("fc1.0.bn", 256)
    random.conv("fc2", CLASSES, 256, 1, 1, bias=True)
    return random.state


def _eanet_block(dense: Dense, name: str, x: Tensor, stride: int) -> Tensor:
    stage, block = int(name[5]), int(name[7:])
    dilation = {3: (1, 2, 2), 4: (2, 8, 16)}.get(stage, (1, 1, 1))[block]
    x = dense.norm(f"{name}.bn1", dense.conv(f"{name}.conv1", x)).relu()
    x = dense.conv(f"{name}.conv2", x, stride=stride, padding=dilation, dilation=dilation)
    return dense.norm(f"{name}.bn3", dense.conv(f"{name}.conv3", dense.norm(f"{name}.bn2", x).relu()))


def _eanet(dense: Dense, image: Tensor, depths: tuple[int, ...]) -> Tensor:
    x = image
    for index, _, _ in STEM:
        norm = f"extractor.0.{index + 1}" if index < 6 else "extractor.1"
        stride = 1 if index else 2
        x = dense.norm(norm, dense.conv(f"extractor.0.{index}", x, stride=stride, padding=1)).relu()
    layers = {  # the same tensors under torchvision's names
        f"layer{int(name[10]) - 3}{name[11:]}": value
        for name, value in dense.state.items()
        if name.startswith("extractor.") and name[10] in "4567"
    }
    stages = Dense(layers, dense.training)
    x = stages.stages(F.max_pool2d(x, 3, 2, 1), depths, (1, 2, 1, 1), _eanet_block)
    x = dense.norm("fc0.bn", dense.conv("fc0.conv", x, padding=1)).relu()
    slots = dense.conv("linu.linear_0", dense.conv("linu.conv1", x).flatten(2)).softmax(2)
    slots = slots / (1e-9 + slots.sum(1, keepdim=True))
    mixed = dense.conv("linu.linear_1", slots).view_as(x)
    x = (x + dense.norm("linu.conv2.1", dense.conv("linu.conv2.0", mixed))).relu()
    x = dense.conv("fc2", dense.norm("fc1.0.bn", dense.conv("fc1.0.conv", x, padding=1)).relu())
    return F.interpolate(x, image.shape[2:], mode="bilinear", align_corners=True)


def test_eanet_equals_the_dense_program() -> None:
    depths = (1, 1, 2, 3)
    state = _eanet_state(depths)
    network = EANet(depths=depths, out_channels=CLASSES, dropout=0)  # dropout is random
    x = torch.randn(2, 3, 17, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _check(network, state, eanet, partial(_eanet, depths=depths), x)


@pytest.mark.parametrize(
    ("names", "theirs", "ours"),
    [
        (axial_resnet.our_names, "layer3.1.hight_block.relative", "stages.2.1.mix.height.relative"),
        (axial_resnet.our_names, "layer2.0.downsample.1.running_var", "stages.1.0.shortcut.1.running_var"),
        (lesa.our_names, "layer4.2.conv2.bn_qkv.bias", "stages.3.2.mix.0.context.bn_qkv.bias"),
        (lesa.our_names, "layer4.2.conv2.x_transform.0.weight", "stages.3.2.mix.0.x_transform.0.weight"),
        (eanet.our_names, "extractor.1.weight", "extractor.stem.7.weight"),
        (eanet.our_names, "unknown", "unknown"),
    ],
)
def test_published_names(names: Callable[[list[str]], dict[str, str]], theirs: str, ours: str) -> None:
    assert names([theirs, "layer1.0.x.flatten_index"])[theirs] == ours
