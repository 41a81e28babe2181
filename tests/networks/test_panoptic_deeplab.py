"""Panoptic-DeepLab and Axial-DeepLab: sizes, shapes, backbones, weights; see also test_panoptic_flops.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medattn.errors import InputError
from medattn.layers.axial import AxialAttention2d
from medattn.networks import create, names
from medattn.networks.panoptic_decoder import ASPP, enlarged, separable
from medattn.networks.panoptic_deeplab import PanopticDeepLab, load_backbone
from medattn.networks.registry import task_of
from medattn.panoptic import PanopticOutput

CLASSES = 5
TINY: dict[str, Any] = {"scale": 0.125, "depths": (1, 1, 1, 1), "width": 16, "num_classes": CLASSES}
SIZES = [  # name, parameters with 133 classes, published; axial_deeplab.md 5.2 and 5.5
    ("axial_deeplab_s", 12_216_568, 12.1e6),
    ("axial_deeplab_m", 26_025_176, 25.9e6),
    ("axial_deeplab_l", 45_051_576, 44.9e6),
    ("axial_deeplab_xl", 173_335_096, 173.0e6),
    ("panoptic_deeplab_resnet50", 30_095_096, 30.0e6),
]
RESNET = {"depths": (1, 1, 1, 1)}
XCIT = {"width": 16, "depth": 6, "heads": 2}
BACKBONES: dict[str, tuple[dict[str, Any], int]] = {  # options that make it small, stride of its last map
    "resnet26": (RESNET | {"widths": (8, 8, 16, 32)}, 16),
    "resnet50_d": (RESNET | {"widths": (8, 8, 16, 16), "strides": (1, 2, 2, 2)}, 32),
    "halonet_h0": (RESNET, 16),
    "halonet_h4": (RESNET | {"block": 4}, 16),  # with a last convolution that only the head sees
    "halonet26t": (RESNET, 16),
    "lambda_resnet26": ({}, 16),
    "lambda_resnet26t": (RESNET, 16),
    "axial_resnet26_s": ({}, 16),
    "lesa_resnet50": (RESNET, 16),
    "xcit_nano_12_p16": (XCIT, 32),
    "xcit_nano_12_p8": (XCIT, 32),
    "focal_tiny": ({"width": 12, "depths": (1, 1, 1, 1), "heads": (1, 2, 2, 4)}, 32),
}
# biases of norms and keys before a softmax shift all logits of a query alike
INERT = ("bn_similarity.bias", "key_conv.bias", "norm_k.bias")


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _moved(network: nn.Module) -> nn.Module:
    """Published starts at zero would hide other parts."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def _tiny(**options: Any) -> PanopticDeepLab:
    torch.manual_seed(0)
    network = _moved(create("axial_deeplab_s", **TINY | options))
    assert isinstance(network, PanopticDeepLab)
    return network


def _on(backbone: str, **options: Any) -> PanopticDeepLab:
    torch.manual_seed(0)
    small, _ = BACKBONES[backbone]
    network = create(
        "panoptic_deeplab",
        backbone=backbone,
        backbone_options=small | options.pop("backbone_options", {}),
        **{"num_classes": CLASSES, "width": 16, "image_size": 64} | options,
    )
    assert isinstance(network, PanopticDeepLab)
    return network


def _shapes(out: PanopticOutput) -> list[tuple[int, ...]]:
    return [tuple(part.shape) for part in out]


def _assert_close(got: PanopticOutput, expected: PanopticOutput) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("name", "expected", "published"), SIZES, ids=[row[0] for row in SIZES])
def test_parameters_are_the_published_ones(name: str, expected: int, published: float) -> None:
    """With the 133 classes of COCO and, 257 parameters each, the 19 of Cityscapes."""
    with torch.device("meta"):
        found = _count(create(name))
    assert found == expected
    assert [found, found - 257 * (133 - 19)] == pytest.approx([published] * 2, rel=0.01)


