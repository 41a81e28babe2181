"""Measure the attention operators against other ways to compute the same.

    python kernels/benchmarks/run.py                      every problem of this machine's device
    python kernels/benchmarks/run.py --only axial-96      only those whose name contains the text
    python kernels/benchmarks/run.py --device cpu         on the CPU of a machine with a GPU

Problems are listed in `registry.py`, peers in `peers.py`. Every implementation is first compared with the
operator, output and gradients: one that disagrees is not timed and the exit code is 1. Prints Markdown tables
and writes OUT/DEVICE.json and OUT/DEVICE.md, after every problem anew; problems of these files that are not
measured again stay.

GPU: bfloat16, CUDA events, cold cache, peak of the allocator. CPU: float32, implementations in turn, peak of
the resident memory in a process for each.
"""

from __future__ import annotations

import argparse
import gc
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import measure
import torch
from floor import known_for
from measure import BUDGET_S, TOLERANCE, Problem
from peers import Candidate, candidates, ours
from registry import REGISTRY
from report import LEGEND, Result, Row, markdown
from shapes import Entry
from store import earlier, path_for, write
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
MOST_REPEATS = {"cuda": 100, "cpu": 10}
LONGEST_NOTE = 160
HIGHER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 0, or 1 if an implementation disagreed, or 2 for a wrong argument."""
    args = parser().parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("run.py: --device cuda needs a GPU that this PyTorch can use; there is none", file=sys.stderr)
        return 2
    here = [entry for entry in REGISTRY if entry.device == device]
    wanted = args.only or [""]
    entries = [entry for entry in here if any(text in entry.name for text in wanted)]
    if not entries:
        names = ", ".join(entry.name for entry in here)
        print(
            f"run.py: no problem for {device} has {' or '.join(map(repr, wanted))} in its name; "
            f"there are {names}",
            file=sys.stderr,
        )
        return 2
    about = machine(device)
    print(f"{LEGEND}\n", flush=True)
    path = path_for(args.out, about["device"])
    before, new = earlier(path, about), list[Result]()
    for number, entry in enumerate(entries, 1):
        begun = time.perf_counter()
        print(f"[{number}/{len(entries)}] {entry.name}", end=" ", file=sys.stderr, flush=True)
        new.append(measured(entry, args.repeats or MOST_REPEATS[device], about["date"]))
        print(f"{time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        print(markdown(new[-1]), flush=True)
        write(path, about, [*before, *new])
    return int(any(row.disagrees for result in new for row in result.rows))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--only",
        metavar="TEXT",
        action="append",
        help="problems with TEXT in their name; may be given several times",
    )
    made.add_argument(
        "--repeats",
        type=positive_number,
        metavar="N",
        help=f"at most N repeats ({MOST_REPEATS['cuda']} on a GPU, {MOST_REPEATS['cpu']} on a CPU), or three "
        f"and what fits into {BUDGET_S['cuda']} s on a GPU, {BUDGET_S['cpu']:.0f} s on a CPU",
    )
    made.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is a GPU, else cpu")
    made.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FOLDER", help="default: results beside this script"
    )
    return made


def measured(entry: Entry, most: int, date: str) -> Result:
    """Every implementation of an entry: compared, timed at most `most` times, its memory taken."""
    rows: list[Row] = []
    agreeing: list[tuple[Row, Problem]] = []
    tensors = entry.tensors()
    dout = entry.gradient()
    truth = cache(lambda without: _truth(entry, tensors, dout, without))
    for name, candidate in candidates(entry).items():
        if isinstance(candidate, str):
            rows.append(Row(name, notes=[candidate]))
            continue
        row = Row(name, candidate.function)
        rows.append(row)
        problem = Problem(candidate.run, measure.leaves(tensors, candidate.without), dout)
        if _agrees(row, problem, candidate, truth):
            agreeing.append((row, problem))
    result = Result(entry, rows, date=date)
    (_measure_on_cuda if entry.device == "cuda" else _measure_on_cpu)(result, agreeing, most)
    if entry.device == "cuda":
        torch.compiler.reset()  # or torch gives up compiling one function for so many shapes
    return result


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU {_processor()}",
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _truth(entry: Entry, tensors: dict[str, Tensor], dout: Tensor, without: tuple[str, ...]) -> list[Tensor]:
    """Samples of the output and gradients of `eager` in twice the precision, without some tables."""
    high = HIGHER[entry.dtype]
    inputs = measure.leaves({name: x.to(high) for name, x in tensors.items()}, without)
    return measure.samples(Problem(ours(entry, "eager"), inputs, dout.to(high)).both())


def _agrees(
    row: Row, problem: Problem, candidate: Candidate, truth: Callable[[tuple[str, ...]], list[Tensor]]
) -> bool:
    """Whether it runs and, where its function is known here, gives the right numbers; or the row says why."""
    found = _attempt(row, lambda: measure.samples(problem.both()))
    if found is None or candidate.differs:
        return found is not None
    expected = _attempt(row, partial(truth, candidate.without))
    if expected is None:
        return False
    row.error = measure.error(found, expected)
    tolerance = TOLERANCE[problem.dout.dtype]
    row.disagrees = not row.error <= tolerance  # NaN disagrees
    if row.disagrees:
        row.notes.append(f"disagrees: error {row.error:.1e} over {tolerance:.0e}, not timed")
    return not row.disagrees


def _measure_on_cuda(result: Result, problems: Sequence[tuple[Row, Problem]], most: int) -> None:
    known = known_for(torch.cuda.get_device_name())
    forward, backward = result.floor_ms()
    less, more = (measure.copy_of(moved, "cuda") for moved in result.copied_bytes())
    result.copy = measure.cuda_times(less, most), measure.cuda_times(more, most)
    del less, more  # or the largest problems lack what they hold
    for row, problem in problems:
        row.forward = _attempt(row, partial(measure.cuda_times, problem.forward, most))
        row.both = _attempt(row, partial(measure.cuda_times, problem.both, most))
        row.memory = _attempt(row, partial(measure.cuda_memory, problem))
        if row.name == "triton" and known and row.forward and row.both:
            row.floor_share = (forward / row.forward.median, (forward + backward) / row.both.median)


def _measure_on_cpu(result: Result, problems: Sequence[tuple[Row, Problem]], most: int) -> None:
    less, more = (measure.copy_of(moved, "cpu") for moved in result.copied_bytes())
    forward = measure.cpu_times({row.name: problem.forward for row, problem in problems} | {"": less}, most)
    both = measure.cpu_times({row.name: problem.both for row, problem in problems} | {"": more}, most)
    result.copy = forward[""], both[""]
    for row, _ in problems:
        row.forward, row.both = forward[row.name], both[row.name]
        row.memory = _attempt(row, partial(measure.cpu_memory, result.entry, row.name))


def _attempt(row: Row, action: Callable[[], T]) -> T | None:
    """What the action gives, or None and a note in the row: no failure is hidden, none ends the run."""
    try:
        return action()
    except torch.OutOfMemoryError:
        row.notes.append("out of memory")
    except Exception as error:  # noqa: BLE001  another package may fail in any way
        first = next(iter(str(error).strip().splitlines()), "").replace("|", "/")
        row.notes.append(f"did not run: {type(error).__name__}: {first[:LONGEST_NOTE]}")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _processor() -> str:
    """The model, as in AMD EPYC."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def positive_number(text: str) -> int:
    """A command-line argument of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
