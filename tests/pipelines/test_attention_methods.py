"""The comparison of attention methods, end to end on practice cases: what its table says is what was run."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from medattn_pipelines.cli import main

SCRIPT = Path(__file__).parents[2] / "pipelines/benchmarks/attention_methods.py"
CONFIG = Path(__file__).parents[2] / "configs/hn_ct.yaml"


def compare(data: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    overrides = [f"data.root={data}", "training.steps=2", "training.max_minutes=null", "run.tracking=false"]
    small = ["data.spacing_mm=[6, 6, 6]", "data.patch_size=[16, 16, 16]", "inference.flips=false"]
    command = [sys.executable, str(SCRIPT), str(CONFIG), str(out), *overrides, *small, "--repeats", "2"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_method_has_a_row_against_the_first_and_complete_runs_are_kept(tmp_path: Path) -> None:
    assert main(["phantom", str(tmp_path / "data"), "--cases", "4", "--size", "48"]) == 0
    methods = ["--methods", "unet", "unet_block", "--seeds", "0", "1"]
    done = compare(tmp_path / "data", tmp_path / "out", *methods)
    assert done.returncode == 0, done.stderr
    header, plain, block = csv.reader((tmp_path / "out/methods.csv").read_text().splitlines())
    assert (plain[0], block[0]) == ("unet", "unet_block")
    plain_by, block_by = dict(zip(header, plain, strict=True)), dict(zip(header, block, strict=True))
    assert plain_by["parameters"].endswith("(1.000)")
    assert float(block_by["GFLOPs a patch"].split()[0]) >= float(plain_by["GFLOPs a patch"].split()[0])
    means = [
        json.loads((tmp_path / f"out/unet_block-seed{seed}/report/metrics.json").read_text())["mean"]["dice"]
        for seed in (0, 1)
    ]
    expected = sum(mean["mean"] for mean in means) / 2
    assert float(block_by["mean Dice"].split()[0]) == pytest.approx(expected, abs=5e-4)

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/model/model.json")}
    again = compare(tmp_path / "data", tmp_path / "out", *methods)
    assert again.returncode == 0, again.stderr
    assert written == {path: path.stat().st_mtime_ns for path in written}
    other = compare(tmp_path / "data", tmp_path / "out", "training.learning_rate=1e-4", *methods)
    assert (other.returncode, "trained with another config" in other.stderr) == (2, True)


def test_a_method_that_does_not_exist_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    done = compare(tmp_path, tmp_path / "out", "--methods", "unet", "unet_blok")
    assert done.returncode == 2
    assert "did you mean 'unet_block'?" in done.stderr
    assert not (tmp_path / "out").exists()
