"""Published weights: random ones under the names of others give the output of the originals."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.networks import create
from medattn.networks.resnet_weights import from_published, our_names

AS_TIMM = {"padding": "zero", "offsets": "queries"}
# ours: theirs, a size of image that theirs takes, our options
TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "halonet26t": ("halonet26t", 256, {}),
    "halonet50ts": ("halonet50ts", 256, {}),
    "eca_halonext26ts": ("eca_halonext26ts", 256, {}),
    "halonet_h1": ("halonet_h1", 256, AS_TIMM),
    "lambda_resnet26t": ("lambda_resnet26t", 64, {}),
    "lambda_resnet50ts": ("lambda_resnet50ts", 64, {}),
    "lambda_resnet26rpt_256": ("lambda_resnet26rpt_256", 256, {}),
    "resnet50": ("resnet50", 64, {}),
    "resnet50_d": ("resnet50d", 64, {}),
    "se_resnet50": ("seresnet50", 64, {}),
}
LONG = ("halonet_h1", "halonet50ts", "lambda_resnet26rpt_256", "eca_halonext26ts")


@torch.no_grad()
def _lifelike(network: nn.Module, size: int) -> nn.Module:
    """Random affine norms with the statistics of noise, moved a little; residual branches are weak.

    Means over many keys of noise hardly vary, and a norm that divided by that would amplify rounding.
    """
    torch.manual_seed(0)
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        weak = name.endswith(("bn3", "conv3_1x1.bn"))
        nn.init.uniform_(norm.weight, *((0.1, 0.3) if weak else (0.5, 1.5)))
        nn.init.normal_(norm.bias, std=0.3)
        norm.momentum = 1.0
    network.train()(torch.randn(2, 3, size, size))
    for norm in norms.values():
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25)).add_(0.1)
    return network.eval()


def _assert_equal(ours: nn.Module, theirs: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    ours.load_state_dict(from_published(ours, theirs.state_dict()))
    with torch.no_grad():
        expected, got = theirs(x), ours.eval()(x)
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in TIMM])
def test_timms_weights_give_timms_output(name: str, timm: ModuleType) -> None:
    """In float32 to 1e-5, with timm's halo of zeros and its offsets of strided queries."""
    published, size, options = TIMM[name]
    theirs = _lifelike(timm.create_model(published), size)
    _assert_equal(create(name, **options), theirs, torch.randn(1, 3, size, size))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["halonet26t", "halonet_h1", "lambda_resnet50ts"])
def test_in_float64_the_difference_is_rounding(name: str, timm: ModuleType) -> None:
    published, size, options = TIMM[name]
    theirs = _lifelike(timm.create_model(published), size).double()
    _assert_equal(create(name, **options).double(), theirs, torch.randn(1, 3, size, size).double(), 1e-12)


def test_timms_gradients_are_ours(timm: ModuleType) -> None:
    """Every parameter's, of one training step, through the same mapping as the weights."""
    theirs = _lifelike(timm.create_model("lambda_resnet26t", num_classes=10), 64).double().train()
    ours = create("lambda_resnet26t", num_classes=10).double()
    ours.load_state_dict(from_published(ours, theirs.state_dict()))
    x = torch.randn(2, 3, 64, 64).double()
    for network in (theirs, ours):
        F.cross_entropy(network(x), torch.tensor([3, 7])).backward()
    expected = from_published(ours, {n: p.grad for n, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-10, msg=name)


def test_torchvisions_weights_give_torchvisions_output(torchvision: ModuleType) -> None:
    theirs = _lifelike(torchvision.models.resnet50(num_classes=10), 64)
    _assert_equal(create("resnet50", num_classes=10), theirs, torch.randn(1, 3, 61, 72))


class _Published(nn.Module):
    """The lambda layer of d-li14/lambda.pytorch from its formulas, with its names; [B, d, h, w]."""

    def __init__(self, d: int, stride: int, depth: int, scope: int) -> None:
        super().__init__()
        self.depth, self.widths = depth, (64, 16 * depth, d // 4 * depth)
        self.conv_qkv = nn.Conv2d(d, sum(self.widths), 1, bias=False)
        self.norm_q, self.norm_v = nn.BatchNorm2d(self.widths[0]), nn.BatchNorm2d(self.widths[2])
        self.lambda_conv = nn.Conv3d(depth, 16, (1, scope, scope), padding=(0, scope // 2, scope // 2))
        self.pool = nn.AvgPool2d(3, stride, 1) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.conv_qkv(x).split(self.widths, 1)
        q = self.norm_q(q).unflatten(1, (4, 16))
        v = self.norm_v(v).unflatten(1, (self.depth, -1))
        k = (
            k.unflatten(1, (self.depth, 16))
            .flatten(3)
            .softmax(-1)
            .view(*k.shape[:1], self.depth, 16, *x.shape[2:])
        )
        content = torch.einsum("bukij,buvij->bkv", k, v)
        lambdas = self.lambda_conv(v) + content[..., None, None]
        return self.pool(torch.einsum("bhkij,bkvij->bhvij", q, lambdas).flatten(1, 2))


@pytest.mark.parametrize(("depth", "scope"), [(1, 23), (2, 5)])
def test_lambda_pytorchs_weights_give_its_output(depth: int, scope: int, torchvision: ModuleType) -> None:
    """Its network is torchvision's with another conv2; maps of every parity of sides."""
    resnet = torchvision.models.resnet
    theirs = resnet.ResNet(resnet.Bottleneck, [2, 2, 2, 2], num_classes=10)
    for module in theirs.modules():
        if isinstance(module, resnet.Bottleneck):
            module.conv2 = _Published(module.conv2.in_channels, module.stride, depth, scope)
    _lifelike(theirs, 64)
    ours = create("lambda_resnet26", num_classes=10, depth=depth, scope=scope)
    _assert_equal(ours, theirs, torch.randn(1, 3, 61, 72))


def test_names_of_others_stay() -> None:
    names = ["head.weight", "stages.0.0.mix.0.weight", "encoder.norm.weight", "stages.0.1.shortcut.0.weight"]
    assert our_names(names) == dict(zip(names, names, strict=True))


def test_tables_of_another_form_keep_it() -> None:
    """So that loading them fails with their own shapes."""
    network = create("resnet26")
    odd = {
        "layer1.0.conv2.lambda_conv.weight": torch.zeros(2, 3),
        "stages.0.0.self_attn.pos_embed.height_rel": torch.zeros(5, 2),
    }
    kept = from_published(network, odd)
    assert [tuple(value.shape) for value in kept.values()] == [(2, 3), (5, 2)]
