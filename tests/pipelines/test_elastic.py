"""Trainings under torchrun whose processes are killed: torchrun starts them again, and they go on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STANDALONE = [*TORCHRUN, "--standalone", "--max-restarts", "3"]
WALL_CLOCK = ("time", "step_seconds", "data_wait_share", "seconds_left")
STEPS = 24
TINY = [
    "image_size=32",
    "network.name=eamlp_7",
    "network.options={dropout: 0}",
    "run.tracking=false",
    "data.workers=0",
    "training.precision=fp32",
    "training.device=cpu",
    f"training.steps={STEPS}",
    "training.batch_size=4",
    "training.learning_rate=0.01",
    "training.save_every=5",
    "training.validate_every=8",
    "training.log_every=1",
    "inference.image_size=32",
    "inference.crop_ratio=1",
    "inference.batch_size=4",
]


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two colours: eight to train on per class, and two to validate with."""
    root = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for part, number in (("train", 8), ("val", 2)):
        for colour, wnid in enumerate(("n01", "n02")):
            (root / part / wnid).mkdir(parents=True)
            for name in range(number):
                pixels = rng.integers(0, 120, (32, 32, 3)).astype(np.uint8)
                pixels[..., colour] += 100
                Image.fromarray(pixels).save(root / part / wnid / f"{name}.png")
    return root


def training(root: Path, run: Path, *more: str) -> list[str]:
    """The train command, as a module for torchrun."""
    config = run.parent / f"{run.name}.yaml"
    config.write_text(f"task: classification\ndata: {{root: {root}}}\nrun: {{dir: {run}}}\n")
    return ["-m", "medattn_pipelines.cli", "train", str(config), *TINY, *more]


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command, its output in one pipe, with a session of its own that ends with the block."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        for number in (process.pid, *workers(process).values()):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.communicate()


