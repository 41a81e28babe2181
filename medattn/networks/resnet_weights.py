"""Weights of published ResNets, HaloNets and LambdaResNets under our names and in our layout.

Read are the names of torchvision, of timm (its ResNets and its networks of bring-your-own blocks) and of
d-li14/lambda.pytorch. Two kinds of tables change their form:

* timm's HaloNet numbers rows by offset + halo + window - 1, ours by offset + window - 1: rows move by `halo`
  down, and the unreached first rows go behind the last.
* Public lambda layers have their table as the weight of a convolution, [K, U, 1, r, r] or [K, 1, r, r, 1];
  ours is [r, r, U, K]. timm's table of all offsets has no U.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from medattn.layers.halo import HaloAttention
from medattn.networks.published import resnet_name

BLOCK = {  # parts of timm's blocks; its batch norms stand beside the convolution or the attention
    **{"conv1_1x1.conv": "reduce.0", "conv1_1x1.bn": "reduce.1", "conv2_kxk.conv": "mix.0"},
    **{"conv2_kxk.bn": "mix.1", "attn.conv": "mix.3.conv", "self_attn": "mix.0", "post_attn": "mix.1"},
    **{"conv3_1x1.conv": "expand.0", "conv3_1x1.bn": "expand.1"},
    **{"shortcut.conv": "shortcut.0", "shortcut.bn": "shortcut.1"},
}
LAYER = {  # parts of attention there
    **{"pos_embed.height_rel": "rel.0", "pos_embed.width_rel": "rel.1", "pos_emb": "table"},
    **{"conv_lambda.weight": "table", "conv_lambda.bias": "bias"},
    **{"conv_qkv.weight": "qkv.weight", "lambda_conv.weight": "table", "lambda_conv.bias": "bias"},
}
AROUND = {
    **{"final_conv.conv": "last.0", "final_conv.bn": "last.1", "head.fc": "head"},
    **{
        f"stem.conv{n + 1}.{part}": f"stem.{3 * n + i}"
        for n in range(3)
        for i, part in enumerate(("conv", "bn"))
    },
}


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Names in a state dict of any of these sources -> ours; names that are none of theirs stay.

    Theirs: those of `published.resnet_name`, and conv1.N (the deep stem) and se of timm's ResNets; conv2.{
    conv_qkv, norm_q, norm_v, lambda_conv} of lambda.pytorch; stem.convN, stages.N.M.{conv1_1x1, conv2_kxk,
    attn, self_attn, post_attn, conv3_1x1, shortcut}, final_conv and head.fc of timm's others.
    """
    names = list(names)
    deep = any(name.startswith("conv1.0.") for name in names)
    return {name: _our_name(name, deep) for name in names}


def from_published(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of one of these sources as `network.load_state_dict` takes them.

    network: ours, built with the options that the weights need; it is read, not changed. What does not fit it
    keeps the shape that it has there, so that loading names it.
    """
    return {ours: _our_form(network, ours, weights[name]) for name, ours in our_names(weights).items()}


def _our_name(name: str, deep: bool) -> str:
    if found := re.fullmatch(r"stages\.(\d+\.\d+)\.(.+)", name):
        block, rest = found.groups()
        return f"stages.{block}.{_replaced(_replaced(rest, BLOCK), LAYER, 'mix.0.')}"
    if deep and (found := re.fullmatch(r"conv1\.(\d\..+)", name)):
        return f"stem.{found[1]}"
    if deep and name.startswith("bn1."):
        return name.replace("bn1", "stem.7")
    name = resnet_name(_replaced(name, AROUND))
    if found := re.fullmatch(r"(stages\.\d+\.\d+)\.(.+)", name):
        rest = found[2].replace("se.", "excite.", 1) if found[2].startswith("se.") else found[2]
        return f"{found[1]}.{_replaced(rest, LAYER, 'mix.0.')}"
    return name


def _replaced(name: str, parts: Mapping[str, str], prefix: str = "") -> str:
    """A name with its beginning, after the prefix, exchanged if it is one of the parts."""
    if name.startswith(prefix):
        for theirs, ours in parts.items():
            if (name + ".").startswith(f"{prefix}{theirs}."):
                return prefix + ours + name.removeprefix(prefix + theirs)
    return name


def _our_form(network: nn.Module, ours: str, value: Tensor) -> Tensor:
    owner, _, table = ours.rpartition(".mix.0.")
    if table == "table" and value.ndim == 5:  # of a convolution, channels of the values beside or behind r, r
        kernel = value.squeeze(-1) if value.shape[-1] == 1 and value.shape[2] > 1 else value.squeeze(2)
        return kernel.permute(2, 3, 1, 0) if kernel.ndim == 4 else value
    if table == "table" and value.ndim == 3:
        return value[:, :, None]
    if table in ("rel.0", "rel.1"):
        layer = dict(network.named_modules()).get(f"{owner}.mix.0")
        return value.roll(-layer.halo, 0) if isinstance(layer, HaloAttention) else value
    return value
