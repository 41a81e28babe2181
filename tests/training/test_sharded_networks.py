"""Every family of networks computes the same when its weights are sharded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("sharded_networks_worker.py")


@pytest.mark.slow
def test_every_family_has_the_gradients_of_the_whole_network(tmp_path: Path) -> None:
    """None passes by a block's own call, or writes into what a block returned, which loses gradients."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(WORKER), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        differences = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(differences) > 40
        assert {name: value for name, value in differences.items() if not value < 1e-5} == {}
