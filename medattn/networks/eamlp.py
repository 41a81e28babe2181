"""EAMLP (Guo, Liu, Mu, Hu, arXiv 2105.02358): T2T-ViT (Yuan et al. 2021) with external attention."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.layers.companions.external import MultiHeadExternalAttention, double_norm
from medattn.layers.drop_path import DropPath
from medattn.networks.registry import register_classifier

TOKEN_WIDTH = 64  # of tokens while they are re-formed
SLOTS = 128
FIRST_SPLIT = {"kernel_size": 7, "stride": 4, "padding": 2}
SPLIT = {"kernel_size": 3, "stride": 2, "padding": 1}


def mlp(channels: int, hidden: int) -> nn.Module:
    """[..., C] -> [..., C]: two linear layers with GELU between. Parameters: 2 C hidden + hidden + C."""
    fc1, fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
    return nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))


class TokenExternalAttention(nn.Module):
    """q + proj(M_v double_norm(M_k q)), q = q_linear(x): external attention with one head to another width.

    [B, N, inputs] -> [B, N, width]. The memories linear_0 (without bias) and linear_1 start equal, as the
    authors tie them. dropout: on the attention and on what proj gives.

    Parameters: (inputs + width + 2) width + 2 SLOTS width + width.
    """

    def __init__(self, inputs: int, width: int, *, dropout: float) -> None:
        super().__init__()
        self.q_linear = nn.Linear(inputs, width)
        self.linear_0 = nn.Linear(width, SLOTS, bias=False)
        self.linear_1 = nn.Linear(SLOTS, width)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, inputs] -> [B, N, width]."""
        q = self.q_linear(x)
        attention = self.drop(double_norm(self.linear_0(q), positions=1, slots=2))
        out: Tensor = q + self.drop(self.proj(self.linear_1(attention)))
        return out


class TokenBlock(nn.Module):
    """Normalised attention to another width, then x + mlp(norm(x)): [B, N, inputs] -> [B, N, width]."""

    def __init__(self, inputs: int, width: int, *, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(inputs)
        self.attn = TokenExternalAttention(inputs, width, dropout=dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, inputs] -> [B, N, width]."""
        x = self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TokensToToken(nn.Module):
    """Image [B, in_channels, h, w] -> tokens [B, N, channels], by overlapping splits to 1/16 of its sides.

    Each split makes a token of all positions of a window, 7 x 7 with stride 4, then twice 3 x 3 with stride
    2; after the first two, attention mixes the tokens, which then form a map again.
    """

    def __init__(self, in_channels: int, channels: int, *, dropout: float) -> None:
        super().__init__()
        self.attention1 = TokenBlock(in_channels * 7 * 7, TOKEN_WIDTH, dropout=dropout)
        self.attention2 = TokenBlock(9 * TOKEN_WIDTH, TOKEN_WIDTH, dropout=dropout)
        self.project = nn.Linear(9 * TOKEN_WIDTH, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, h, w] -> [B, N, channels]."""
        size = [_steps(n, **FIRST_SPLIT) for n in x.shape[2:]]
        x = self.attention1(F.unfold(x, **FIRST_SPLIT).mT).mT.unflatten(2, size)
        size = [_steps(n, **SPLIT) for n in size]
        x = self.attention2(F.unfold(x, **SPLIT).mT).mT.unflatten(2, size)
        out: Tensor = self.project(F.unfold(x, **SPLIT).mT)
        return out


class EAMLPBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)), on [B, N, C]; dropped whole at random with drop_path."""

    def __init__(self, channels: int, *, heads: int, ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = MultiHeadExternalAttention(channels, heads=heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = mlp(channels, ratio * channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class EAMLP(nn.Module):
    """Tokens to token, a class token, blocks, a linear head: [B, in_channels, h, w] -> [B, num_classes].

    Positions are sines and cosines of a token's number, row by row. The table for image_size is a parameter
    that does not learn, as published, and stands in its state dicts and parameter counts; for images with
    another number of tokens it is computed. drop_path: of the last block, rising linearly from 0. dropout:
    in the tokens to token, 0.1 in the authors' form for the smallest model and 0 in the others'.
    """

    pos_embed: nn.Parameter

    def __init__(
        self,
        channels: int,
        depth: int,
        *,
        heads: int,
        ratio: int,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        image_size: int = 224,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.tokens_to_token = TokensToToken(in_channels, channels, dropout=dropout)
        self.cls_token = nn.Parameter(torch.empty(1, 1, channels))
        self.pos_embed = nn.Parameter(sinusoids(1 + _tokens(image_size), channels)[None], requires_grad=False)
        rates = [drop_path * block / max(1, depth - 1) for block in range(depth)]
        self.blocks = nn.ModuleList(
            EAMLPBlock(channels, heads=heads, ratio=ratio, drop_path=r) for r in rates
        )
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, num_classes)
        self._start()

    def _start(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for layer in self.modules():
            if isinstance(layer, TokenExternalAttention):
                with torch.no_grad():
                    layer.linear_0.weight.copy_(layer.linear_1.weight.T)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, h, w] -> [B, num_classes]."""
        tokens = self.tokens_to_token(x)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens), tokens], 1)
        positions: Tensor = self.pos_embed
        if tokens.shape[1] != positions.shape[1]:
            positions = sinusoids(tokens.shape[1], tokens.shape[2], tokens.device)[None]
        tokens = tokens + positions
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens)[:, 0])
        return logits


