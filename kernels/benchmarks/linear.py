"""Time and memory against the number of voxels, for the operators whose cost should be linear in it.

    python kernels/benchmarks/linear.py                 measure, write and plot; on a GPU if there is one
    python kernels/benchmarks/linear.py --redraw FILE   only plot the numbers of such a file again

Forward and backward pass of lambda and cross-covariance attention on cubes. Writes OUT/linear-DEVICE.json and
OUT/linear-DEVICE.svg, with a straight line fitted to the logarithms from 32^3 voxels on: its slope is the
exponent. Below that, the time of a call that does nothing and the size of one piece of work show.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import linear_regression
from typing import Any

import measure
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import Memory, Problem, Times
from peers import ours
from registry import find
from run import MOST_REPEATS, RESULTS, machine
from shapes import Entry
from store import path_for

SIDES = {"cpu": (8, 12, 16, 24, 32, 48, 64), "cuda": (8, 16, 24, 32, 48, 64, 96, 128, 192)}
ENTRIES = {"cpu": ("cpu-lambda-64", "cpu-crosscov-64"), "cuda": ("lambda-192", "crosscov-192")}
IMPLEMENTATION = {"cpu": "eager", "cuda": "triton"}
FITTED_FROM = 32  # voxels along a side
TITLES = {"lambda": "lambda attention", "crosscov": "cross-covariance attention"}
STYLE = {"lambda": ("#0072b2", "o"), "crosscov": ("#d55e00", "s")}
MIB = 2**20


@dataclass(frozen=True)
class Point:
    """What one cube took."""

    side: int
    times: Times
    memory: Memory

    @property
    def voxels(self) -> int:
        """Of the cube."""
        return self.side**3


Curves = dict[str, list[Point]]
Quantity = Callable[[Sequence[Point]], list[float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure or read, plot, and print the numbers as a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is a GPU, else cpu")
    parser.add_argument("--largest", type=int, metavar="SIDE", help="no cube with a longer side")
    parser.add_argument("--redraw", type=Path, metavar="FILE", help="a file that was written before")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FOLDER", help="default: results beside this script"
    )
    args = parser.parse_args(argv)
    if args.redraw:
        path, found = args.redraw.with_suffix(""), json.loads(args.redraw.read_text(encoding="utf-8"))
    else:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        found = measured(device, [n for n in SIDES[device] if n <= (args.largest or n)])
        path = path_for(args.out, found["machine"]["device"])
        path = path.with_name(f"linear-{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".svg").write_text(drawn(found), encoding="utf-8")
    print(table(curves_of(found)))
    return 0


def measured(device: str, sides: Sequence[int]) -> dict[str, Any]:
    """Machine, problems and points of both operators, as JSON holds them."""
    entries = [find(name) for name in ENTRIES[device]]
    points: dict[str, list[dict[str, Any]]] = {entry.operator: [] for entry in entries}
    for side in sides:
        print(f"{side}^3", end=" ", file=sys.stderr, flush=True)
        cubes = [replace(entry, size=(side,) * 3) for entry in entries]
        for cube, point in zip(cubes, _points(device, cubes), strict=True):
            points[cube.operator].append(asdict(point))
    print(file=sys.stderr)
    return {
        "machine": machine(device),
        "implementation": IMPLEMENTATION[device],
        "problems": {entry.operator: _about(entry) for entry in entries},
        "points": points,
    }


def _about(entry: Entry) -> str:
    """What the cubes of an operator have in common."""
    words = f"{entry.heads} heads of {entry.width}"
    if entry.value_width != entry.width:
        words += f", values of {entry.value_width}"
    return words + (f", table {entry.scope}³" if entry.scope else "")


def _points(device: str, cubes: Sequence[Entry]) -> Iterator[Point]:
    """One for each, the problems in turn."""
    name = IMPLEMENTATION[device]
    problems = {
        cube.operator: Problem(ours(cube, name), measure.leaves(cube.tensors()), cube.gradient())
        for cube in cubes
    }
    for problem in problems.values():
        problem.both()  # code is loaded, kernels are compiled
    if device == "cpu":
        times = measure.cpu_times({n: p.both for n, p in problems.items()}, MOST_REPEATS[device])
        memory = {cube.operator: measure.cpu_memory(cube, name) for cube in cubes}
    else:
        times = {n: measure.cuda_times(p.both, MOST_REPEATS[device]) for n, p in problems.items()}
        memory = {n: measure.cuda_memory(p) for n, p in problems.items()}
    for cube in cubes:
        yield Point(cube.size[0], times[cube.operator], memory[cube.operator])


def curves_of(found: dict[str, Any]) -> Curves:
    """The points of every operator."""
    return {
        name: [Point(p["side"], Times(**p["times"]), Memory(**p["memory"])) for p in points]
        for name, points in found["points"].items()
    }


def exponent(points: Sequence[Point], values: Sequence[float]) -> float | None:
    """Of the number of voxels, by least squares on logarithms; None with fewer than two cubes to fit."""
    pairs = [
        (math.log(point.voxels), math.log(value))
        for point, value in zip(points, values, strict=True)
        if point.side >= FITTED_FROM and value > 0
    ]
    return linear_regression(*zip(*pairs, strict=True)).slope if len(pairs) > 1 else None


def table(curves: Curves) -> str:
    """Markdown: both quantities of every cube, and the exponents."""
    lines = [
        "| operator | cube | forward + backward ms | beyond tensors MiB | tensors MiB |",
        "|---|---|---|---|---|",
    ]
    for name, points in curves.items():
        lines += [
            f"| {name} | {p.side}^3 | {p.times.median:.3g} | {p.memory.beyond / MIB:.3g} "
            f"| {p.memory.tensors / MIB:.3g} |"
            for p in points
        ]
        cells = " | ".join(_exponent(points, values) for values in (_ms(points), _mib(points)))
        lines.append(f"| {name} | exponent of N | {cells} | |")
    return "\n".join(lines)


def drawn(found: dict[str, Any]) -> str:
    """The plot as SVG, the same text for the same numbers."""
    about = found["machine"]
    threads = f", {about['threads']} threads" if found["implementation"] == "eager" else ""
    with rc_context({"svg.hashsalt": "medattn", "font.size": 10}):
        figure = Figure(figsize=(10.5, 5), layout="constrained")
        for axes, quantity, unit in zip(
            figure.subplots(1, 2),
            (_ms, _mib),
            ("time of forward + backward (ms)", "memory beyond tensors (MiB)"),
            strict=True,
        ):
            _panel(axes, found, quantity)
            axes.set_ylabel(unit)
        title = f"{about['device']}, {found['implementation']}{threads}, torch {about['torch']}"
        figure.suptitle(title, fontsize=11)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _panel(axes: Axes, found: dict[str, Any], quantity: Quantity) -> None:
    """One quantity against N on logarithmic axes, with the fitted lines and one of slope 1."""
    curves = curves_of(found)
    for name, points in curves.items():
        color, marker = STYLE[name]
        values = quantity(points)
        label = f"{TITLES[name]}, {found['problems'][name]}: $N^{{{_exponent(points, values)}}}$"
        axes.plot([p.voxels for p in points], values, marker, color=color, ls="-", lw=1.2, ms=5, label=label)
    every = [point for points in curves.values() for point in points]
    _slope_one(axes, every, max(max(quantity(points)) for points in curves.values()))
    sides = sorted({point.side for point in every})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([n**3 for n in sides], [f"${n}^3$" for n in sides])
    axes.minorticks_off()
    axes.set_xlabel(f"voxels N (exponents fitted from {FITTED_FROM}³ on)")
    axes.grid(color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, fontsize=9, labelspacing=0.3)


def _slope_one(axes: Axes, points: Sequence[Point], top: float) -> None:
    """A dashed line proportional to N, over the fitted cubes, above all curves."""
    ends = [min(FITTED_FROM, points[-1].side) ** 3, max(point.voxels for point in points)]
    axes.plot(
        ends, [2 * top * n / ends[1] for n in ends], "--", color="#666666", lw=1, label="proportional to N"
    )


def _exponent(points: Sequence[Point], values: Sequence[float]) -> str:
    """As text."""
    found = exponent(points, values)
    return "unknown" if found is None else f"{round(found, 2) + 0.0:.2f}"  # no -0.00


def _ms(points: Sequence[Point]) -> list[float]:
    return [point.times.median for point in points]


def _mib(points: Sequence[Point]) -> list[float]:
    return [point.memory.beyond / MIB for point in points]


if __name__ == "__main__":
    sys.exit(main())
