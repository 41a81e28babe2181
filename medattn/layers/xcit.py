"""What XCiT (El-Nouby et al. 2021) is built from, beside its stem: tokens with channels last, in and out."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.layers.crosscov import CrossCovariance
from medattn.layers.drop_path import DropPath

NORM_EPS = 1e-6
FREQUENCIES = 32  # per axis, of sines and cosines together
WAVELENGTH = 10_000.0


class CrossCovarianceAttention(nn.Module):
    """project(XCA(q, k, v)) of [B, h, w, C], with biases.

    Parameters: 4 C^2 + 4 C + heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.operator = CrossCovariance(heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        out: Tensor = self.proj(self.operator(q, k, v).flatten(-2))
        return out


class LocalPatchInteraction(nn.Module):
    """Depthwise 3x3 convolution, GELU, batch norm, depthwise 3x3 convolution of [B, h, w, C].

    Unlike `medattn.layers.crosscov.LocalPatchInteraction` without norm and shortcut, which here come with
    LayerScale. Parameters: 22 C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(2))
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]."""
        out: Tensor = self.conv2(self.bn(F.gelu(self.conv1(x.movedim(-1, 1)))))
        return out.movedim(1, -1)


def perceptron(width: int) -> nn.Sequential:
    """Two linear layers with GELU between, four times as wide there. Parameters: 8 C^2 + 5 C."""
    steps = OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))
    return nn.Sequential(steps)


class Residual(nn.Module):
    """x + drop_path(gamma * inner(norm(x))), channels last. Parameters: 3 C + those of inner.

    gamma is LayerScale, eta its value at the start.
    """

    def __init__(self, width: int, inner: nn.Module, eta: float, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.inner = inner
        self.gamma = nn.Parameter(torch.full((width,), eta))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]."""
        return torch.addcmul(x, self.gamma, self.drop_path(self.inner(self.norm(x))))  # one pass, not two


class ClassAttention(nn.Module):
    """The class token attends to all tokens, itself among them (CaiT, Touvron et al. 2021).

    Parameters: 4 C^2 + 4 C.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, 1 + N, C], the class token first -> [B, 1, C]."""
        parts = (self.q(tokens[:, :1]), self.k(tokens), self.v(tokens))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class ClassBlock(nn.Module):
    """Class attention and a perceptron for the class token, with the two peculiarities of the published code.

    Attention gives a patch token its own norm, so it becomes x + gamma1 norm1(x). And with `tokens_norm` the
    second norm replaces the residual stream of all tokens, so that x + x of it leaves a patch token doubled;
    without (the nano models) this happens to the class token only. There is no drop path.

    Parameters: 12 C^2 + 15 C.
    """

    def __init__(self, width: int, heads: int, *, eta: float, tokens_norm: bool) -> None:
        super().__init__()
        self.tokens_norm = tokens_norm
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(2))
        self.attn = ClassAttention(width, heads)
        self.mlp = perceptron(width)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((width,), eta)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 1 + N, C], the class token first -> [B, 1 + N, C]."""
        normed = self.norm1(x)
        x = x + self.gamma1 * torch.cat([self.attn(normed), normed[:, 1:]], 1)
        x = self.norm2(x) if self.tokens_norm else torch.cat([self.norm2(x[:, :1]), x[:, 1:]], 1)
        return x + torch.cat([self.gamma2 * self.mlp(x[:, :1]), x[:, 1:]], 1)


class FourierPosition(nn.Module):
    """Sines and cosines of the position relative to the map's size, projected to C channels; any map.

    Per axis, with p = 2 pi n / N for n = 1 ... N, channels 2 i and 2 i + 1 are the sine and cosine of
    p / 10000^(2 i / 32). Parameters: 65 C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(2 * FREQUENCIES, width)

    def forward(self, size: tuple[int, int]) -> Tensor:
        """size (h, w) -> [h, w, C]."""
        weight = self.project.weight
        h, w = size
        rows, columns = (_waves(n, weight.device) for n in size)
        both = torch.cat([rows[:, None].expand(h, w, -1), columns.expand(h, w, -1)], -1)
        out: Tensor = self.project(both.to(weight.dtype))
        return out


def _waves(count: int, device: torch.device) -> Tensor:
    """[count, FREQUENCIES], rows before columns as published."""
    place = torch.arange(1, count + 1, device=device, dtype=torch.float32) / (count + 1e-6) * (2 * math.pi)
    power = torch.arange(0, FREQUENCIES, 2, device=device, dtype=torch.float32) / FREQUENCIES
    angle = place[:, None] / WAVELENGTH**power
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