def sinusoids(positions: int, channels: int, device: torch.device | None = None) -> Tensor:
    """[positions, channels]: sine and cosine of p / 10000^(2 n / channels) at channels 2 n and 2 n + 1."""
    place = torch.arange(positions, dtype=torch.float64, device=device)
    rate = 10_000 ** (-torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)
    angle = place[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1).float()


def _steps(size: int, kernel_size: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel_size) // stride + 1


def _tokens(image_size: int) -> int:
    side = _steps(image_size, **FIRST_SPLIT)
    for _ in range(2):
        side = _steps(side, **SPLIT)
    return side**2


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Names in the authors' state dicts (MenghaoGuo/EANet, EAMLP) -> ours, which are theirs.

    But for the larger models: there the memories of the tokens to token are linear_1 and linear_2.
    """
    names = list(names)
    if not any(name.endswith("attention1.attn.linear_2.weight") for name in names):
        return {name: name for name in names}
    ours = {}
    for name in names:
        before, token, after = name.partition(".attn.linear_")
        part = f"{int(after[0]) - 1}{after[1:]}" if before.startswith("tokens_to_token") and token else after
        ours[name] = before + token + part
    return ours


def from_published(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of this source as `network.load_state_dict` takes them; their forms are ours."""
    return {ours: weights[theirs] for theirs, ours in our_names(weights).items()}


@register_classifier
def eamlp_7(**options: Any) -> EAMLP:
    """EAMLP-7, 256 channels: 6,146,638 parameters at 224 pixels, 6,243,918 at 384."""
    return EAMLP(256, 7, heads=4, ratio=2, **({"dropout": 0.1} | options))


@register_classifier
def eamlp_14(**options: Any) -> EAMLP:
    """EAMLP-14, 384 channels: 29,877,070 parameters at 224 pixels, 30,022,990 at 384."""
    return EAMLP(384, 14, heads=6, ratio=3, **options)


@register_classifier
def eamlp_19(**options: Any) -> EAMLP:
    """EAMLP-19, 448 channels: 54,559,054 parameters at 224 pixels, 54,729,294 at 384."""
    return EAMLP(448, 19, heads=7, ratio=3, **options)


@register_classifier
def eamlp_24(**options: Any) -> EAMLP:
    """EAMLP-24, 512 channels: 89,456,590 parameters at 224 pixels, 89,651,150 at 384."""
    return EAMLP(512, 24, heads=8, ratio=3, **options)
