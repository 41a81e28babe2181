"""The U-Net, plain and with every attention method: a function chooses numbers, the layer goes in as a value.

All take the options of `unet` besides their own. `attention_levels` and `encoder_attention_levels` say where,
`layers` (at least 1) how many in sequence at each place, with separate weights. What one of them adds to the
parameters is in closed form in the docstring of its function in `medattn.layers` or of the class it builds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from medattn.layers.attention import axial_layers, block_layers, repeated
from medattn.layers.companions import (
    crisscross_layers,
    dual_layers,
    external_layers,
    focal_layers,
    lesa_layers,
    nonlocal_layers,
    psa_layers,
)
from medattn.layers.crosscov import crosscov_layers
from medattn.layers.lambdas import lambda_layers
from medattn.networks.registry import register
from medattn.networks.unet.network import UNet, padding_to_multiple

__all__ = ["UNet", "padding_to_multiple"]


@register
def unet(**options: Any) -> UNet:
    """Plain U-Net, the baseline of every attention network here."""
    return UNet(**options)


@register
def unet_block(
    *,
    heads: int = 2,
    block: int | None = None,
    halo: int | None = None,
    relative: bool = True,
    layers: int = 1,
    **options: Any,
) -> UNet:
    """U-Net with one layer of local block attention in its decoder (after Jiang et al. 2019)."""
    make = partial(block_layers, layers=layers, heads=heads, block=block, halo=halo, relative=relative)
    return UNet(attention=make, **options)


@register
def unet_block2(**options: Any) -> UNet:
    """U-Net with two layers of block attention, one looking ahead and one looking back."""
    return unet_block(**{"layers": 2} | options)


@register
def unet_halo(
    *, heads: int = 2, block: int | None = None, halo: int = 3, layers: int = 1, **options: Any
) -> UNet:
    """U-Net with HaloNet's attention: blocks of 8 (4 in 3D), halo 3, heads of 16 (Vaswani et al. 2021).

    Every layer has its halo on all sides, as there. Parameters: those of `block_layers` with heads of 16.
    """
    make = partial(block_layers, heads=heads, head_size=16, block=block, halo=halo)
    return UNet(attention=repeated(make, layers), **options)


@register
def unet_axial(
    *, heads: int = 2, span: int | None = None, relative: bool = True, layers: int = 1, **options: Any
) -> UNet:
    """U-Net with position-sensitive axial attention in its decoder (after Wang et al. 2020)."""
    make = partial(axial_layers, layers=layers, heads=heads, span=span, relative=relative)
    return UNet(attention=make, **options)


@register
def unet_lambda(
    *,
    heads: int = 4,
    key_size: int = 16,
    depth: int = 1,
    scope: int | None = None,
    layers: int = 1,
    **options: Any,
) -> UNet:
    """U-Net with lambda layers, linear functions of the context without a map (Bello 2021)."""
    make = partial(lambda_layers, layers=layers, heads=heads, key_size=key_size, depth=depth, scope=scope)
    return UNet(attention=make, **options)


@register
def unet_crosscov(*, heads: int = 2, local: bool = True, layers: int = 1, **options: Any) -> UNet:
    """U-Net with cross-covariance attention, channels to channels (XCiT, El-Nouby et al. 2021)."""
    return UNet(attention=partial(crosscov_layers, heads=heads, local=local, layers=layers), **options)


@register
def unet_nonlocal(*, norm: bool = True, layers: int = 1, **options: Any) -> UNet:
    """U-Net with a non-local block (Wang et al. 2018)."""
    return UNet(attention=repeated(partial(nonlocal_layers, norm=norm), layers), **options)


@register
def unet_dual(*, layers: int = 1, **options: Any) -> UNet:
    """U-Net with dual attention, over positions and over channels (DANet, Fu et al. 2019)."""
    return UNet(attention=repeated(dual_layers, layers), **options)


@register
def unet_crisscross(*, recurrence: int | None = None, layers: int = 1, **options: Any) -> UNet:
    """U-Net with criss-cross attention, once per axis if recurrence is None (CCNet, Huang et al. 2019)."""
    return UNet(attention=repeated(partial(crisscross_layers, recurrence=recurrence), layers), **options)


@register
def unet_psa(*, mask: int | None = None, shrink: int = 2, layers: int = 1, **options: Any) -> UNet:
    """U-Net with point-wise spatial attention, collecting and distributing (PSANet, Zhao et al. 2018)."""
    return UNet(attention=repeated(partial(psa_layers, mask=mask, shrink=shrink), layers), **options)


@register
def unet_external(*, slots: int = 64, heads: int | None = None, layers: int = 1, **options: Any) -> UNet:
    """U-Net with external attention to learned memory slots (Guo et al. 2021)."""
    return UNet(attention=repeated(partial(external_layers, slots=slots, heads=heads), layers), **options)


@register
def unet_enhanced(*, heads: int | None = None, length: int = 32, layers: int = 1, **options: Any) -> UNet:
    """U-Net with locally enhanced self-attention (LESA, Yang et al. 2021)."""
    return UNet(attention=repeated(partial(lesa_layers, heads=heads, length=length), layers), **options)


@register
def unet_focal(
    *,
    heads: int = 2,
    window: int | None = None,
    expand: int | None = None,
    focal_window: int | None = None,
    layers: int = 1,
    **options: Any,
) -> UNet:
    """U-Net with focal attention, fine nearby and pooled further away (Yang et al. 2021)."""
    make = partial(focal_layers, heads=heads, window=window, expand=expand, focal_window=focal_window)
    return UNet(attention=repeated(make, layers), **options)
