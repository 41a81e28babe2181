"""Training by command under torchrun against the same command in one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from medattn.data.phantom import write_phantoms
from medattn_pipelines.cli import main

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
MODULE = ["-m", "medattn_pipelines.cli"]
COMMON = [
    "data.workers=1",
    "run.tracking=false",
    "training.precision=fp32",
    "training.device=cpu",
    "training.log_every=1",
]
# without batch norm and dropout; with everything that has a memory, or is drawn for a whole batch
IMAGES = [
    *COMMON,
    "image_size=32",
    "network.name=eamlp_7",
    "network.options={dropout: 0}",
    "training.batch_size=8",
    "training.accumulate=2",
    "training.learning_rate=0.01",
    "training.ema_decay=0.9",
    "training.gradient_clip=1",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.randaugment_magnitude=9",
    "inference.image_size=32",
    "inference.crop_ratio=1",
    "inference.batch_size=4",
]
VOLUMES = [
    *COMMON,
    "data.spacing_mm=[10, 10, 10]",
    "data.patch_size=[16, 16, 16]",
    "data.validation=0.5",
    "network.options={widths: [4, 8], strides: [2]}",
    "training.batch_size=4",
    "training.optimizer=sgd",
    "training.learning_rate=0.05",
]


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs of two colours: twelve images to train on per class, and five to validate with."""
    root = tmp_path_factory.mktemp("discs")
    rng = np.random.default_rng(0)
    for part, number in (("train", 12), ("val", 5)):
        for wnid, colour in (("n01", "red"), ("n02", "lime")):
            (root / part / wnid).mkdir(parents=True)
            for name in range(number):
                image = Image.fromarray(rng.integers(0, 90, (32, 32, 3), np.uint8))
                ImageDraw.Draw(image).ellipse((4, 4, 20, 20), fill=colour)
                image.save(root / part / wnid / f"{name}.png")
    return root


def written(root: Path, run: Path, task: str = "classification") -> Path:
    path = run.parent / f"{run.name}.yaml"
    path.write_text(f"task: {task}\ndata: {{root: {root}}}\nrun: {{dir: {run}}}\n")
    return path


def alone(*arguments: str | Path) -> None:
    """The train command in this process."""
    assert main(["train", *map(str, arguments)]) == 0


def together(world: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The train command in so many processes of torchrun."""
    command = [*LAUNCHER, str(world), *MODULE, "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def logged(run: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[name]) for line in lines if name in line]
    assert len(dict(found)) == len(found), "no step stands twice"
    return dict(found)


def require_same(run: Path, other: Path, *names: str) -> None:
    """Losses and scores of all steps, and the weights of the model."""
    for name in names:
        assert logged(run, name) == pytest.approx(logged(other, name), rel=1e-5, abs=1e-5), name
    first, second = (load_file(folder / "model/model.safetensors") for folder in (run, other))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("world", "unreadable"), [(2, False), pytest.param(4, True, marks=pytest.mark.slow)])
def test_images_train_alike_in_any_number_of_processes(
    discs: Path, tmp_path: Path, world: int, unreadable: bool
) -> None:
    shape = ["training.steps=4", "training.validate_every=2", "training.save_every=2"]
    if unreadable:
        (discs / "train/n01/broken.png").write_bytes(b"no picture")
    alone(written(discs, tmp_path / "one"), *IMAGES, *shape)
    run = tmp_path / "many"
    done = together(world, written(discs, run), *IMAGES, *shape)
    (discs / "train/n01/broken.png").unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == done.stdout.count("report:") == 1, "one process speaks"
    assert ("broken.png" in done.stdout) == unreadable
    assert not list(run.rglob(".writing-*"))
    assert (run / "report/report.html").is_file()
    require_same(run, tmp_path / "one", "loss", "gradient_norm", "validation_top1")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_volumes_train_alike_in_any_number_of_processes(tmp_path: Path, world: int) -> None:
    write_phantoms(tmp_path / "cases", cases=4, size=32, seed=1)
    rhythm = ["training.steps=4", "training.validate_every=2"]
    alone(written(tmp_path / "cases", tmp_path / "one", "volumes"), *VOLUMES, *rhythm)
    config = written(tmp_path / "cases", tmp_path / "many", "volumes")
    done = together(world, config, *VOLUMES, *rhythm)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1
    require_same(tmp_path / "many", tmp_path / "one", "loss", "gradient_norm", "validation_dice")


@pytest.mark.slow
def test_synchronised_batch_norm_trains_alike_too(discs: Path, tmp_path: Path) -> None:
    norms = ["network.name=resnet26", "network.options={widths: [4, 8, 16, 32]}"]
    shape = [*norms, "training.steps=3", "training.validate_every=3", "training.sync_batch_norm=true"]
    alone(written(discs, tmp_path / "one"), *IMAGES, *shape)
    assert together(2, written(discs, tmp_path / "many"), *IMAGES, *shape).returncode == 0
    assert logged(tmp_path / "one", "loss") == pytest.approx(logged(tmp_path / "many", "loss"), rel=1e-4)


@pytest.mark.slow
def test_a_terminated_run_resumes_in_another_number_of_processes(discs: Path, tmp_path: Path) -> None:
    """SIGTERM to torchrun, as a scheduler sends it; then one process ends what two began."""
    shape = ["training.steps=40", "training.validate_every=20", "training.save_every=1000"]
    half = written(discs, tmp_path / "half")
    command = [*LAUNCHER, "2", *MODULE, "train", str(half), *IMAGES, *shape]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, waited = tmp_path / "half/metrics.jsonl", time.monotonic() + 200
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 3:
        assert time.monotonic() < waited
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, "torchrun's own code for a signal"
    assert out.count("stopped by SIGTERM at step") == 1, err
    stopped = len(logged(tmp_path / "half", "loss"))
    assert stopped < 40
    alone(half, *IMAGES, *shape, "--resume")
    alone(written(discs, tmp_path / "whole"), *IMAGES, *shape)
    require_same(tmp_path / "half", tmp_path / "whole", "loss", "validation_top1")
    assert together(2, half, *IMAGES, *shape, "training.steps=2", "--overwrite").returncode == 0
    assert len(logged(tmp_path / "half", "loss")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.lerning_rate=1", "lerning_rate"),
        ("training.batch_size=6", "expected a multiple of 4"),
        ("network.name=resnet62", "unknown network 'resnet62'"),
        ("data.validation=nowhere", "no such folder"),
    ],
)
def test_what_is_wrong_is_said_once(discs: Path, tmp_path: Path, override: str, sentence: str) -> None:
    """Whether the config, what the processes share, the network or the data is."""
    done = together(2, written(discs, tmp_path / "run"), *IMAGES, override)
    assert done.returncode == 1, "torchrun's own code"
    said = [line for line in done.stderr.splitlines() if line.startswith("medattn: error: ")]
    assert len(said) == 1, done.stderr
    assert sentence in said[0]
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0], "of torchrun alone"


@pytest.mark.slow
def test_the_command_itself_can_be_started(discs: Path, tmp_path: Path) -> None:
    """As the README has it: torchrun ... $(which medattn) train CONFIG."""
    command = Path(sys.executable).with_name("medattn")
    if not command.exists():
        pytest.skip("medattn is not installed beside this interpreter")
    arguments = [str(written(discs, tmp_path / "run")), *IMAGES, "training.steps=1"]
    launched = [*LAUNCHER, "2", str(command), "train", *arguments]
    done = subprocess.run(
        launched, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/model/model.json").is_file()
