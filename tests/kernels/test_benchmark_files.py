"""What benchmarks leave behind: results that are merged, and the plot of time and memory against voxels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

BENCHMARKS = str(Path(__file__).parents[2] / "kernels/benchmarks")
sys.path.insert(0, BENCHMARKS)

import linear  # noqa: E402
import measure  # noqa: E402
import store  # noqa: E402
from linear import Point  # noqa: E402
from measure import Memory, Times  # noqa: E402
from registry import REGISTRY, find  # noqa: E402
from report import Result, Row, as_json, from_json, markdown  # noqa: E402
from shapes import Entry, from_plain  # noqa: E402

sys.path.remove(BENCHMARKS)

ABOUT = {"device": "CPU Some", "date": "2026-01-02", "torch": "2.0", "threads": 2}
COPY = Times(1.0, 0.9, 1.1, 5)


def _result(name: str, ms: float = 2.0) -> Result:
    times = Times(ms, 0.9 * ms, 1.1 * ms, 5)
    rows = [
        Row("triton", "same", times, times, Memory(100, 200), (0.5, 0.25), 1e-6),
        Row("dense", "same", error=0.5, disagrees=True, notes=["disagrees: error 5.0e-01 over 1e-04"]),
        Row("timm", notes=["not importable: timm"]),
    ]
    return Result(find(name), rows, (COPY, COPY), "2026-01-02")


@pytest.mark.parametrize("name", ["lambda-96", "cpu-crosscov-64"])
def test_a_result_survives_its_file(name: str) -> None:
    result = _result(name)
    found = from_json(result.entry, json.loads(json.dumps(as_json(result))))
    assert found == result
    assert markdown(found) == markdown(result)


@pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.name)
def test_an_entry_survives_json(entry: Entry) -> None:
    assert from_plain(json.loads(json.dumps(asdict(entry)))) == entry


def test_the_fraction_of_copy_bandwidth_is_shown() -> None:
    table = markdown(_result("cpu-crosscov-64", ms=1.25))
    assert "| 50% / 25% | 80% / 80% |" in table
    assert "copy 1 ms forward, 1 ms forward + backward at 369 GB/s" in table  # 44 bytes x 64^3 x 32 in 1 ms


def test_a_copy_moves_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces where it is large."""
    monkeypatch.setattr(measure, "COPIED_AT_ONCE", 1000)
    moved = 0
    copy = torch.Tensor.copy_

    def counted(self: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        nonlocal moved
        moved += 2 * self.numel()
        return copy(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    for size in (600, 2000, 5400):
        moved = 0
        measure.copy_of(size, "cpu")()
        assert moved == size


def test_what_is_measured_anew_replaces_the_old_and_the_rest_stays(tmp_path: Path) -> None:
    path = store.path_for(tmp_path / "new", ABOUT["device"])  # type: ignore[arg-type]
    assert path.name == "cpu-some"
    store.write(path, ABOUT, [_result("cpu-crosscov-64"), _result("cpu-axial-64")])
    before = store.earlier(path, ABOUT | {"date": "2026-03-04"})
    store.write(path, ABOUT, [*before, _result("cpu-crosscov-64", ms=7.0)])
    axial, crosscov = store.earlier(path, ABOUT)  # in the order of the registry
    assert axial == _result("cpu-axial-64")
    assert crosscov == _result("cpu-crosscov-64", ms=7.0)
    assert path.with_suffix(".md").read_text(encoding="utf-8").count("### ") == 2


def _other_problem(found: dict[str, Any]) -> None:
    found["entries"]["cpu-axial-64"]["problem"]["heads"] += 1


def _gone(found: dict[str, Any]) -> None:
    found["entries"]["no-such"] = found["entries"].pop("cpu-axial-64")


def _other_torch(found: dict[str, Any]) -> None:
    found["machine"]["torch"] = "1.0"


@pytest.mark.parametrize("change", [_other_problem, _gone, _other_torch])
def test_results_that_no_longer_hold_are_dropped_and_named(
    change: Callable[[dict[str, Any]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu-some"
    store.write(path, ABOUT, [_result("cpu-axial-64")])
    found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    change(found)
    path.with_suffix(".json").write_text(json.dumps(found), encoding="utf-8")
    assert store.earlier(path, ABOUT) == []
    assert capsys.readouterr().err.startswith("cpu-some.json: ")


def _points(power: float) -> list[Point]:
    return [
        Point(n, Times(n ** (3 * power), 0.0, 0.0, 3), Memory(100, 100 + int(4 * n**3)))
        for n in (8, 16, 32, 48, 64)
    ]


def _found() -> dict[str, Any]:
    points = {"lambda": _points(1.0), "crosscov": _points(0.9)}
    return {
        "machine": ABOUT,
        "implementation": "eager",
        "problems": dict.fromkeys(points, "2 heads of 16"),
        "points": {name: [asdict(p) for p in ps] for name, ps in points.items()},
    }


def test_the_exponent_is_that_of_the_larger_cubes() -> None:
    points = _points(1.25)
    values = [point.times.median for point in points]
    values[0] *= 100
    assert linear.exponent(points, values) == pytest.approx(1.25)
    assert linear.exponent(points[:3], values[:3]) is None


def test_the_plot_depends_on_the_numbers_only_and_names_exponents() -> None:
    found = _found()
    text = linear.drawn(found)
    assert text == linear.drawn(found)
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "<dc:date>" not in text
    assert str(Path.home()) not in text
    assert "| crosscov | exponent of N | 0.90 | 1.00 | |" in linear.table(linear.curves_of(found))


def test_cubes_are_measured_and_drawn_again_from_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fixed(entry: Entry, candidate: str) -> Memory:
        return Memory(100, 100 + entry.positions)

    monkeypatch.setattr(measure, "cpu_memory", fixed)
    monkeypatch.setattr(linear, "FITTED_FROM", 8)
    arguments = ["--device", "cpu", "--largest", "12", "--out", str(tmp_path)]
    assert linear.main(arguments) == 0
    (plot,) = tmp_path.glob("linear-cpu-*.svg")
    first = plot.read_text(encoding="utf-8")
    plot.unlink()
    assert linear.main(["--redraw", str(plot.with_suffix(".json"))]) == 0
    assert plot.read_text(encoding="utf-8") == first
