"""XCiT: published integers, timm's outputs with timm's weights, and what the paper's operators promise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import medattn_kernels.flops  # noqa: F401  the counter knows the operators from here on
from medattn.errors import InputError
from medattn.layers.crosscov import CrossCovariance
from medattn.layers.xcit import ClassBlock, CrossCovarianceAttention
from medattn.networks import create, names
from medattn.networks.xcit import XCiT, from_published, our_names
from medattn.training.optimizers import parameter_groups

# name: width, depth, heads, parameters with patches of 16 and 8, GMAC at 224 pixels (timm's benchmark)
PUBLISHED = {
    "nano_12": (128, 12, 4, 3_053_224, 3_049_016, 0.56, 2.16),
    "tiny_12": (192, 12, 4, 6_716_272, 6_706_504, 1.24, 4.81),
    "tiny_24": (192, 24, 4, 12_116_896, 12_107_128, 2.34, 9.21),
    "small_12": (384, 12, 8, 26_253_304, 26_213_032, 4.82, 18.69),
    "small_24": (384, 24, 8, 47_671_384, 47_631_112, 9.10, 35.81),
    "medium_24": (512, 24, 8, 84_395_752, 84_323_624, 16.13, 63.53),
    "large_24": (768, 24, 16, 189_096_136, 188_932_648, 35.86, 141.23),
}
NAMES = [f"xcit_{size}_p{patch}" for size in PUBLISHED for patch in (16, 8)]
LARGE = ("tiny_24", "small_24", "medium_24", "large_24")
BY_SIZE = [pytest.param(n, marks=[pytest.mark.slow] if n[5:].startswith(LARGE) else []) for n in NAMES]
NANO = "xcit_nano_12_p16"


@contextmanager
def _meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


def _small(**options: Any) -> XCiT:
    """Two levels less of everything, with numbers that let every part show."""
    torch.manual_seed(0)
    network = create("xcit_tiny_12_p16", **{"width": 32, "depth": 3, "heads": 2, "num_classes": 5} | options)
    assert isinstance(network, XCiT)
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            nn.init.uniform_(parameter, 0.5, 1.5) if "bias" not in name else nn.init.normal_(parameter)
    return network


def _filled(network: nn.Module) -> nn.Module:
    """A network from the meta device with random weights, statistics, LayerScale and temperatures."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.to_empty(device="cpu").state_dict().items():
        if not value.is_floating_point():
            value.zero_()
        elif value.ndim >= 2 and "temperature" not in name:
            value.normal_(generator=generator).mul_(value[0].numel() ** -0.5)
        elif name.endswith(("bias", "running_mean")):
            value.normal_(generator=generator).mul_(0.1)
        else:
            value.uniform_(0.3, 1.3, generator=generator)
    return network


def _pair(timm: ModuleType, name: str) -> tuple[nn.Module, nn.Module]:
    """timm's network and ours with the same weights, in evaluation."""
    with _meta():
        theirs, ours = timm.create_model(f"{name}_224"), create(name)
    _filled(theirs)
    ours.load_state_dict(from_published(ours, theirs.state_dict()), assign=True)
    return theirs.eval(), ours.eval()


def test_all_fourteen_are_there() -> None:
    assert names("xcit*") == sorted(NAMES)
    assert names("xcit*", task="classification") == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_published_ones_to_the_integer(name: str) -> None:
    """And those of the closed formula in the class."""
    size, patch = name[5:].rsplit("_p", 1)
    width, depth, heads, *counts = PUBLISHED[size]
    with _meta():
        network = create(name)
    found = sum(p.numel() for p in network.parameters())
    half, quarter, eighth = width // 2, width // 4, width // 8
    norms = 2 * (width + half + quarter)
    stem = 27 * quarter + 9 * (quarter * half + half * width) + norms
    if patch == "16":
        stem = 27 * eighth + 9 * (eighth * quarter + quarter * half + half * width) + norms + 2 * eighth
    blocks = depth * (12 * width**2 + 40 * width + heads) + 2 * (12 * width**2 + 15 * width)
    assert found == blocks + 68 * width + 1000 * (width + 1) + stem
    assert found == counts[0 if patch == "16" else 1]


@pytest.mark.parametrize("name", BY_SIZE)
def test_multiplications_are_those_of_timms_benchmark(name: str) -> None:
    """Within 2%: timm counts norms as well, and its table has two digits after the point."""
    size, patch = name[5:].rsplit("_p", 1)
    with _meta(), FlopCounterMode(display=False) as counter:
        create(name).eval()(torch.empty(1, 3, 224, 224))
    published = PUBLISHED[size][5 if patch == "16" else 6]
    assert abs(counter.get_total_flops() / 2e9 - published) < 0.02 * published