@pytest.mark.parametrize("kind", ["direct", "projection", "aspp", "full_aspp"])
def test_decoders_count_as_their_layers_do(kind: str) -> None:
    """Convolutions without bias, two numbers per channel for a norm; heads end in one with bias."""
    options = {
        "direct": {},
        "projection": {"projection": True},
        "aspp": {"aspp": True},
        "full_aspp": {"aspp": True, "depthwise": False},
    }[kind]
    with torch.device("meta"):
        network = create("panoptic_deeplab_resnet50", num_classes=19, **{"aspp": False} | options)

    def conv(inputs: int, outputs: int) -> int:
        return inputs * outputs + 2 * outputs

    def pair(inputs: int, outputs: int, side: int = 5) -> int:
        return side * side * inputs + 2 * inputs + conv(inputs, outputs)

    context, into = 0, 2048
    if kind != "direct":
        into = 256
        context = conv(2048, 256)
    if "aspp" in kind:
        wide = 3 * (pair(2048, 256, 3) if kind == "aspp" else conv(9 * 2048, 256))
        context += wide + 2048 * 256 + conv(5 * 256, 256)
    semantic = conv(512, 64) + pair(into + 64, 256) + conv(256, 32) + pair(256 + 32, 256)
    instance = conv(512, 32) + pair(into + 32, 128) + conv(256, 16) + pair(128 + 16, 128)
    heads = pair(256, 256) + 257 * 19 + 2 * pair(128, 32) + 33 * (1 + 2)
    assert _count(network) - _count(network.get_submodule("backbone")) == (
        2 * context + semantic + instance + heads
    )


def test_the_backbone_is_the_classifier_without_its_head() -> None:
    options = {"rows": 509, "stem": "three_convs", "strides": (1, 2, 2, 1), "striding": "each"}
    with torch.device("meta"):
        classifier = create("axial_resnet50_m", **options)
        backbone = create("axial_deeplab_m").get_submodule("backbone")
    expected = {name for name in classifier.state_dict() if not name.startswith("head.")}
    assert set(backbone.state_dict()) == expected


