"""External attention (EANet, EAMLP: Guo et al., arXiv 2105.02358): positions on learned memory slots."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medattn.layers.companions.rank import batch_norm, check_rank, convolution

EPSILON = 1e-9  # in the division by the sum over slots


def double_norm(logits: Tensor, *, positions: int, slots: int) -> Tensor:
    """Softmax over the dimension of positions, then each position divided by its sum over that of slots."""
    attention = logits.softmax(positions)
    return attention / (EPSILON + attention.sum(slots, keepdim=True))


class ExternalAttention(nn.Module):
    """EANet's module: relu(x + norm(conv2(M_v double_norm(M_k conv1(x))))); [B, C, *size] in and out.

    conv1: 1x1 with bias; M_k = linear_0 and M_v = linear_1: the memory of `slots` units, without bias; conv2:
    1x1 without bias and a batch norm. Names as in MenghaoGuo/EANet. The two memories start equal, as there.

    3D: positions are a list, so only the two convolutions change. Work: 2 N C (C + slots). Memory: N slots.

    Parameters: 2 C^2 + 3 C + 2 slots C.
    """

    def __init__(self, channels: int, spatial_dims: int, *, slots: int = 64) -> None:
        super().__init__()
        conv = convolution(spatial_dims)
        self.conv1 = conv(channels, channels, 1)
        self.linear_0 = nn.Conv1d(channels, slots, 1, bias=False)
        self.linear_1 = nn.Conv1d(slots, channels, 1, bias=False)
        out = conv(channels, channels, 1, bias=False)
        self.conv2 = nn.Sequential(out, batch_norm(spatial_dims)(channels))
        for layer in (self.conv1, self.linear_1, out):
            nn.init.normal_(layer.weight, std=(2 / channels) ** 0.5)
        with torch.no_grad():
            self.linear_0.weight.copy_(self.linear_1.weight.transpose(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C, *size]."""
        attention = double_norm(self.linear_0(self.conv1(x).flatten(2)), positions=2, slots=1)
        out: Tensor = self.conv2(self.linear_1(attention).view(x.shape))
        return (out + x).relu()


class MultiHeadExternalAttention(nn.Module):
    """EAMLP's form on tokens [B, N, C]: 4 C channels in 4 times `heads` heads of width w = C / heads.

    64 slots per head; the memories are shared by all heads and have biases. That of linear_0 shifts all
    positions alike, so it has no effect and its gradient is zero. Names as in MenghaoGuo/EANet.

    Parameters: 8 C^2 + 5 C + 2 slots w + slots + w.
    Raises ValueError unless heads divides the channels.
    """

    WIDENED = 4

    def __init__(self, channels: int, *, heads: int, slots: int = 64) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads, got {channels=} and {heads=}")
        wide, width = self.WIDENED * channels, channels // heads
        self.heads = self.WIDENED * heads
        self.trans_dims = nn.Linear(channels, wide)
        self.linear_0 = nn.Linear(width, slots)
        self.linear_1 = nn.Linear(slots, width)
        self.proj = nn.Linear(wide, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        heads = self.trans_dims(x).unflatten(-1, (self.heads, -1))  # [B, N, heads, w]
        attention = double_norm(self.linear_0(heads), positions=1, slots=-1)
        out: Tensor = self.proj(self.linear_1(attention).flatten(-2))
        return out


class ExternalBlock(nn.Module):
    """x + attn(norm1(x)), the attention half of an EAMLP block, on [B, C, *size]; any number of axes alike.

    Parameters: 2 C and those of `MultiHeadExternalAttention`.
    """

    def __init__(self, channels: int, *, heads: int, slots: int = 64) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = MultiHeadExternalAttention(channels, heads=heads, slots=slots)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C, *size]."""
        attended: Tensor = self.attn(self.norm1(x.flatten(2).mT))
        return x + attended.mT.reshape(x.shape)


def external_layers(
    channels: int, spatial_dims: int, *, slots: int = 64, heads: int | None = None
) -> ExternalAttention | ExternalBlock:
    """External attention as a U-Net takes it: EANet's module, or EAMLP's form if `heads` is given."""
    check_rank(spatial_dims)
    if heads is None:
        return ExternalAttention(channels, spatial_dims, slots=slots)
    return ExternalBlock(channels, heads=heads, slots=slots)
