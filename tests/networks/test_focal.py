"""Focal Transformers: published integers, and the published arithmetic written out position by position."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from medattn.errors import InputError
from medattn.layers.companions.focal import FocalBlock
from medattn.networks import create, names
from medattn.networks.focal import FocalTransformer, PatchEmbed, from_published, our_names
from medattn.training.optimizers import parameter_groups

# parameters and GMAC at 224 pixels, without and with convolutional embedding
PUBLISHED = {
    "focal_tiny": (28_880_380, 30_825_244, 4.9, 5.2),
    "focal_small": (51_141_940, 53_086_804, 9.4, 9.7),
    "focal_base": (89_815_400, 93_268_712, 16.4, 16.8),
}
KEYS = (230, 206, 190, 50)
W, E = 3, 1  # window and ring of the small network
CORNERS = [(E, E), (E, -E), (-E, E), (-E, -E)]  # a map rolled by -s shows position p + s at p


def _small(**options: Any) -> FocalTransformer:
    """Two stages of 2 x 3 and one window on images of 24 x 28 pixels, every part with random numbers."""
    torch.manual_seed(0)
    numbers: dict[str, Any] = {"width": 8, "depths": (1, 2), "heads": (2, 2), "focal_windows": (3, 1)}
    size: dict[str, Any] = {"window": W, "expand": E, "image_size": 24, "num_classes": 5}
    network = create("focal_tiny", **(numbers | size | options))
    assert isinstance(network, FocalTransformer)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def _embed(p: dict[str, Tensor], x: Tensor, stride: int, overlap: bool) -> Tensor:
    """[C, h, w] -> [h', w', C']."""
    padding = {4: 2, 2: 1}[stride] if overlap else 0
    x = F.conv2d(x[None], p["proj.weight"], p["proj.bias"], stride, padding)[0].movedim(0, -1)
    return F.layer_norm(x, x.shape[-1:], p["norm.weight"], p["norm.bias"])


def _part(p: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def _ring(w: int, e: int, published: bool) -> list[tuple[int, int]]:
    """The neighbours relative to the window's first position, in the order of their biases."""
    inside = list(product(range(w), repeat=2))
    ring = (
        [(i + a, j + b) for a, b in CORNERS for i, j in inside if (i + a, j + b) not in inside] if e else []
    )
    return ring if published else list(dict.fromkeys(ring))


def _attend(p: dict[str, Tensor], x: Tensor, heads: int, w: int, e: int, f: int, published: bool) -> Tensor:
    """Focal attention of a normalised map [h, w, C], query by query and key by key (reference, 3.1)."""
    h, width, c = x.shape
    x = F.pad(x, (0, 0, 0, -width % w, 0, -h % w))
    weight, constant = p["pool_layers.0.weight"][0], p["pool_layers.0.bias"]
    far = [
        [weight @ x[i : i + w, j : j + w].flatten(0, 1) for j in range(0, x.shape[1], w)]
        for i in range(0, x.shape[0], w)
    ]
    pooled = torch.stack([torch.stack(row) for row in far]) + constant
    q, k, v = (x @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).unflatten(-1, (3, heads, -1)).unbind(2)
    _, far_k, far_v = (
        (pooled @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).unflatten(-1, (3, heads, -1)).unbind(2)
    )
    own = p["attn.relative_position_bias_table"]
    to_windows = p["attn.relative_position_bias_table_to_windows.0"]
    out = torch.zeros_like(x)
    for row, column in product(range(x.shape[0]), range(x.shape[1])):
        (wi, i), (wj, j) = divmod(row, w), divmod(column, w)
        keys, values, bias = [], [], []
        for a, b in product(range(w), repeat=2):
            at = (wi * w + a, wj * w + b)
            if published or (at[0] < h and at[1] < width):
                keys.append(k[at])
                values.append(v[at])
                bias.append(own[(i - a + w - 1) * (2 * w - 1) + j - b + w - 1])
        for index, (a, b) in enumerate(_ring(w, e, published)):
            at = (wi * w + a, wj * w + b)
            if published or (0 <= at[0] < h and 0 <= at[1] < width):
                at = (at[0] % x.shape[0], at[1] % x.shape[1])
                keys.append(k[at])
                values.append(v[at])
                bias.append(p["attn.relative_position_bias_table_to_neighbors"][0, :, i * w + j, index])
        for a, b in product(range(f), repeat=2):
            at = (wi + a - f // 2, wj + b - f // 2)
            shown = 0 <= at[0] < pooled.shape[0] and 0 <= at[1] < pooled.shape[1]
            keys.append(far_k[at] if shown else torch.zeros_like(k[0, 0]))
            values.append(far_v[at] if shown else torch.zeros_like(v[0, 0]))
            place = (i - a + f - 1) * (w + f - 1) + j - b + f - 1
            bias.append(to_windows[:, place] - (0 if shown else 100))
        logits = (torch.stack(keys) * q[row, column]).sum(-1) * (c // heads) ** -0.5 + torch.stack(bias)
        out[row, column] = (logits.softmax(0)[..., None] * torch.stack(values)).sum(0).flatten()
    return (out @ p["attn.proj.weight"].T + p["attn.proj.bias"])[:h, :width]


def _block(p: dict[str, Tensor], x: Tensor, *numbers: Any) -> Tensor:
    """[h, w, C] -> [h, w, C]."""
    c = x.shape[-1:]
    x = x + _attend(p, F.layer_norm(x, c, p["norm1.weight"], p["norm1.bias"]), *numbers)
    hidden = (
        F.layer_norm(x, c, p["norm2.weight"], p["norm2.bias"]) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
    )
    return x + F.gelu(hidden) @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_network_is_the_published_one_position_by_position(overlap: bool, published: bool) -> None:
    """One map ragged and larger than its windows, then one of a single window without a ring."""
    network = _small(conv_embedding=overlap, published=published, image_size=24).double().eval()
    image = torch.randn(3, 24, 28, dtype=torch.float64)
    p = dict(network.named_parameters())
    x = _embed(_part(p, "patch_embed."), image, 4, overlap)
    x = _block(_part(p, "layers.0.blocks.0."), x, 2, W, E, 3, published)
    padded = F.pad(x.movedim(-1, 0), (0, 1))  # seven columns to eight
    x = _embed(_part(p, "layers.0.downsample."), padded, 2, overlap)
    for index in (0, 1):
        x = _block(_part(p, f"layers.1.blocks.{index}."), x, 2, 3, 0, 1, published)
    x = F.layer_norm(x, x.shape[-1:], p["norm.weight"], p["norm.bias"]).mean((0, 1))
    expected = x @ p["head.weight"].T + p["head.bias"]
    torch.testing.assert_close(network(image[None])[0], expected, rtol=1e-9, atol=1e-9)


def test_all_three_are_there() -> None:
    assert names("focal*", task="classification") == sorted(PUBLISHED)


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiplications_are_the_published_ones(name: str, convolutions: bool) -> None:
    """Parameters to the integer; GMAC within 2% of the authors' tables."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = create(name, conv_embedding=convolutions).eval()
        network(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in network.parameters()) == PUBLISHED[name][convolutions]
    published = PUBLISHED[name][2 + convolutions]
    assert abs(counter.get_total_flops() / 2e9 - published) < 0.02 * published


@pytest.mark.parametrize("published", [True, False])
def test_keys_of_a_query_are_as_many_as_published(published: bool) -> None:
    """49 + 132 + f^2, of the 132 twelve twice; the other form has them once. At 224 pixels."""
    with torch.device("meta"):
        network = create("focal_tiny", published=published)
    for layer, side, count in zip(network.layers, (56, 28, 14, 7), KEYS, strict=True):
        attention = layer["blocks"][0].attn
        keys, _ = attention._keys((side, side), True, None)
        assert keys.shape == ((side // 7) ** 2, count if published or side == 7 else count - 12)
        assert attention._bias(True).shape[-1] == keys.shape[1]


def test_of_the_fine_keys_120_are_distinct() -> None:
    """In the middle of a map, where nothing wraps."""
    attention = FocalBlock(6, 2, heads=3).attn
    keys, hidden = attention._keys((21, 21), True, None)
    middle = keys[4, :181]
    assert keys.shape == (9, 230)
    assert len(middle) == 49 + 132
    assert len(middle.unique()) == 49 + 120 == 13**2
    assert not hidden[:, :181].any()


def test_one_bias_for_a_key_that_stands_twice_gives_the_same_attention() -> None:
    """The middle window of nine has no ring over the border."""
    torch.manual_seed(0)
    old, new = (FocalBlock(6, 2, heads=3, published=published).double() for published in (True, False))
    for parameter in old.parameters():
        nn.init.normal_(parameter)
    new.load_state_dict(from_published(new, old.state_dict()))
    x = torch.randn(1, 6, 21, 21, dtype=torch.float64)
    middle = (..., slice(7, 14), slice(7, 14))
    torch.testing.assert_close(new(x)[middle], old(x)[middle])
    assert not torch.allclose(new(x), old(x))


def test_published_state_dicts_load() -> None:
    """They store indices that here follow from the sizes."""
    network = _small()
    state = network.state_dict()
    stored = {
        f"layers.0.blocks.0.attn.{name}": torch.zeros(1)
        for name in ("relative_position_index", "valid_ind_rolled", "relative_position_index_0")
    }
    assert from_published(network, state | stored).keys() == state.keys()
    assert our_names(stored) == {}
    assert {
        "patch_embed.proj.weight",
        "layers.0.downsample.norm.bias",
        "layers.1.blocks.1.attn.proj.bias",
    } <= set(state)


def test_every_parameter_of_the_smallest_learns_on_odd_sizes() -> None:
    network = create("focal_tiny", num_classes=7, image_size=64)
    out = network(torch.randn(1, 3, 65, 50))
    assert out.shape == (1, 7)
    (out * torch.randn_like(out)).sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("size", [(24, 24), (1, 1), (5, 41)], ids=str)
def test_maps_for_dense_prediction_cover_any_image(size: tuple[int, int]) -> None:
    network = _small().eval()
    maps = network.features(torch.randn(2, 3, *size))
    described = zip(network.feature_channels, network.feature_strides, strict=True)
    assert [tuple(y.shape) for y in maps] == [
        (2, c, -(-size[0] // s), -(-size[1] // s)) for c, s in described
    ]
    assert network.feature_strides == [4, 8]


def test_state_dict_round_trip_gives_the_same_output() -> None:
    first, second = _small().eval(), _small().eval()
    for parameter in second.parameters():
        nn.init.uniform_(parameter)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 3, 20, 30)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("published", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled_whole_it_gives_the_same(published: bool) -> None:
    network, x = _small(depths=(1, 1), published=published).eval(), torch.randn(2, 3, 20, 30)
    expected = network(x)
    torch.testing.assert_close(torch.compile(network, backend="aot_eager", fullgraph=True)(x), expected)


def test_low_precision_and_memory_format() -> None:
    network, x = _small().eval(), torch.randn(2, 3, 20, 30)
    expected = network(x)
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x).float()
    assert (low - expected).abs().max() < 0.05 * expected.abs().max()


def test_drop_path_grows_from_none_in_the_first_block() -> None:
    rates = [m.drop_path.rate for m in _small(drop_path=0.2).modules() if isinstance(m, FocalBlock)]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    block = FocalBlock(6, 2, heads=3, drop_path=1 - 1e-12)
    x = torch.randn(2, 6, 7, 7)
    assert torch.equal(block(x), x)
    assert not torch.allclose(block.eval()(x), x)


def test_weight_decay_leaves_out_tables_of_positions() -> None:
    network = _small()
    spared = {id(p) for p in parameter_groups(network, 0.05)[1]["params"]}
    tables = [p for name, p in network.named_parameters() if "bias_table" in name]
    assert len(tables) == 3 * 2 + 1
    assert all(id(p) in spared for p in tables)
    assert all(p.ndim < 2 for p in network.parameters() if id(p) in spared - {id(t) for t in tables})


def test_patches_keep_the_last_pixels() -> None:
    """Of a side that the stride does not divide."""
    for overlap in (False, True):
        assert PatchEmbed(1, 2, 4, overlap=overlap)(torch.randn(1, 1, 9, 8)).shape == (1, 2, 3, 2)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="image_size must be at least 1, got 0"):
        create("focal_tiny", image_size=0)