def test_tables_have_509_rows_and_a_span_unless_told_otherwise() -> None:
    def layers(**options: Any) -> list[AxialAttention2d]:
        with torch.device("meta"):
            network = create("axial_deeplab_s", **options)
        return [module for module in network.modules() if isinstance(module, AxialAttention2d)]

    assert {(layer.relative.shape[1], layer.span) for layer in layers()} == {(509, 65)}
    assert {layer.span for layer in layers(span=None)} == {None}
    lengths = [layer.relative.shape[1] for layer in layers(rows=None, image_size=(65, 129))]
    assert lengths == [2 * n - 1 for n in [33] * 6 + [33] * 2 + [17] * 6 + [17] * 2 + [9] * 10 + [9] * 6]


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 70), st.integers(1, 70))
def test_images_of_any_size_give_maps_of_a_quarter(height: int, width: int) -> None:
    network = _tiny().eval()
    with torch.no_grad():
        out = network(torch.randn(1, 3, height, width))
    h, w = -(-height // 4), -(-width // 4)
    assert _shapes(out) == [(1, CLASSES, h, w), (1, 1, h, w), (1, 2, h, w)]
    assert all(part.isfinite().all() for part in out)


def test_maps_of_images_of_sixteen_k_plus_one_share_their_corners() -> None:
    """Position n of a map of stride s stands for pixel s n, so maps align without a shift."""
    blocks, side = 5, 16 * 5 + 1
    maps = _tiny().eval().backbone.features(torch.randn(1, 3, side, side))  # type: ignore[operator]
    assert [m.shape[2] for m in maps] == [4 * blocks + 1, 2 * blocks + 1, blocks + 1, blocks + 1]
    place = [torch.arange(m.shape[2]).float() * (side - 1) / (m.shape[2] - 1) for m in maps]
    coarse, fine = (p.expand(1, 1, len(p), len(p)) for p in (place[-1], place[0]))
    torch.testing.assert_close(enlarged(coarse, maps[0]), fine)
    assert torch.equal(place[0], torch.arange(0, side, 4).float())


def test_heads_say_numbers_as_they_are_and_offsets_in_pixels_of_the_image() -> None:
    """A unit of the offset head is a position of its map, four pixels."""
    network = _tiny().eval()
    for head, bias in ((network.centre_head, [-2.0]), (network.offset_head, [1.0, -3.0])):
        last = head[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor(bias)
    out = network(torch.randn(1, 3, 33, 33))
    assert out.centre.unique().tolist() == [-2.0]
    assert [out.offset[0, axis].unique().tolist() for axis in (0, 1)] == [[4.0], [-12.0]]


def test_centres_and_offsets_end_in_float32_under_autocast() -> None:
    """In bfloat16, neighbours of one heat are resized to plateaus, and an instance has five centres."""
    network, image = _tiny().eval(), torch.randn(1, 3, 33, 33)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = network(image)
    assert out.semantic.dtype == torch.bfloat16
    for maps in (out.centre, out.offset):
        assert maps.dtype == torch.float32
        assert not torch.equal(maps, maps.bfloat16().float())


def test_pooling_reaches_its_rates_and_the_whole_image() -> None:
    """Where the output at the middle depends on the input: a grid of offsets, faintly everything."""
    torch.manual_seed(0)
    for depthwise in (True, False):
        pool = ASPP(32, 32, depthwise=depthwise, dropout=0.5).double().eval()
        x = torch.randn(1, 32, 41, 41, dtype=torch.float64, requires_grad=True)
        nn.init.zeros_(pool.pooled[0].weight)  # type: ignore[arg-type]
        (felt,) = torch.autograd.grad(pool(x)[0, :, 20, 20].sum(), x)
        offsets = {0, *(sign * rate for sign in (-1, 1) for rate in (6, 12, 18))}
        allowed = {(20 + i, 20 + j) for i in offsets for j in offsets if 0 in (i, j) or abs(i) == abs(j)}
        assert {tuple(place) for place in felt[0].abs().sum(0).nonzero().tolist()} == allowed
        nn.init.ones_(pool.pooled[0].weight)  # type: ignore[arg-type]
        (felt,) = torch.autograd.grad(pool(x.abs())[0, :, 20, 20].sum(), x)
        assert (felt[0].abs().sum(0) > 0).all()


def test_fusions_see_five_by_five_positions() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 11, 11, requires_grad=True)
    (felt,) = torch.autograd.grad(separable(8, 64).eval()(x)[0, :, 5, 5].sum(), x)
    assert felt[0].abs().sum(0).nonzero().tolist() == [[i, j] for i in range(3, 8) for j in range(3, 8)]


@pytest.mark.parametrize(
    "options", [{"aspp": True}, {"aspp": True, "depthwise": False}, {"projection": True}]
)
def test_what_stands_before_the_fusions_is_an_option(options: dict[str, Any]) -> None:
    network = _tiny(**options)
    out = network(torch.randn(1, 3, 49, 33))  # one image: the pooled mean has no norm
    assert _shapes(out) == [(1, CLASSES, 13, 9), (1, 1, 13, 9), (1, 2, 13, 9)]
    sum(part.square().sum() for part in out).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_family_is_a_backbone_all_of_whose_parameters_learn(backbone: str) -> None:
    """A parameter that never gets a gradient would stop a distributed training."""
    network = _moved(_on(backbone))
    out = network(torch.randn(2, 3, 70, 81))
    assert _shapes(out) == [(2, CLASSES, 18, 21), (2, 1, 18, 21), (2, 2, 18, 21)]
    assert network.backbone.feature_strides[-1] == BACKBONES[backbone][1]  # type: ignore[index, union-attr]
    sum((part * torch.randn_like(part)).sum() for part in out).backward()
    parameters = dict(network.named_parameters())
    assert [name for name, p in parameters.items() if p.grad is None] == []
    silent = [name for name, p in parameters.items() if not p.grad.any()]  # type: ignore[union-attr]
    assert [name for name in silent if not name.endswith(INERT)] == []


@pytest.mark.parametrize("backbone", BACKBONES)
def test_announced_channels_and_strides_are_those_of_the_maps(backbone: str) -> None:
    network: Any = _on(backbone).eval().backbone
    with torch.no_grad():
        maps = network.features(torch.randn(1, 3, 65, 97))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (channels, -(-65 // stride), -(-97 // stride))
        for channels, stride in zip(network.feature_channels, network.feature_strides, strict=True)
    ]


@pytest.mark.parametrize("backbone", ["resnet26", "axial_resnet26_s", "xcit_nano_12_p8", "focal_tiny"])
def test_weights_of_a_classifier_load_into_the_backbone(backbone: str) -> None:
    small, _ = BACKBONES[backbone]
    classifier: Any = create(backbone, num_classes=7, image_size=64, **small)
    for parameter in classifier.parameters():
        nn.init.normal_(parameter, std=0.1)
    network: Any = _on(backbone)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    load_backbone(network, classifier.state_dict())
    loaded, given = network.backbone.state_dict(), classifier.state_dict()
    same = [name for name in loaded if name in given]
    assert len(same) > 20
    assert all(torch.equal(loaded[name], given[name]) for name in same)
    assert {name.split(".")[0] for name in loaded.keys() - set(same)} <= {"pyramid"}
    for name, value in network.state_dict().items():
        if name.startswith(("backbone.pyramid", "semantic", "instance", "centre", "offset")):
            assert torch.equal(value, start[name])


def test_axial_tables_of_another_length_are_interpolated() -> None:
    """A table that is linear in the offset stays so; one of the same length is left alone."""
    options = {"stem": "three_convs", "striding": "each", "image_size": 64}
    classifier = create("axial_resnet26_s", **options)
    weights = classifier.state_dict()
    for name, value in weights.items():
        if name.endswith(".relative"):
            value.copy_(torch.linspace(-1, 1, value.shape[1]).expand_as(value))
    network: Any = create("axial_deeplab_s", depths=(1, 2, 4, 1), num_classes=CLASSES)
    load_backbone(network, weights)
    for name, value in network.backbone.state_dict().items():
        if name.endswith(".relative"):
            torch.testing.assert_close(value, torch.linspace(-1, 1, 509).expand_as(value))
    noisy = {name: torch.rand(value.shape).to(value) for name, value in network.backbone.state_dict().items()}
    load_backbone(network, noisy | {"head.weight": torch.zeros(7, 1024), "head.bias": torch.zeros(7)})
    assert all(torch.equal(value, noisy[name]) for name, value in network.backbone.state_dict().items())


def test_weights_that_do_not_fit_are_named_and_change_nothing() -> None:
    network = _on("resnet26")
    weights = dict(network.get_submodule("backbone").state_dict())
    before = {name: value.clone() for name, value in weights.items()}
    weights["stem.0.weight"] = torch.zeros(64, 4, 7, 7)
    weights["stages.7.weight"] = torch.zeros(2)
    del weights["stages.0.0.expand.0.weight"]
    with pytest.raises(InputError) as raised:
        load_backbone(network, weights)
    (message,) = raised.value.args
    assert "1 of another shape, 1 unexpected, 1 missing" in message
    assert "stem.0.weight is [64, 4, 7, 7], expected [64, 3, 7, 7]" in message
    assert "unexpected stages.7.weight [2]" in message
    assert "missing stages.0.0.expand.0.weight [32, 8, 1, 1]" in message
    after = network.get_submodule("backbone").state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    renamed = {f"other.{name}": value for name, value in before.items()}
    with pytest.raises(InputError) as raised:
        load_backbone(network, renamed)
    assert str(raised.value).count(" [") == 5
    with pytest.raises(InputError, match="Linear has no backbone"):
        load_backbone(nn.Linear(1, 1), {})


def test_state_dict_round_trip_gives_the_same_output() -> None:
    first, second = _tiny(aspp=True).eval(), _tiny(aspp=True).eval()
    for parameter in second.parameters():
        nn.init.uniform_(parameter)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, 33, 49)
    for one, other in zip(first(x), second(x), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_memory_format_and_low_precision_stay_close() -> None:
    network, x = _tiny().eval(), torch.randn(2, 3, 33, 49)
    full = network(x)
    last = network.to(memory_format=torch.channels_last)(  # type: ignore[call-overload]
        x.to(memory_format=torch.channels_last)
    )
    _assert_close(last, full)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x)
    for one, other in zip(low, full, strict=True):
        assert (one.float() - other).abs().max() < 0.1 * other.abs().max()


@pytest.mark.slow
def test_compiled_as_one_graph_the_decoders_train_the_same() -> None:
    torch._dynamo.reset()
    eager, compiled = (_on("resnet26", aspp=True, dropout=0.0).double() for _ in range(2))
    x = torch.randn(2, 3, 33, 49, dtype=torch.float64)
    outputs = [eager(x), torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)]
    assert isinstance(outputs[1], PanopticOutput)
    _assert_close(outputs[1], outputs[0])
    for out in outputs:
        torch.autograd.backward([part.square().mean() for part in out])
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)


