"""Every network as a program: compiled as one graph, exported for one size and for many."""

from __future__ import annotations

import io
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from medattn.networks import names
from medattn.networks.registry import family

LEAST, MOST = 3, 5  # units along an axis; a table of positions shorter than this is cut to the volume's size


def _step(network: nn.Module, run: Any, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one training step."""
    out = run(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    (out * weight).sum().backward()
    gradients = {
        f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None
    }
    return {"output": out.detach(), **gradients, **dict(network.named_buffers())}


def _assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(got[name], want, rtol=1e-7, atol=1e-10, msg=name)


def test_compiles_as_one_graph_with_equal_output_gradients_and_statistics(costly_case: Any) -> None:
    """No part falls back to Python; the graph is run without a C++ compiler, in float64: no kink is near."""
    torch._dynamo.reset()
    eager, compiled = costly_case.network().double(), costly_case.network().double()
    program = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x = costly_case.input().double()
    _assert_same(_step(compiled, program, x), _step(eager, eager, x))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own about itself
@pytest.mark.parametrize("name", ["unet", "unet_block", "unet_lambda", "unet_crosscov"])
def test_compiled_to_machine_code_it_trains_the_same(name: str, cases_by_id: dict[str, Any]) -> None:
    torch._dynamo.reset()
    case = cases_by_id[f"{name}-3d"]
    eager, compiled = case.network().double(), case.network().double()
    x = case.input().double()
    got = _step(compiled, torch.compile(compiled, fullgraph=True), x)
    _assert_same(got, _step(eager, eager, x))


@torch.no_grad()
def test_exported_program_gives_the_same_output(costly_case: Any) -> None:
    network, x = costly_case.network().eval(), costly_case.input()
    program = torch.export.export(network, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), network(x))


@pytest.mark.parametrize("name", ["unet_block-2d", "unet_axial-3d"])
@torch.no_grad()
def test_exported_program_survives_a_file(name: str, cases_by_id: dict[str, Any]) -> None:
    case = cases_by_id[name]
    network, x = case.network().eval(), case.input()
    file = io.BytesIO()
    torch.export.save(torch.export.export(network, (x,), strict=False), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), network(x))


@pytest.mark.slow
@torch.no_grad()
def test_one_exported_program_serves_many_sizes(case: Any) -> None:
    """Batches and sides within a range, sides in units.

    A network pads sides that are no multiple of its strides, and an attention those that are no multiple of
    its block or window; whether it must is decided while exporting, so a program knows multiples only.
    Lambda layers cut their table to the volume where that is smaller: hence at least LEAST units.
    """
    network = case.network(**case.blocks).eval()
    sides = {2 + axis: case.unit * Dim(f"n{axis}", min=LEAST, max=MOST) for axis in range(case.dims)}
    first = tuple((LEAST + (axis == 1)) * case.unit for axis in range(case.dims))
    shapes = ({0: Dim("batch", min=1, max=4), **sides},)
    program = torch.export.export(network, (case.input(2, first),), strict=False, dynamic_shapes=shapes)
    other = case.input(3, tuple(reversed(first)))
    for x in (case.input(2, first), other, case.input(1, (MOST * case.unit,) * case.dims)):
        torch.testing.assert_close(program.module()(x), network(x))


def test_every_family_of_segmentation_networks_says_how_it_is_made_small(
    families_with_cases: set[str],
) -> None:
    """Or none of the tests here would see its networks."""
    assert {family(name) for name in names(task="segmentation")} <= families_with_cases
