"""A training killed with SIGKILL at any moment goes on with --resume and ends as if it had not been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from medattn.data.phantom import write_phantoms
from medattn.io import read_volume

HERE = Path(__file__).resolve().parent
WALL_CLOCK = ("time", "step_seconds", "data_wait_share", "seconds_left")
COMMON = [
    "run.tracking=false",
    "data.workers=1",
    "training.precision=fp32",
    "training.device=cpu",
    "training.steps=14",
    "training.save_every=4",
    "training.validate_every=5",  # so that validations, checkpoints and lines of the journal take turns
    "training.log_every=3",
]
TINY = {
    "volumes": [
        "data.spacing_mm=[10, 10, 10]",
        "data.patch_size=[16, 16, 16]",
        "network.name=unet",
        "network.options={widths: [4, 8], strides: [2]}",
    ],
    "classification": [
        "image_size=32",
        "network.name=resnet26",
        "network.options={widths: [4, 8, 16, 32]}",
        "data.workers=0",
        "training.batch_size=6",
        "training.learning_rate=0.05",
        "training.warmup_epochs=0",
        "inference.image_size=32",
        "inference.batch_size=8",
    ],
}


@dataclass
class Server:
    """Starts commands quickly; see train_server.py."""

    process: subprocess.Popen[str]
    log: Path

    def start(
        self,
        argv: list[str],
        folder: Path,
        *,
        kill: int | None = None,
        at: str = "",
        after: float | None = None,
    ) -> None:
        """Start a command, which is killed at change number `kill` of `at`, or after so many seconds."""
        assert self.process.stdin is not None
        request = {"argv": argv, "folder": str(folder), "log": str(self.log), "kill": kill, "at": at}
        request["after"] = after
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def wait(self) -> tuple[int, int]:
        """Exit code, negative for a signal, and the number of changes."""
        answer = self._answer()
        return answer["code"], answer["changes"]

    def _answer(self) -> dict[str, int]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server died"
        answer: dict[str, int] = json.loads(line)
        return answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "train_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    yield Server(process, folder / "log")
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_phantoms(root / "volumes", cases=3, size=32, seed=1)
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for number, wnid in enumerate(("n01", "n02")):
            folder = root / "classification" / split / wnid
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3)).astype(np.uint8)
                pixels[..., number] += 100
                Image.fromarray(pixels).save(folder / f"{split}_{wnid}_{index}.png")
    return root


def command(task: str, data: Path, run: Path, *overrides: str) -> list[str]:
    path = run.parent / f"{run.name}.yaml"
    path.write_text(f"task: {task}\ndata: {{root: {data / task}}}\nrun: {{dir: {run}}}\n")
    return ["train", str(path), *COMMON, *TINY[task], *overrides]


def outcome(run: Path) -> dict[str, Any]:
    """All that must be equal to the bit, clock times aside."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    card = json.loads((run / "model/model.json").read_text())
    card["provenance"].pop("seconds")
    return {
        "weights": (run / "model/model.safetensors").read_bytes(),
        "best": (run / "checkpoints/best.safetensors").read_bytes(),
        "metrics": [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines],
        "card": card,
        "table": (run / "report/metrics.csv").read_bytes(),
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
    }


def require_sound(run: Path) -> None:
    """No file that has its final name is a torn one, at any moment."""
    if not run.exists():
        return
    files = [path for path in run.rglob("*") if path.is_file()]
    hidden = {path for path in files if any(p.startswith(".") for p in path.relative_to(run).parts[:-1])}
    for path in set(files) - hidden:
        if path.name.startswith("."):
            continue
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name.endswith((".nii.gz", ".seg.nrrd")):
            read_volume(path)
    if (run / "model").exists():
        assert {path.name for path in (run / "model").iterdir()} == {"model.json", "model.safetensors"}
    if (run / "metrics.jsonl").exists():
        *lines, _ = (run / "metrics.jsonl").read_text().split("\n")
        assert all("step" in json.loads(line) for line in lines)
    last = [run / "checkpoints" / name for name in ("last", ".previous-last")]
    if (found := next((path for path in last if path.exists()), None)) is not None:
        assert (found / ".metadata").is_file()
        assert (found / "__0_0.distcp").is_file()
    temporary = [path for path in run.rglob(".*") if path.name not in (".metadata", "__0_0.distcp")]
    assert len(temporary) <= 8, temporary


