"""Inputs and error budgets shared by the operators' tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["contiguous", "channels first", "reversed", "strided"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels first", "reversed", "strided")

AWKWARD_SIZES: tuple[tuple[int, ...], ...] = (
    (1,),
    (11,),  # a prime
    (7, 5),
    (1, 9),  # an axis of length one
    (3, 7, 5),
    (5, 1, 4),
)


def make_qkv(
    size: Sequence[int],
    *,
    batch: int = 2,
    heads: int = 3,
    width: int = 5,
    value_width: int = 6,
    dtype: torch.dtype = torch.float64,
    layout: Layout = "contiguous",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Normal q, k [batch, *size, heads, width] and v [.., value_width]: the same numbers in every layout.

    layout: the strides. "channels first": heads and widths vary slowest, as in the features of a network.
    "reversed": the strides of the axes in reverse order. "strided": every second entry of a larger tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = {"q": width, "k": width, "v": value_width}
    return {
        name: _laid_out(
            torch.randn(batch, *size, heads, n, generator=generator, dtype=torch.float64).to(dtype), layout
        )
        for name, n in widths.items()
    }


def outputs_and_gradients(
    run: Callable[..., Tensor | tuple[Tensor, Tensor]], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """run(**tensors) and the gradient of each tensor for one fixed, uneven weighting of the outputs."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = run(**leaves)
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.arange(part.numel(), device=part.device).view(part.shape).sin() for part in parts]
    gradients = torch.autograd.grad(parts, list(leaves.values()), [w.to(parts[0].dtype) for w in weights])
    results = {f"output {i}": part.detach() for i, part in enumerate(parts)}
    return results | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_within_budget(
    name: str, actual: Tensor, truth: Tensor, eager: Tensor, factor: float = 2.0
) -> None:
    """Assert that `actual` is at most `factor` times as far from the float64 `truth` as `eager` is.

    eager: the specification computed in actual's dtype; its error and one rounding of the largest value are
    the budget. NaN and a wrong shape or dtype fail.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    if not truth.numel():
        return
    band = torch.finfo(actual.dtype).eps * truth.abs().max()
    budget = factor * ((eager.double() - truth).abs().max() + band)
    error = (actual.double() - truth).abs().max()
    assert error <= budget, f"{name}: error {error:.2e} > budget {budget:.2e}"


def assert_meets_budget(
    run: Callable[..., Tensor | tuple[Tensor, Tensor]],
    tensors: Mapping[str, Tensor],
    impl: str,
    sums: tuple[str, ...] = (),
) -> None:
    """Assert for the outputs of run(**tensors, impl=impl) and all gradients what `assert_within_budget` does.

    sums: tensors, by the start of their names, whose gradients are a few long sums: one sample of such an
    error says less about it, so their budget is doubled.
    """
    exact = {name: x.double() for name, x in tensors.items()}
    truth, budget, actual = (
        outputs_and_gradients(partial(run, impl=name), given)
        for name, given in (("naive", exact), ("naive", tensors), (impl, tensors))
    )
    for name in truth:
        factor = 4.0 if name.removeprefix("gradient of ").startswith(sums) else 2.0
        assert_within_budget(name, actual[name], truth[name], budget[name], factor)


def _laid_out(x: Tensor, layout: Layout) -> Tensor:
    if layout == "channels first":
        return x.movedim((-2, -1), (1, 2)).contiguous().movedim((1, 2), (-2, -1))
    if layout == "reversed":
        backwards = list(reversed(range(x.ndim)))
        return x.permute(backwards).contiguous().permute(backwards)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(-2)[..., ::2]
    return x
