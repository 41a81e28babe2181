"""What must hold for every registered network, at its smallest."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from medattn.errors import InputError
from medattn.networks import create, names
from medattn.networks.registry import register
from medattn.networks.slicewise import SliceWise
from medattn.networks.unet import UNet

UNETS = names("unet*")
OURS = ("unet_block", "unet_block2", "unet_halo", "unet_axial", "unet_lambda", "unet_crosscov")
ODD = (13, 18, 11)
INERT = ("key_conv.bias", "phi.bias", "bn_similarity.bias")  # shift all logits of a query alike


def small(name: str, dims: int, **options: object) -> nn.Module:
    torch.manual_seed(0)
    usual: dict[str, object] = {"widths": (8, 12, 16, 20), "strides": (2, 2, 2)}
    return create(name, spatial_dims=dims, in_channels=1, out_channels=3, **(usual | options))


def test_the_names_of_this_version_are_there() -> None:
    compared = {"nonlocal", "dual", "crisscross", "psa", "external", "enhanced", "focal"}
    assert set(UNETS) >= {"unet", *OURS, *(f"unet_{method}" for method in compared)}


@pytest.mark.parametrize(("name", "dims"), list(itertools.product(UNETS, (2, 3))))
def test_odd_sizes_keep_their_shape_and_every_parameter_learns(name: str, dims: int) -> None:
    network = small(name, dims)
    for parameter in network.parameters():
        if not parameter.any():  # published starts at zero, which keep others from learning in the first step
            nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 1, *ODD[:dims])
    y = network(x)
    assert y.shape == (2, 3, *ODD[:dims])
    (y * torch.randn_like(y)).sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [n for n in silent if not n.endswith(INERT)] == []


@pytest.mark.parametrize("name", UNETS)
def test_state_dict_round_trip_gives_the_same_output(name: str) -> None:
    first, second = small(name, 3).eval(), small(name, 3).eval()
    for parameter in second.parameters():
        nn.init.uniform_(parameter)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("name", OURS)
def test_attention_costs_at_most_one_percent_of_the_parameters(name: str) -> None:
    def count(network_name: str) -> int:
        network = create(network_name, spatial_dims=3, in_channels=1, out_channels=8)
        return sum(parameter.numel() for parameter in network.parameters())

    assert count("unet") < count(name) <= 1.01 * count("unet")


@pytest.mark.parametrize("name", UNETS)
def test_low_precision_stays_close_to_full_precision(name: str) -> None:
    network = small(name, 3).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x).float()
    full = network(x)
    assert (low - full).abs().max() < 0.1 * full.abs().max()


def test_plain_u_net_counts_parameters_as_its_layers_do() -> None:
    """One 3D level down: convolutions without bias, two numbers per channel for a norm, biases elsewhere."""
    network = create("unet", spatial_dims=3, in_channels=1, out_channels=5, widths=(4, 6), strides=(2,))
    conv = lambda cin, cout: 27 * cin * cout + 2 * cout  # noqa: E731
    encoder = conv(1, 4) + conv(4, 6) + conv(6, 6)
    decoder = (8 * 6 * 4 + 4) + conv(8, 4)
    assert sum(p.numel() for p in network.parameters()) == encoder + decoder + 4 * 5 + 5


def test_anisotropic_strides_reach_only_the_axes_they_name() -> None:
    network = create(
        "unet",
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        widths=(4, 4, 4),
        strides=[(2, 2, 1), (2, 2, 2)],
    )
    assert isinstance(network, UNet)
    assert network.multiple == (4, 4, 2)
    assert network(torch.randn(1, 1, 8, 8, 6)).shape == (1, 2, 8, 8, 6)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_without_full_resolution_no_feature_map_has_the_input_size(residual: bool, norm: str) -> None:
    network = small("unet", 3, full_resolution=False, widths=(8, 12, 16), residual=residual, norm=norm)
    sizes = []
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm3d | nn.BatchNorm3d):
            module.register_forward_hook(lambda m, i, o: sizes.append(o.shape[2]))
    assert network(torch.randn(2, 1, 16, 16, 16)).shape == (2, 3, 16, 16, 16)
    assert max(sizes) == 8


def test_deep_supervision_returns_a_pyramid_in_training_only() -> None:
    network = small("unet", 3, deep_supervision=True)
    x = torch.randn(1, 1, 16, 16, 16)
    assert [tuple(o.shape[2:]) for o in network(x)] == [(16,) * 3, (8,) * 3, (4,) * 3]
    assert network.eval()(x).shape == (1, 3, 16, 16, 16)


def test_training_starts_from_the_prior_that_voxels_are_background() -> None:
    with torch.no_grad():
        probability = small("unet", 3)(torch.randn(1, 1, 16, 16, 16)).softmax(1)[:, 0].mean()
    assert 0.9 < float(probability) < 1


def test_slicewise_sees_each_slice_alone() -> None:
    network = SliceWise(small("unet", 2)).eval()
    x = torch.randn(2, 1, 16, 16, 5)
    y = network(x)
    assert y.shape == (2, 3, 16, 16, 5)
    torch.testing.assert_close(y[..., 3:4], network(x[..., 3:4]))


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match=r"unknown network 'unet_blok'; did you mean 'unet_block'\?"):
        create("unet_blok")
    with pytest.raises(InputError, match="has no option 'wdiths'"):
        create("unet", spatial_dims=3, in_channels=1, out_channels=2, wdiths=(1, 2))
    with pytest.raises(InputError, match=r"attention_levels \[7\] do not exist"):
        small("unet_block", 3, attention_levels=(7,))
    with pytest.raises(InputError, match="4 widths need 3 strides"):
        small("unet", 3, strides=(2, 2))
    with pytest.raises(ValueError, match="registered twice"):
        register(type("unet", (), {}))