@pytest.mark.slow
@torch.no_grad()
def test_axial_deeplab_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    network, x = _tiny().eval(), torch.randn(2, 3, 33, 49)
    _assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), network(x))


@pytest.mark.slow
@torch.no_grad()
def test_exported_program_gives_the_same_output() -> None:
    network, x = _tiny(aspp=True).eval(), torch.randn(2, 3, 33, 49)
    found = torch.export.export(network, (x,), strict=False).module()(x)
    assert isinstance(found, PanopticOutput)
    _assert_close(found, network(x))


def test_panoptic_networks_have_a_task_of_their_own() -> None:
    assert set(names(task="panoptic")) == {row[0] for row in SIZES} | {"panoptic_deeplab"}
    assert task_of("axial_deeplab_xl") == "panoptic"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("panoptic_deeplab", {"backbone": "eamlp_7"}, "EAMLP gives no maps of several resolutions"),
        ("panoptic_deeplab", {"backbone": "unet"}, "'unet' does not classify images"),
        ("panoptic_deeplab", {"backbone": "resnet5"}, "unknown network 'resnet5'"),
        (
            "panoptic_deeplab",
            {"backbone": "xcit_nano_12_p8", "backbone_options": {"pyramid": False}},
            r"XCiT gives maps with strides \[8, 8, 8, 8\], expected some with 4 and 8",
        ),
        (
            "panoptic_deeplab",
            {"backbone_options": {"strides": (2, 2, 2, 1)}},
            r"ResNet gives maps with strides \[8, 16, 32, 32\], expected some with 4 and 8",
        ),
        ("panoptic_deeplab", {"backbone_options": {"spann": 3}}, "'resnet50' has no option 'spann'"),
        ("panoptic_deeplab", {"asp": True}, "'panoptic_deeplab' has no option 'asp'"),
        ("axial_deeplab_s", {"asp": True}, "'axial_deeplab_s' has no option 'asp'"),
        ("axial_deeplab_s", {"span": 64}, "span is 64, expected an odd number"),
        ("axial_deeplab_s", {"aspp": True, "projection": True}, "aspp and projection are alternatives"),
        ("axial_deeplab_s", {"width": 100}, "width is 100, expected a multiple of 16"),
        ("axial_deeplab_s", {"width": 8}, "width is 8, expected a multiple of 16"),
        ("axial_deeplab_s", {"image_size": (1, 2, 3)}, r"image_size is \(1, 2, 3\), expected a side"),
        ("axial_deeplab_s", {"image_size": 0}, "image_size is 0, expected a side"),
    ],
)
def test_mistakes_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(InputError, match=message):
        create(name, **options)
