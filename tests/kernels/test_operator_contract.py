"""What all operators share: messages for bad arguments, choice of implementation, import without Triton."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from medattn_kernels import axial_attention, block_attention
from medattn_kernels._chunk import pieces
from medattn_kernels.testing import assert_within_budget, make_qkv

Change = Callable[[dict[str, Any]], None]


def _axial(**changes: Any) -> Any:
    return axial_attention(**make_qkv((4, 5)) | {"axis": 0} | changes)


def _block(**changes: Any) -> Any:
    return block_attention(**make_qkv((4, 5)) | {"block": 2, "halo": 1} | changes)


def _zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize("call", [_axial, _block])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": _zeros(2, 4, 3, 5)}, r"k must have the shape of q, got k .*5, 3, 5\] and q \[2, 4, 3, 5\]"),
        ({"q": _zeros(4, 3, 5)}, r"q must be \[B, \*size, H, D\] with one to .* got \[4, 3, 5\]"),
        ({"k": _zeros(2, 4, 4, 3, 5)}, r"k must have the shape of q, got k \[2, 4, 4, 3, 5\]"),
        ({"v": _zeros(2, 4, 5, 1, 6)}, r"v must match q in all but its last axis, got v \[2, 4, 5, 1, 6\]"),
        ({"v": _zeros(2, 4, 5, 3, 0)}, r"every axis but the batch needs .* v \[2, 4, 5, 3, 0\]"),
        ({"v": _zeros(2, 4, 5, 3, 6, dtype=torch.float32)}, r"v must have the dtype of q, got torch.float32"),
        ({"v": _zeros(2, 4, 5, 3, 6).to("meta")}, r"v must be on the device of q, got meta and cpu"),
        ({"impl": "fast"}, r"unknown impl='fast'; expected 'naive' or 'eager'"),
    ],
)  # fmt: skip
def test_shared_arguments_are_refused_by_name_and_value(
    call: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    """One helper checks q, k, v and impl for every operator."""
    with pytest.raises((TypeError, ValueError), match=message):
        call(**changes)


@pytest.mark.parametrize("call", [_axial, _block])
def test_a_dtype_that_triton_does_not_take_is_refused(call: Callable[..., Any]) -> None:
    """Never replaced by another implementation."""
    message = (
        r"_attention: impl='triton' takes float32, bfloat16 or float16, got torch.float64; use impl='eager'"
    )
    with pytest.raises(ValueError, match=message):
        call(impl="triton")


@pytest.mark.parametrize("impl", ["naive", "eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", [_axial, _block])
def test_autocast_casts_inputs_to_its_own_dtype(
    call: Callable[..., Any], dtype: torch.dtype, impl: Any
) -> None:
    """Whatever dtype the region has, mixed inputs included; float64 stays. Equal to an explicit cast."""
    x = {n: t.float() for n, t in make_qkv((4, 5)).items()}
    x["k"] = x["k"].to(dtype)
    expected = call(**{n: t.to(dtype) for n, t in x.items()}, impl=impl)
    leaf = x["q"].requires_grad_()
    with torch.autocast("cpu", dtype):
        out = call(**x, impl=impl)
        wide = call(impl="eager")
    assert out.dtype == dtype
    assert wide.dtype == torch.float64
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", ["naive", "eager", "triton"])
@pytest.mark.parametrize("call", [_axial, _block])
def test_transforms_of_torch_func_work_or_are_refused(call: Callable[..., Any], impl: Any) -> None:
    """naive goes through them; the others say so instead of failing inside torch."""
    x = {n: t.float() for n, t in make_qkv((4, 5)).items()}
    q = x.pop("q")

    def loss(q: Tensor) -> Any:
        return call(q=q, **x, impl=impl).square().sum()

    if impl == "naive":
        leaf = q.clone().requires_grad_()
        torch.testing.assert_close(torch.func.grad(loss)(q), torch.autograd.grad(loss(leaf), leaf)[0])
    else:
        with pytest.raises(RuntimeError, match=rf"_attention: impl='{impl}' has no rule for torch.func"):
            torch.func.grad(loss)(q)


@pytest.mark.parametrize("call", [_axial, _block])
def test_integer_inputs_are_refused(call: Callable[..., Any]) -> None:
    """Attention of integers is a mistake, not a request."""
    x = {name: tensor.long() for name, tensor in make_qkv((4, 5)).items()}
    with pytest.raises(TypeError, match=r"q must be floating point, got torch.int64"):
        call(**x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": 2}, r"axis must be a spatial axis, -2 to 1 for q \[2, 4, 5, 3, 5\], got axis=2"),
        ({"axis": -3}, r"got axis=-3"),
        ({"span": 4}, r"span must be odd and positive, or None for the whole line, got span=4"),
        ({"span": -1}, r"got span=-1"),
        ({"rel_q": _zeros(4, 5)}, r"rel_q must be \[R, 5\] with an odd number of rows R, got \[4, 5\]"),
        ({"rel_k": _zeros(3, 6)}, r"rel_k must be \[R, 5\] with an odd number of rows R, got \[3, 6\]"),
        ({"rel_v": _zeros(3, 5)}, r"rel_v must be \[R, 6\] with an odd number of rows R, got \[3, 5\]"),
        ({"rel_v": _zeros(3, 6).int()}, r"rel_v must be floating point, got torch.int32"),
        ({"rel_v": _zeros(3, 6).to("meta")}, r"rel_v must be on the device of q, got meta and cpu"),
        ({"gain": _zeros(3, 2)}, r"gain must be \[3, 3\] \(logit terms, heads\), got \[3, 2\]"),
        ({"separate": True}, r"separate=True .* needs rel_v, got rel_v=None"),
    ],
)
def test_axial_arguments_are_refused_by_name_and_value(changes: dict[str, Any], message: str) -> None:
    """One sentence with argument, value and rule."""
    with pytest.raises((TypeError, ValueError), match=message):
        _axial(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 0}, r"block must be an int of at least 1, or one per spatial axis \(2 here\), got 0"),
        ({"block": (2, 2, 2)}, r"block must be .* got \(2, 2, 2\)"),
        ({"block": 2.5}, r"block must be .* got 2.5"),
        ({"halo": -1}, r"halo must be an int, or per spatial axis \(2 here\) .* none negative, got -1"),
        ({"halo": [(0, 1)]}, r"halo must be .* got \[\(0, 1\)\]"),
        ({"halo": [(0, 1, 2), 1]}, r"halo must be .* got \[\(0, 1, 2\), 1\]"),
        ({"halo": [0.5, 1]}, r"halo must be .* got \[0.5, 1\]"),
        ({"stride": 0}, r"stride must be an int of at least 1"),
        ({"stride": (1, 3)}, r"stride must divide block on every axis, got stride=\(1, 3\) and block=2"),
        ({"padding": "zeros"}, r"unknown padding='zeros'; expected 'masked' or 'zero'"),
        ({"rel": [_zeros(3, 5)]}, r"rel must be one table per spatial axis \(2 here\), got 1"),
        ({"rel": [_zeros(3, 5), _zeros(2, 5)]}, r"rel\[1\] must be \[R, 5\] with an odd number of rows R"),
        ({"bias": _zeros(3, 3)}, r"bias must be \[3, R, R\] \(heads, an odd R per axis\), got \[3, 3\]"),
        ({"bias": _zeros(3, 3, 4)}, r"bias must be .* got \[3, 3, 4\]"),
        ({"bias": _zeros(2, 3, 3)}, r"bias must be .* got \[2, 3, 3\]"),
    ],
)
def test_block_arguments_are_refused_by_name_and_value(changes: dict[str, Any], message: str) -> None:
    """One sentence with argument, value and rule."""
    with pytest.raises((TypeError, ValueError), match=message):
        _block(**changes)


def test_operators_import_and_run_where_triton_is_missing() -> None:
    """A fresh process in which importing triton fails, as on a CPU-only installation."""
    program = """
