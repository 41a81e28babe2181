"""Attention over the cells of a semantic map, after MaAST (Seymour et al., ICRA 2021, arXiv 2103.11374).

Built from its abstract alone: a Transformer of several layers attends over the cells of a two-dimensional
semantic map, and an agent is told what the map says. Not public, so chosen here: how cells are embedded (not
part of this layer), the code of positions, how the agent enters and reads, widths, heads, layers and norms.
Results of the paper say nothing about this layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medattn.layers.attention import AttentionLayer
from medattn.layers.companions.full import FullAttention
from medattn.layers.companions.rank import check_rank

PERIOD = 10_000.0  # cells; the longest of the sinusoids (Vaswani et al. 2017)


def sinusoids(size: Sequence[int], channels: int, like: Tensor) -> Tensor:
    """Code of positions of a grid, [*size, C]: sines and cosines of each axis in channels of its own.

    like: whose device and dtype it has; formed in float32 at least.

    With d axes, each has C // (2 d) frequencies from 1 to 1/10,000 per cell; left-over channels are zero.
    """
    code = like.new_zeros(*size, channels, dtype=torch.promote_types(like.dtype, torch.float32))
    count = channels // (2 * len(size))
    frequencies: Tensor = PERIOD ** (-torch.arange(count).to(code) / max(1, count))
    for axis, n in enumerate(size):
        angles = torch.arange(n).to(code)[:, None] * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], -1)
        shape = [1] * len(size)
        shape[axis] = n
        code[..., 2 * count * axis : 2 * count * (axis + 1)] = waves.view(*shape, -1)
    return code.to(like.dtype)


class MapAttention(nn.Module):
    """A Transformer encoder over the cells of a map and one token of the agent.

    `read` takes cells [B, C, *size] and the agent's state [B, agent_size], and returns what the agent's token
    and the cells have become. Called as a module on the cells alone, it keeps their shape. Without
    `agent_size` the agent is one learned token. Cells carry a code of their position (`sinusoids`), the agent
    none: an egocentric map has the agent's place built in.

    A layer is attention and then an MLP of 4 C, each with a norm before it and added to its input. Memory: no
    N x N map. Work per layer: 2 N^2 C for the attention. 3D: one axis more in the code of positions.

    Parameters: per layer 12 C^2 + 9 C; agent C if learned, else (agent_size + 1) C.
    Raises ValueError unless heads divides the channels.
    """

    def __init__(
        self,
        channels: int,
        spatial_dims: int,
        *,
        layers: int = 2,
        heads: int = 4,
        agent_size: int | None = None,
    ) -> None:
        super().__init__()
        check_rank(spatial_dims)
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads, got {channels=} and {heads=}")
        width = channels // heads
        self.agent = nn.Parameter(torch.randn(channels) * 0.02) if agent_size is None else None
        self.embed = None if agent_size is None else nn.Linear(agent_size, channels)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            operator = FullAttention()
            self.layers.append(
                AttentionLayer(channels, operator, heads=heads, head_size=width, value_size=width)
            )
            self.layers.append(_Feedforward(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, *size] -> [B, C, *size]; raises ValueError if the layer is made for a given agent."""
        return self.read(x, None)[1]

    def read(self, x: Tensor, agent: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cells [B, C, *size] and agent [B, agent_size] -> agent [B, C], cells [B, C, *size].

        agent: None where the agent is a learned token. Raises ValueError if it is given or missing otherwise.
        """
        cells = x.movedim(1, -1)
        code = sinusoids(x.shape[2:], x.shape[1], x)
        tokens = torch.cat([self._agent(agent, x), (cells + code).flatten(1, -2)], 1)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens[:, 0], tokens[:, 1:].mT.reshape(x.shape)

    def _agent(self, state: Tensor | None, x: Tensor) -> Tensor:
        """[B, 1, C]."""
        if (self.embed is None) != (state is None):
            expected = "no agent, it is learned" if self.embed is None else "an agent [B, agent_size]"
            raise ValueError(f"this map attention takes {expected}, got {'none' if state is None else 'one'}")
        if self.embed is None or state is None:
            assert self.agent is not None
            return self.agent.to(x.dtype).expand(x.shape[0], 1, -1)
        embedded: Tensor = self.embed(state)
        return embedded[:, None].to(x.dtype)


class _Feedforward(nn.Module):
    """x + MLP(norm(x)); 8 C^2 + 7 C parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))
        return out


def map_layers(channels: int, spatial_dims: int, *, layers: int = 1, heads: int = 4) -> MapAttention:
    """Map attention with a learned agent token as a U-Net takes it."""
    return MapAttention(channels, spatial_dims, layers=layers, heads=heads)