def workers(agent: subprocess.Popen[str]) -> dict[int, int]:
    """Process number by rank, of those that a torchrun has started and that run."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_text().split("\0") if parent == agent.pid else []
        except OSError:  # it has ended meanwhile
            continue
        ranks = [int(variable[5:]) for variable in variables if variable.startswith("RANK=")]
        found |= dict.fromkeys(ranks, int(folder.name))
    return found


def wait_for(what: Callable[[], object], *processes: subprocess.Popen[str]) -> None:
    """Until something is so, while all these run."""
    waited = time.monotonic() + 120
    while not what():
        assert time.monotonic() < waited
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in found]


def reached(run: Path, step: int) -> bool:
    return any(line["step"] >= step for line in metrics(run))


def outcome(run: Path) -> dict[str, Any]:
    """What must be equal to the bit."""
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == list(range(1, STEPS + 1)), "no step is missing, none stands twice"
    return {
        "weights": (run / "model/model.safetensors").read_bytes(),
        "best": (run / "checkpoints/best.safetensors").read_bytes(),
        "metrics": metrics(run),
        "predictions": (run / "predictions/predictions.csv").read_bytes(),
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
    }


@pytest.fixture(scope="module")
def whole(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of an uninterrupted training of two processes."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run([*STANDALONE, "--nproc-per-node", "2", *training(squares, run)], check=False)
    assert done.returncode == 0
    return outcome(run)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_is_started_again_and_nothing_shows(
    squares: Path, tmp_path: Path, whole: dict[str, Any], rank: int
) -> None:
    """With --overwrite, which the restart must not repeat, over a run of another time."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    (run / "old").touch()
    command = [*STANDALONE, "--nproc-per-node", "2", *training(squares, run, "--overwrite")]
    with started(command) as process:
        wait_for(lambda: reached(run, 7), process)
        os.kill(workers(process)[rank], signal.SIGKILL)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert out.count("torchrun started this training again; it goes on from its last checkpoint") == 1
    assert outcome(run) == whole
    assert not list(run.rglob(".writing-*"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_while_it_predicts_for_the_report_it_does_that_again(
    squares: Path, tmp_path: Path, whole: dict[str, Any], rank: int
) -> None:
    run = tmp_path / "run"
    command = [*STANDALONE, "--nproc-per-node", "2", *training(squares, run)]
    with started(command) as process:
        wait_for((run / "model").is_dir, process)
        os.kill(workers(process)[rank], signal.SIGKILL)
        assert not (run / "report").exists()
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert out.count("torchrun started this training again") == 1
    assert outcome(run) == whole


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_it_starts_anew(
    squares: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    command = [*STANDALONE, "--nproc-per-node", "2", *training(squares, run)]
    with started(command) as process:
        wait_for(lambda: len(workers(process)) == 2, process)
        os.kill(workers(process)[0], signal.SIGKILL)  # while it imports
        wait_for(lambda: reached(run, 2), process)
        os.kill(workers(process)[0], signal.SIGKILL)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert out.count("torchrun started this training again") == 1
    assert outcome(run) == whole


@pytest.mark.slow
def test_a_restart_takes_no_run_that_another_start_made(
    squares: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    """It is refused at each attempt, in one sentence; with --resume or --overwrite it is taken."""
    run = tmp_path / "run"
    command = [*STANDALONE, "--max-restarts", "1", "--nproc-per-node", "2", *training(squares, run)]
    assert subprocess.run([*command, "training.steps=6"], check=False).returncode == 0
    before = (run / "metrics.jsonl").read_bytes()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("medattn: error: ")]
    assert len(said) == 2, "the start and one restart"
    assert all("this run exists; continue it with --resume" in line for line in said)
    assert (run / "metrics.jsonl").read_bytes() == before
    with started([*command, "--overwrite"]) as process:
        wait_for(lambda: len(workers(process)) == 2, process)
        os.kill(workers(process)[1], signal.SIGKILL)  # nothing is overwritten yet: the restart does it
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "started this training again" not in out
    assert outcome(run) == whole


@pytest.mark.slow
def test_a_mistake_is_told_once_per_attempt(squares: Path, tmp_path: Path) -> None:
    command = [*STANDALONE, "--nproc-per-node", "2", *training(squares, tmp_path / "run")]
    done = subprocess.run([*command, "training.lerning_rate=1"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("medattn: error: ") == done.stderr.count("did you mean") == 4


@pytest.mark.slow
def test_sigterm_saves_and_ends_without_a_restart(
    squares: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    command = [*STANDALONE, "--nproc-per-node", "2", *training(squares, run)]
    with started(command) as process:
        wait_for(lambda: reached(run, 3), process)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out.count("stopped by SIGTERM at step") == 1, out
    assert "started this training again" not in out
    assert len(metrics(run)) < STEPS
    done = subprocess.run([*command, "--resume"], check=False)
    assert done.returncode == 0
    assert outcome(run) == whole


@pytest.mark.slow
def test_a_machine_that_goes_away_leaves_the_training_to_the_other(squares: Path, tmp_path: Path) -> None:
    """Two torchruns stand for two machines; one is killed with its process, the other goes on alone."""
    port = free_port()
    run = tmp_path / "run"
    command = [*TORCHRUN, "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"]
    command += ["--rdzv-backend", "c10d", "--rdzv-id", "a", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    # the first holds the rendezvous, waits for the second to come, and soon notices that it is gone
    conf = "last_call_timeout=20,keep_alive_interval=1,keep_alive_max_attempt=2,is_host="
    agents = [[*command, "--rdzv-conf", conf + is_host, *training(squares, run)] for is_host in "10"]
    with started(agents[0]) as first, started(agents[1]) as second:
        wait_for(lambda: reached(run, 7), first, second)
        for number in (second.pid, *workers(second).values()):
            os.kill(number, signal.SIGKILL)
        out, _ = first.communicate(timeout=200)
    assert first.returncode == 0, out
    assert "goes on from its last checkpoint" in out
    alone = tmp_path / "alone"
    assert subprocess.run([sys.executable, *training(squares, alone)], check=False).returncode == 0
    losses = [{line["step"]: line["loss"] for line in metrics(r) if "loss" in line} for r in (run, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-5)
    one, other = (load_file(folder / "model/model.safetensors") for folder in (run, alone))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])