@pytest.mark.parametrize("name", BY_SIZE)
def test_timms_weights_give_timms_output(name: str, timm: ModuleType) -> None:
    theirs, ours = _pair(timm, name)
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(x)
        assert (ours(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_timms_weights_give_timms_gradients(timm: ModuleType) -> None:
    """In training, with batch statistics. from_published only moves numbers, so it maps gradients too."""
    theirs, ours = (network.double().train() for network in _pair(timm, NANO))
    x = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(1)).double()
    for network in (theirs, ours):
        network(x).square().sum().backward()
    expected = from_published(ours, {name: p.grad for name, p in theirs.named_parameters()})
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad - expected[name]).abs().max()
        assert error < 1e-9 * max(1, float(expected[name].abs().max())), name


def test_the_authors_names_load_as_well(timm: ModuleType) -> None:
    """facebookresearch/xcit projects the class attention at once and calls the positions pos_embeder."""
    with _meta():
        theirs, ours = timm.create_model(f"{NANO}_224"), create(NANO)
    state = _filled(theirs).state_dict()
    expected = from_published(ours, state)
    assert {n: v.shape for n, v in expected.items()} == {n: v.shape for n, v in ours.state_dict().items()}
    authors = {name.replace("pos_embed.", "pos_embeder."): value for name, value in state.items()}
    for block in range(2):
        for kind in ("weight", "bias"):
            parts = [authors.pop(f"cls_attn_blocks.{block}.attn.{letter}.{kind}") for letter in "qkv"]
            authors[f"cls_attn_blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    found = from_published(ours, authors)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_detectors_of_the_authors_have_a_name_here() -> None:
    """Their backbones have layers behind the blocks, which the pyramid holds."""
    pyramid = {name for name in _small(pyramid=True).state_dict() if name.startswith("pyramid")}
    theirs = [
        f"fpn{n}.{m}.{kind}" for n, m in ((1, 0), (1, 1), (1, 3), (2, 0)) for kind in ("weight", "bias")
    ]
    assert set(our_names(theirs).values()) <= pyramid
    assert our_names(["something.else"]) == {"something.else": "something.else"}


def test_attention_does_not_depend_on_the_order_of_positions_nor_on_the_size_of_queries() -> None:
    """Reference, check 2."""
    layer, x = CrossCovarianceAttention(8, 2).double(), torch.randn(2, 3, 5, 8, dtype=torch.float64)
    order = torch.randperm(15)
    shuffled = x.flatten(1, 2)[:, order].view_as(x)
    expected = layer(x)
    torch.testing.assert_close(layer(shuffled).flatten(1, 2), expected.flatten(1, 2)[:, order])
    with torch.no_grad():
        layer.qkv.weight[:8] *= 7
        layer.qkv.bias[:8] *= 7
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("count", [4, 9, 50])
def test_weights_are_one_small_matrix_per_head_whose_rows_sum_to_one(count: int) -> None:
    """Reference, check 3. Values that single channels out show it: y = A v."""
    q, k, v = torch.randn(3, 1, count, 2, 4, dtype=torch.float64).unbind()
    operator = CrossCovariance(2).double()
    v[0, :4] = torch.eye(4, dtype=torch.float64)[:, None]
    matrix = operator(q, k, v)[0, :4]  # [channel of v, head, channel of q]
    cosine = torch.einsum("nhc,nhd->hcd", *(F.normalize(x[0], dim=0) for x in (q, k)))
    torch.testing.assert_close(matrix, cosine.softmax(-1).permute(2, 0, 1))
    torch.testing.assert_close(matrix.sum(0), torch.ones(2, 4, dtype=torch.float64))


def test_attention_can_be_found_from_chunks_of_the_positions() -> None:
    """Reference, check 4: products and squared norms add up, then the weights apply anywhere."""
    q, k, v = torch.randn(3, 1, 12, 2, 4, dtype=torch.float64).unbind()
    product, squares = torch.zeros(2, 4, 4).double(), torch.zeros(2, 2, 4).double()
    for part in torch.arange(12).split(5):
        product += torch.einsum("nhc,nhd->hcd", q[0, part], k[0, part])
        squares += torch.stack([q[0, part], k[0, part]]).square().sum(1)
    norm = squares.sqrt()
    weights = (product / (norm[0, :, :, None] * norm[1, :, None])).softmax(-1)
    for part in torch.arange(12).split(5):
        expected = torch.einsum("hcd,nhd->nhc", weights, v[0, part])
        torch.testing.assert_close(CrossCovariance(2).double()(q, k, v)[0, part], expected)


@pytest.mark.parametrize("tokens_norm", [True, False])
def test_a_class_block_without_branches_doubles_the_patches(tokens_norm: bool) -> None:
    """Reference, check 5: 2 LN(x) for patches and LN(cls), or 2 x for patches in the nano form."""
    block = ClassBlock(8, 2, eta=0.0, tokens_norm=tokens_norm)
    nn.init.normal_(block.norm2.weight)
    x = torch.randn(2, 1 + 6, 8)
    y = block(x)
    torch.testing.assert_close(y[:, :1], block.norm2(x[:, :1]))
    torch.testing.assert_close(y[:, 1:], 2 * (block.norm2(x) if tokens_norm else x)[:, 1:])


def test_every_parameter_of_the_smallest_learns() -> None:
    network = create(NANO, num_classes=7)
    out = network(torch.randn(2, 3, 33, 50))
    assert out.shape == (2, 7)
    (out * torch.randn_like(out)).sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # the same number in all logits of a softmax
    assert [n for n in silent if not n.endswith(".k.bias")] == []


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("size", [(32, 64), (33, 50), (1, 17), (100, 7)], ids=str)
def test_maps_for_dense_prediction_cover_any_image(size: tuple[int, int], patch: int) -> None:
    for pyramid in (True, False):
        network = _small(patch=patch, pyramid=pyramid).eval()
        maps = network.features(torch.randn(1, 3, *size))
        strides = [4, 8, 16, 32] if pyramid else [patch] * 4
        assert network.feature_strides == strides
        assert [tuple(y.shape) for y in maps] == [
            (1, c, -(-size[0] // s), -(-size[1] // s))
            for c, s in zip(network.feature_channels, strides, strict=True)
        ]


def test_maps_follow_the_blocks_of_the_published_detectors() -> None:
    with _meta():
        assert create("xcit_tiny_12_p8").feature_blocks == [3, 5, 7, 11]
        assert create("xcit_tiny_24_p8").feature_blocks == [7, 11, 15, 23]
    network, x = _small().eval(), torch.randn(1, 3, 32, 48)
    y = network.embed(x)
    for block in network.blocks:
        y = block(y)
    torch.testing.assert_close(network.features(x)[-1], y.movedim(-1, 1))


def test_state_dict_round_trip_gives_the_same_output() -> None:
    first, second = _small().eval(), _small().eval()
    for parameter in second.parameters():
        nn.init.uniform_(parameter)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 3, 40, 24)
    assert torch.equal(first(x), second(x))


def test_compiled_whole_it_gives_the_same() -> None:
    network, x = _small(width=16, depth=1).eval(), torch.randn(2, 3, 40, 24)
    expected = network(x)
    torch.testing.assert_close(torch.compile(network, backend="aot_eager", fullgraph=True)(x), expected)


def test_low_precision_and_memory_format() -> None:
    network, x = _small().eval(), torch.randn(2, 3, 40, 24)
    expected = network(x)
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last)), expected)
    last = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x).float()
    assert (low - expected).abs().max() < 0.05 * expected.abs().max()


def test_drop_path_leaves_out_branches_of_single_examples_in_training_only() -> None:
    """All branches but for the class token's go with a rate near one."""
    network = _small(drop_path=1 - 1e-12)
    x = torch.randn(1, 4, 5, 32)
    blocks = nn.Sequential(*network.blocks)
    assert torch.equal(blocks(x), x)
    assert not torch.allclose(blocks.eval()(x), x)


def test_weight_decay_leaves_out_temperatures_and_the_class_token() -> None:
    network = _small()
    spared = parameter_groups(network, 0.05)[1]["params"]
    named = ("cls_token", "blocks.0.0.inner.operator.temperature", "blocks.2.1.gamma", "head.bias")
    assert {id(network.get_parameter(name)) for name in named} <= {id(p) for p in spared}
    assert all(p.ndim < 2 for p in spared)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="patches of 8 or 16 pixels, got patch=4"):
        create(NANO, patch=4)
    with pytest.raises(InputError, match="rate must be at least 0 and below 1"):
        create(NANO, drop_path=1.0)