def test_the_server_counts_changes_before_they_are_made(server: Server, tmp_path: Path) -> None:
    """Killed at the first change of a known command, it has not been made."""
    server.start(["phantom", str(tmp_path / "out"), "--cases", "2", "--size", "32"], tmp_path, kill=1)
    assert server.wait() == (-signal.SIGKILL, 1)
    assert not (tmp_path / "out").exists()


Uninterrupted = tuple[dict[str, Any], int, float]
Whole = Callable[[str], Uninterrupted]


@pytest.fixture(scope="module")
def whole(server: Server, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Of a task: what an uninterrupted training comes to, how many changes it made, and how long it took."""

    @cache
    def train(task: str) -> Uninterrupted:
        run = tmp_path_factory.mktemp(f"whole-{task}") / "run"
        begun = time.monotonic()
        server.start(command(task, data, run), run)
        code, changes = server.wait()
        assert code == 0, server.log.read_text()
        return outcome(run), changes, time.monotonic() - begun

    return train


def kill_and_resume(
    server: Server, task: str, data: Path, run: Path, whole: Uninterrupted, kills: int, seed: int
) -> int:
    """Kill one run again and again, then let it end; returns how many kills there were.

    Of three kills two come before a change of a file, any of them, and one after any time.
    """
    rng = random.Random(seed)
    expected, changes, seconds = whole
    arguments, done = command(task, data, run), 0
    while done < kills:
        resume = ["--resume"] if run.exists() else []
        if rng.random() < 2 / 3:
            server.start([*arguments, *resume], run, kill=rng.randrange(1, changes))
        else:
            server.start([*arguments, *resume], run, after=rng.uniform(0, seconds))
        code, _ = server.wait()
        require_sound(run)
        if code == 0:  # it was complete before the kill came: begin anew
            assert outcome(run) == expected
            run = run.with_name(f"{run.name}-")
            arguments = command(task, data, run)
            continue
        assert code == -signal.SIGKILL, server.log.read_text()
        done += 1
    server.start([*arguments, *(["--resume"] if run.exists() else [])], run)
    assert server.wait()[0] == 0, server.log.read_text()
    assert outcome(run) == expected
    require_sound(run)
    return done


# moments by the file that is about to change, in the order in which a training comes to them
MOMENTS = (
    "/plan.json",
    "/metrics.jsonl",
    "/best.safetensors",
    "/checkpoints/last",  # the new one takes its place
    "/.previous-last",  # the old one moves aside
    "/.writing-last/.metadata",  # half of a checkpoint is there
    "/.writing-model/",
    "/model",
    "/predictions/labels.json",
    "/predictions/report.json",
    "/report",
    "/report/metrics.json",
    "/report/report.html",
)


def kill_at(
    server: Server, data: Path, run: Path, moments: tuple[str, ...], expected: dict[str, Any]
) -> None:
    """Kill a training on volumes at each of these moments in turn, resuming it in between."""
    arguments = command("volumes", data, run)
    for moment in moments:
        resume = ["--resume"] if run.exists() else []
        server.start(
            [*arguments, *resume], run, kill=1, at=f"{run}{moment}" if moment == "/model" else moment
        )
        assert server.wait()[0] == -signal.SIGKILL, (moment, server.log.read_text())
        require_sound(run)
    server.start([*arguments, "--resume"], run)
    assert server.wait()[0] == 0, server.log.read_text()
    assert outcome(run) == expected


def test_four_kills_leave_no_trace(server: Server, data: Path, tmp_path: Path, whole: Whole) -> None:
    kill_at(
        server,
        data,
        tmp_path / "run",
        ("/best.safetensors", "/checkpoints/last", "/model", "/report/report.html"),
        whole("volumes")[0],
    )


@pytest.mark.slow
def test_kills_at_every_stage_leave_no_trace(
    server: Server, data: Path, tmp_path: Path, whole: Whole
) -> None:
    kill_at(server, data, tmp_path / "run", MOMENTS, whole("volumes")[0])


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kills"), [("volumes", 25), ("classification", 25)])
def test_kills_at_random_moments_leave_no_trace(
    server: Server, data: Path, tmp_path: Path, whole: Whole, task: str, kills: int
) -> None:
    done = 0
    while done < kills:
        done += kill_and_resume(server, task, data, tmp_path / f"run{done}", whole(task), 5, seed=done)
    assert done >= kills