import sys
sys.modules["triton"] = None
import torch
import medattn_kernels
operators = {
    "axial": {"axis": 1},
    "block": {"block": 2, "halo": 1},
    "cross_covariance": {"temperature": torch.ones(2)},
    "lambda": {"table": torch.randn(3, 3, 2, 3)},
}
for name, arguments in operators.items():
    x = [torch.randn(1, 4, 5, 2, 3, requires_grad=True) for _ in range(3)]
    getattr(medattn_kernels, f"{name}_attention")(*x, **arguments).sum().backward()
    assert x[0].grad is not None
    try:
        getattr(medattn_kernels, f"{name}_attention")(*x, **arguments, impl="triton")
    except ValueError as error:
        assert "needs the package triton" in str(error), error
    else:
        raise AssertionError("an explicit implementation was replaced")
assert not [m for m in sys.modules if m.split(".")[0] in ("medattn", "monai", "numba")]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("outer", "inner", "limit"), [(3, 5, 1), (3, 5, 4), (3, 5, 5), (7, 5, 12), (2, 3, 0), (0, 4, 9)]
)
def test_pieces_cover_everything_once_within_the_limit(outer: int, inner: int, limit: int) -> None:
    """Whole rows or parts of one row, never more entries than allowed except a single one."""
    covered = torch.zeros(outer, inner)
    for rows, columns in pieces(outer, inner, limit):
        covered[rows, columns] += 1
        assert covered[rows, columns].numel() <= max(1, limit)
        assert rows.stop - rows.start == 1 or (columns.start, columns.stop) == (0, inner)
    assert (covered == 1).all()


def test_error_budget_refuses_wrong_values_nan_shapes_and_dtypes() -> None:
    """The helper that all comparisons rest on."""
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    low = truth.float() * (1 + 1e-7)
    assert_within_budget("x", truth.float(), truth, low)
    for wrong in (low * 1.001, low * float("nan"), low[:1], low.double()):
        with pytest.raises(AssertionError, match="x: "):
            assert_within_budget("x", wrong, truth, low)
