"""The batch-normalised axial layer against the published one, written densely with PyTorch's batch norms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from medattn.layers.axial import AxialAttention2d, AxialAttention3d

HEADS, CHANNELS, LENGTH = 2, 16, 6


class Dense(nn.Module):
    """One published layer on [lines, channels, length], with every L x L map formed."""

    def __init__(self, inputs: int, outputs: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads, self.g = heads, outputs // heads
        self.qkv_transform = nn.Conv1d(inputs, 2 * outputs, 1, bias=False)
        self.bn_qkv = nn.BatchNorm1d(2 * outputs)
        self.bn_similarity = nn.BatchNorm2d(3 * heads)
        self.bn_output = nn.BatchNorm1d(2 * outputs)
        self.relative = nn.Parameter(torch.randn(2 * self.g, 2 * length - 1))
        place = torch.arange(length)
        self.register_buffer("flatten_index", (place[:, None] - place + length - 1).flatten())

    def forward(self, x: Tensor) -> Tensor:
        n, length, g = len(x), x.shape[-1], self.g
        qkv = self.bn_qkv(self.qkv_transform(x)).view(n, self.heads, 2 * g, length)
        q, k, v = qkv[:, :, : g // 2], qkv[:, :, g // 2 : g], qkv[:, :, g:]
        place = torch.arange(length)
        rows = self.relative[:, place[:, None] - place + length - 1]  # [2 g, i, j] at column i - j + K - 1
        r_q, r_k, r_v = rows[: g // 2], rows[g // 2 : g], rows[g:]
        terms = [
            torch.einsum("nhci,nhcj->nhij", q, k),
            torch.einsum("nhci,cij->nhij", q, r_q),
            torch.einsum("nhcj,cji->nhij", k, r_k),
        ]
        logits = self.bn_similarity(torch.cat(terms, 1)).unflatten(1, (3, self.heads)).sum(1)
        attention = logits.softmax(-1)
        parts = [
            torch.einsum("nhij,nhcj->nhci", attention, v),
            torch.einsum("nhij,cij->nhci", attention, r_v),
        ]
        stacked = torch.stack(parts, 3).flatten(1, 3)  # channels (head, c, part)
        return self.bn_output(stacked).unflatten(1, (-1, 2)).sum(2)


def _as_lines(x: Tensor, axis: int) -> Tensor:
    return x.movedim((1, 2 + axis), (-2, -1)).flatten(0, -3)


def _pair(
    cls: type[AxialAttention2d | AxialAttention3d], axis: int, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = Dense(CHANNELS, CHANNELS, HEADS, LENGTH)
    for norm in (dense.bn_qkv, dense.bn_similarity, dense.bn_output):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    layer = cls(CHANNELS, CHANNELS, axis=axis, length=LENGTH, heads=HEADS)
    layer.load_state_dict(dense.state_dict())
    return dense.double(), layer.to(dtype)


@pytest.mark.parametrize(
    ("cls", "size", "axis"),
    [(AxialAttention2d, (6, 5), 0), (AxialAttention2d, (5, 6), 1), (AxialAttention3d, (3, 6, 4), 1)],
    ids=["2d-height", "2d-width", "3d"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_equals_the_published_layer_in_training_and_evaluation(
    cls: type[AxialAttention2d | AxialAttention3d],
    size: tuple[int, ...],
    axis: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Outputs, gradients of input and parameters, and running statistics; the state dict loads."""
    dense, layer = _pair(cls, axis, dtype)
    close = partial(torch.testing.assert_close, atol=tolerance, rtol=tolerance, check_dtype=False)
    for step in range(2):
        x = 1 + torch.randn(2, CHANNELS, *size, dtype=dtype)
        weight = torch.randn(2, CHANNELS, *size, dtype=dtype)
        exact, x = x.double().requires_grad_(), x.requires_grad_()
        expected, got = dense(_as_lines(exact, axis)), layer(x)
        close(_as_lines(got, axis), expected)
        want = torch.autograd.grad((expected * _as_lines(weight, axis)).sum(), [exact, *dense.parameters()])
        have = torch.autograd.grad((got * weight).sum(), [x, *layer.parameters()])
        names = ["input", *(name for name, _ in dense.named_parameters())]
        for name, a, b in zip(names, have, want, strict=True):
            assert (a - b).abs().max() <= tolerance * max(1, b.abs().max()), f"{step=}: gradient of {name}"
    state = layer.state_dict()
    for name, buffer in dense.named_buffers():
        if name != "flatten_index":
            close(state[name], buffer, msg=name)
    dense.eval()
    layer.eval()
    close(_as_lines(layer(x), axis), dense(_as_lines(exact, axis)))


def test_parameters_follow_the_published_count() -> None:
    """Reference: 37,392 for c=128, K=56 and 10,528 for c=64, K=56, with eight heads."""
    counts = {
        c: sum(p.numel() for p in AxialAttention2d(c, c, axis=0, length=56).parameters()) for c in (64, 128)
    }
    assert counts == {64: 10_528, 128: 37_392}


def test_a_local_span_normalises_over_the_pairs_seen() -> None:
    """Against the mean and variance of the masked maps, in the running statistics."""
    torch.manual_seed(0)
    layer = AxialAttention3d(8, 16, axis=2, length=5, heads=2, span=5).double()
    x = torch.randn(2, 8, 3, 2, 11, dtype=torch.float64)
    out = layer(x)
    assert out.shape == (2, 16, 3, 2, 11)
    lines = layer.bn_qkv(layer.qkv_transform(_as_lines(x, 2))).view(12, 2, 16, 11)
    offset = torch.arange(11) - torch.arange(11)[:, None]
    content = torch.einsum("nhci,nhcj->hnij", lines[:, :, :4], lines[:, :, 4:8])
    seen = content[:, :, offset.abs() <= 2].flatten(1)
    running = layer.bn_similarity
    assert running.running_mean is not None
    assert running.running_var is not None
    torch.testing.assert_close(running.running_mean[:2], 0.1 * seen.mean(1))
    torch.testing.assert_close(running.running_var[:2], 0.9 + 0.1 * seen.var(1))


def test_channels_that_do_not_split_into_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="out_channels must be a multiple of 2 heads"):
        AxialAttention2d(12, 12, axis=0, length=4, heads=8)
