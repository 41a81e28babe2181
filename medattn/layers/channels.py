"""Gates on channels: each one of a feature map times a number between 0 and 1 that depends on all of them."""

from __future__ import annotations

import math

from torch import Tensor, nn

REDUCTION = 16  # of the channels inside squeeze-and-excitation
SMALLEST = 8  # channels there, and what they are a multiple of


class SqueezeExcitation(nn.Module):
    """x * sigmoid(W2 relu(W1 mean(x))) on [B, C, h, w] (Hu et al. 2018).

    Parameters, with R = C / 16 rounded to a multiple of 8: 2 C R + R + C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(SMALLEST, int(channels / REDUCTION + SMALLEST / 2) // SMALLEST * SMALLEST)
        self.fc1, self.fc2 = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, h, w]."""
        squeezed = self.fc1(x.mean((2, 3), keepdim=True)).relu()
        gate: Tensor = self.fc2(squeezed).sigmoid()
        return x * gate


class ChannelConvolution(nn.Module):
    """x * sigmoid(convolution of mean(x) along the channels) on [B, C, h, w] (ECA, Wang et al. 2020).

    Parameters: one number per neighbour, the odd number next to (log2(C) + 1) / 2 from above, at least 3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        reach = int((math.log2(channels) + 1) / 2)
        side = max(3, reach if reach % 2 else reach + 1)
        self.conv = nn.Conv1d(1, 1, side, padding=side // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, h, w]."""
        gate: Tensor = self.conv(x.mean((2, 3))[:, None]).sigmoid()
        return x * gate[:, 0, :, None, None]
