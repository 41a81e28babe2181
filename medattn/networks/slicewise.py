"""Two-dimensional networks on volumes."""

from __future__ import annotations

from torch import Tensor, nn


class SliceWise(nn.Module):
    """Runs a 2D network on every axial slice: [B, C, i, j, k] -> [B, K, i, j, k].

    Slices become batch entries, so patches, tiles and losses of volumes serve 2D networks unchanged.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        B, _, _, _, k = x.shape
        outputs = self.network(x.movedim(-1, 1).flatten(0, 1))
        if isinstance(outputs, Tensor):
            return _stack(outputs, B, k)
        return [_stack(output, B, k) for output in outputs]


def _stack(slices: Tensor, B: int, k: int) -> Tensor:
    return slices.reshape(B, k, *slices.shape[1:]).movedim(1, -1)
