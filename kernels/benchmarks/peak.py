"""Peak memory of one forward and backward pass on a CPU, in a process that does nothing else.

    MALLOC_MMAP_THRESHOLD_=65536 python kernels/benchmarks/peak.py ENTRY CANDIDATE

ENTRY: its fields as JSON. Prints the bytes as JSON. Called once per implementation: the kernel's high-water
mark of resident memory is reset when inputs and the output's gradient exist and all code has run once, on a
small problem, or on the same where code is compiled for its shapes. Linux only.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from measure import Memory, Problem, leaves
from peers import Candidate, candidates
from shapes import Entry, from_plain

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def problem(entry: Entry, name: str) -> Problem:
    """The candidate on the entry's tensors."""
    candidate = candidates(entry)[name]
    assert isinstance(candidate, Candidate)
    inputs = leaves(entry.tensors(), candidate.without)
    return Problem(candidate.run, inputs, entry.gradient())


def measured(entry: Entry, name: str) -> Memory:
    """Of the candidate on the entry, after its code has run once."""
    real = problem(entry, name)
    (real if name == "compiled" else problem(entry.small(), name)).both()
    RESET.write_text("5")  # the high-water mark becomes what is resident now
    before = _status("VmRSS")
    results = real.both()
    return real.memory(results, _status("VmHWM") - before)


def _status(field: str) -> int:
    """A number of /proc/self/status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(json.dumps(asdict(measured(from_plain(json.loads(sys.argv[1])), sys.argv[2]))))
