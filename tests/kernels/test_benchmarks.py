"""The benchmark runner: its registry, its peers, its floors and what it writes. No time is asserted here."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).parents[2] / "kernels/benchmarks")
sys.path.insert(0, BENCHMARKS)

import measure  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
from floor import floor_seconds  # noqa: E402
from measure import Memory, Problem, Times, leaves  # noqa: E402
from registry import REGISTRY, find  # noqa: E402
from shapes import ALL_TERMS, Entry  # noqa: E402

sys.path.remove(BENCHMARKS)

AXIAL = [
    Entry("", "axial", "cpu", (7,), 2, 3, 4, terms=ALL_TERMS, batch=2),
    Entry("", "axial", "cpu", (5, 6), 2, 3, 4, terms=ALL_TERMS, axis=1),
    Entry("", "axial", "cpu", (3, 5, 4), 2, 3, 4, terms=ALL_TERMS, axis=1, batch=2),
    Entry("", "axial", "cpu", (3, 5, 4), 2, 3, 4, terms=("rel_k",), axis=0),
    Entry("", "axial", "cpu", (3, 5), 2, 3, 4),
]
BLOCK = [
    Entry("", "block", "cpu", size, 2, 3, 4, block=b, halo=h, terms=terms, padding=padding, batch=2)
    for size, b, h in (((7,), 3, 2), ((5, 6), 4, 1), ((5, 4, 3), 2, 1), ((4, 5), 2, 0))
    for terms in (("rel",), ())
    for padding in ("masked", "zero")
]
LAMBDA = [
    Entry("", "lambda", "cpu", size, 2, 3, 4, terms=terms, scope=scope, depth=depth, batch=2)
    for size in ((7,), (5, 6), (3, 5, 4))
    for terms, scope, depth in ((("table",), 3, 1), (("table",), 0, 2), ((), 0, 2))
]
CROSSCOV = [Entry("", "crosscov", "cpu", size, 2, 3, 3, batch=2) for size in ((7,), (5, 6), (3, 5, 4))]
TERMS = {"axial": ALL_TERMS, "block": ("rel",), "lambda": ("table",), "crosscov": ()}


def _error(entry: Entry, actual: Callable[..., torch.Tensor], without: tuple[str, ...] = ()) -> float:
    """Of the output and all gradients against `naive`, in float64."""
    tensors = entry.tensors(torch.float64)
    dout = entry.gradient(torch.float64)
    pair = [
        measure.samples(Problem(f, leaves(tensors, without), dout).both())
        for f in (actual, peers.ours(entry, "naive"))
    ]
    return measure.error(*pair)


def test_names_are_unique() -> None:
    names = [entry.name for entry in REGISTRY]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.name)
def test_the_operator_takes_every_entry(entry: Entry) -> None:
    assert set(entry.also) <= {"naive", "compiled", "flex"}
    assert set(entry.terms) <= set(TERMS[entry.operator])
    assert entry.scope == 0 or entry.scope % 2 == 1
    small = replace(entry.small(), device="cpu")
    assert [len(shape) for shape in small.shapes().values()] == [len(s) for s in entry.shapes().values()]
    assert _error(small, peers.ours(small, "eager")) < 1e-10


@pytest.mark.parametrize("entry", AXIAL + BLOCK, ids=str)
@pytest.mark.parametrize("name", ["dense", "sdpa"])
def test_peers_agree_with_the_specification(entry: Entry, name: str) -> None:
    candidate = peers.candidates(entry)[name]
    assert isinstance(candidate, peers.Candidate)
    assert candidate.same_function == (name != "sdpa" or "rel_v" not in entry.terms)
    assert _error(entry, candidate.run, candidate.without) < 1e-10


@pytest.mark.parametrize("entry", LAMBDA + CROSSCOV, ids=str)
def test_published_forms_agree_with_the_specification(entry: Entry) -> None:
    found = peers.candidates(entry)
    assert list(found) == ["eager", "dense"]
    for candidate in found.values():
        assert isinstance(candidate, peers.Candidate)
        assert candidate.same_function
        assert _error(entry, candidate.run) < 1e-10


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("entry", AXIAL + [entry for entry in BLOCK if entry.terms], ids=str)
def test_flex_attention_agrees_with_the_specification(entry: Entry) -> None:
    """The output: on a CPU, FlexAttention has no backward pass."""
    tensors = {name: x for name, x in entry.tensors(torch.float64).items() if name != "rel_v"}
    torch.testing.assert_close(
        peers.bound(entry, "flex")(**tensors), peers.ours(entry, "naive")(**tensors), rtol=1e-6, atol=1e-6
    )


def test_packages_that_are_missing_or_do_not_fit_are_told_apart() -> None:
    """NATTEN and timm are offered where they could compute the entry, with a reason if not installed."""
    volume, image = (peers._installed(find(name)) for name in ("block-96", "halonet-32"))
    assert list(volume) == ["natten"]
    assert list(image) == ["timm"]
    for candidate in (*volume.values(), *image.values()):
        assert isinstance(candidate, peers.Candidate) or "not importable" in candidate


@pytest.mark.parametrize("entry", AXIAL + BLOCK, ids=str)
def test_pairs_of_softmax_attention_are_those_that_are_seen(entry: Entry) -> None:
    b, h = entry.block, entry.halo

    def sees(n: int, m: int, size: int, axis: int) -> bool:
        if entry.operator == "axial":
            return 0 <= m < size and (axis == entry.axis or n == m)
        inside = entry.padding == "zero" or 0 <= m < size
        return inside and n // b * b - h <= m < n // b * b + b + h

    along = [
        sum(sees(n, m, size, axis) for n, m in product(range(size), range(-h - b, size + h + b)))
        for axis, size in enumerate(entry.size)
    ]
    assert entry.pairs == entry.batch * entry.heads * math.prod(along)


@pytest.mark.parametrize("entry", LAMBDA, ids=str)
def test_pairs_of_lambda_attention_are_those_with_a_table_entry(entry: Entry) -> None:
    near = [
        sum(abs(n - m) <= rows // 2 for n, m in product(range(size), repeat=2))
        for size, rows in zip(entry.size, entry.table, strict=True)
    ]
    assert entry.pairs == (entry.batch * math.prod(near) if entry.terms else 0)


@pytest.mark.parametrize(
    ("name", "forward_ms", "backward_ms"),
    [
        pytest.param("axial-96", 0.316, 0.632, id="memory"),  # 12 and 24 bytes x D x queries
        pytest.param("axial-192", 3.083, 7.486, id="products"),  # 14 and 34 flops x D x pairs
        pytest.param("axial-96-logit-terms", 0.316, 0.632, id="fewer tables"),
        pytest.param("block-96", 6.075, 6.075, id="exponentials"),  # 8 heads x 1472^3 pairs
        pytest.param("lambda-96", 0.375, 1.121, id="lambdas"),  # 660^3 pairs; 0.39 and 1.18 with 672^3
        pytest.param("lambda-96-content", 0.0988, 0.1975, id="content lambda"),  # 480 and 960 bytes x N
        pytest.param("crosscov-96", 0.211, 0.369, id="channels"),  # 8 and 14 bytes x D x queries
    ],
)
def test_floors_are_the_numbers_of_the_readme(name: str, forward_ms: float, backward_ms: float) -> None:
    floors = [1e3 * floor_seconds(find(name), which) for which in (False, True)]
    assert floors == pytest.approx([forward_ms, backward_ms], rel=2e-3)


def test_samples_find_one_wrong_region_and_nan() -> None:
    truth = torch.randn(2, 1100, 1000).mT
    wrong = truth.clone()
    wrong[:, :, -100:] = 0
    for bad in (wrong, torch.full_like(truth, math.nan)):
        assert not measure.error(measure.samples((bad,)), measure.samples((truth,))) < 0.2
    assert measure.error(measure.samples((truth.clone(),)), measure.samples((truth,))) == 0


def test_peak_memory_on_a_cpu_sees_the_maps_of_the_dense_form() -> None:
    entry = find("cpu-block-16")
    memory = measure.cpu_memory(entry, "dense")
    voxels = 2 * 16 * 16**3  # heads, width
    tables = 3 * 11 * 16
    assert memory.tensors == 2 * 4 * (4 * voxels + tables)
    one_map = 4 * 2 * 16**3 * 8**3
    assert 2 * one_map < memory.beyond < 6 * one_map


def _fixed_memory(entry: Entry, candidate: str) -> Memory:
    return Memory(tensors=100, peak=150)


def test_a_run_prints_and_writes_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "cpu_memory", _fixed_memory)
    arguments = [
        "--device",
        "cpu",
        "--only",
        "cpu-axial-16",
        "--repeats",
        "3",
        "--out",
        str(tmp_path / "new"),
    ]
    assert run.main(arguments) == 0
    (text,) = (tmp_path / "new").glob("cpu-*.json")
    found = json.loads(text.read_text(encoding="utf-8"))
    assert {"device", "date", "torch", "triton"} <= set(found["machine"])
    rows = found["entries"]["cpu-axial-16"]["implementations"]
    assert list(rows) == ["eager", "naive", "dense", "sdpa"]
    for row in rows.values():
        assert row["forward_backward_ms"]["repeats"] == 3
        assert row["forward_ms"]["p20"] <= row["forward_ms"]["median"] <= row["forward_ms"]["p80"]
        assert row["beyond_share"] == 0.5
        assert row["error"] < 1e-5
        assert "floor_share" not in row
        copy = found["entries"]["cpu-axial-16"]["copy_forward_backward_ms"]["median"]
        assert row["copy_share"]["forward_backward"] == copy / row["forward_backward_ms"]["median"]
    assert rows["sdpa"]["function"] == "without rel_v"
    printed = capsys.readouterr()
    table = text.with_suffix(".md").read_text(encoding="utf-8")
    assert printed.out.split("### ")[1].strip() == table.split("### ")[1].strip()
    assert "Best peer of the same function: dense" in table
    assert "[1/1] cpu-axial-16" in printed.err


def test_a_peer_that_disagrees_or_fails_is_reported_and_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(**tensors: torch.Tensor) -> torch.Tensor:
        return 1.01 * peers.ours(find("cpu-axial-16"), "eager")(**tensors)

    def full(**tensors: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError

    def broken(**tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this")

    candidates = {
        "eager": peers.Candidate(peers.ours(find("cpu-axial-16"), "eager")),
        **{f.__name__: peers.Candidate(f) for f in (wrong, full, broken)},
        "absent": "not importable: absent",
    }
    monkeypatch.setattr(measure, "cpu_memory", _fixed_memory)
    monkeypatch.setattr(run, "candidates", lambda entry: candidates)
    arguments = ["--device", "cpu", "--only", "cpu-axial-16", "--repeats", "1", "--out", str(tmp_path)]
    assert run.main(arguments) == 1
    lines = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}
    for name, note in (
        ("wrong", "disagrees: error 1.0e-02 over 1e-04, not timed"),
        ("full", "out of memory"),
        ("broken", "did not run: RuntimeError: no kernel"),
        ("absent", "not importable: absent"),
    ):
        assert lines[f"| {name}"].endswith(f" | {note} |")
        assert " to " not in lines[f"| {name}"]
    assert " to " in lines["| eager"]


def test_the_table_sets_the_others_against_ours() -> None:
    times = [Times(ms, 0.9 * ms, 1.1 * ms, 5) for ms in (1.0, 2.0, 5.0)]
    rows = [
        report.Row("dense", "same", times[1], times[2], Memory(2**20, 4 * 2**20)),
        report.Row("eager", "same"),
        report.Row("triton", "same", times[0], times[1], Memory(2**20, 2 * 2**20), (0.316, 0.474), 0.001),
    ]
    text = report.markdown(report.Result(find("axial-96"), rows))
    first, _, third = text.splitlines()[6:9]
    assert first == (
        "| triton | same | 1 (0.9 to 1.1) | 2 (1.8 to 2.2) | 2 | 1, 100% | 32% / 47% |  | 1e-03 |  |"
    )
    assert third.split(" | ")[2:6] == [
        "2 (1.8 to 2.2) [2.0 x]",
        "5 (4.5 to 5.5) [2.5 x]",
        "4 [2.0 x]",
        "3, 300% [3.0 x]",
    ]
    assert "floor 0.316 ms forward, 0.632 ms backward" in text
    assert "2.50 times the forward + backward time, 2.00 times the peak, 3.00" in text


def test_text_that_matches_no_entry_is_refused_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device", "cpu", "--only", "axail"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "'axail'" in message
    assert "cpu-axial-64" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device", "cuda"]) == 2
    assert "there is none" in capsys.readouterr().err
