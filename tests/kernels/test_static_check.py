"""What the compilers make of the Triton kernels, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is there on Linux only")


def test_kernels_compile_for_a_gpu_without_spills() -> None:
    """The smallest set of `kernels/benchmarks/static_check.py`: no local memory, tensor cores in use."""
    script = Path(__file__).parents[2] / "kernels/benchmarks/static_check.py"
    done = subprocess.run([sys.executable, script, "--smallest"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| axial ") == 4
    assert done.stdout.count("| block ") == 13
    assert done.stdout.count("| crosscov ") == 6
    assert done.stdout.count("| lambda ") == 10
    assert done.stdout.count("| lambda pairs ") == 4
