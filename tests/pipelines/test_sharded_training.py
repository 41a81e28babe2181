"""Training by command with sharded weights and activation checkpointing, against training without."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import time
from pathlib import Path
from types import ModuleType

import pytest

from medattn.data.phantom import write_phantoms
from medattn_pipelines.cli import main


def beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


torchrun = beside("test_torchrun")
discs = torchrun.discs
written, alone, together, require_same = (
    getattr(torchrun, name) for name in ("written", "alone", "together", "require_same")
)
IMAGES, VOLUMES, LAUNCHER, MODULE = (
    getattr(torchrun, name) for name in ("IMAGES", "VOLUMES", "LAUNCHER", "MODULE")
)
SHARDED = ["training.shard_weights=true", "training.checkpoint_activations=true"]
SYNCED = "training.sync_batch_norm=true"
SHAPE = ["training.steps=4", "training.validate_every=2", "training.save_every=2"]


def parts_of(run: Path) -> int:
    """Files of the checkpoint, one from each process that wrote it."""
    return len(list((run / "checkpoints/last").glob("*.distcp")))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_images_train_alike_with_sharded_weights(discs: Path, tmp_path: Path, world: int) -> None:
    alone(written(discs, tmp_path / "one"), *IMAGES, *SHAPE)
    run = tmp_path / "many"
    done = together(world, written(discs, run), *IMAGES, *SHAPE, *SHARDED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == done.stdout.count("report:") == 1, "one process speaks"
    assert "Warning" not in done.stderr
    assert parts_of(run) == world
    assert not list(run.rglob(".writing-*"))
    require_same(run, tmp_path / "one", "loss", "gradient_norm", "validation_top1")


def test_alone_sharding_and_checkpointing_change_no_bit(discs: Path, tmp_path: Path) -> None:
    """With running statistics and stochastic depth."""
    network = ["network.name=resnet26", "network.options={widths: [4, 8, 16, 32], drop_path: 0.5}"]
    shape = [*IMAGES, *network, "training.steps=2", "training.accumulate=1"]
    for name, more in (("plain", []), ("saving", SHARDED)):
        alone(written(discs, tmp_path / name), *shape, *more)
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("plain", "saving")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("field", ["shard_weights", "checkpoint_activations"])
@pytest.mark.parametrize("task", ["classification", "panoptic"])
def test_compiling_is_refused_beside_either(
    discs: Path, tmp_path: Path, field: str, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(discs, tmp_path / "run", task)
    assert main(["train", str(config), "training.compile=true", f"training.{field}=true"]) == 2
    assert f"torch.compile does not go with {field}" in capsys.readouterr().err


@pytest.mark.slow
def test_volumes_train_alike_with_sharded_weights(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "cases", cases=4, size=32, seed=1)
    shape = [*VOLUMES, "training.steps=4", "training.validate_every=2", "training.save_every=2"]
    alone(written(tmp_path / "cases", tmp_path / "one", "volumes"), *shape)
    done = together(2, written(tmp_path / "cases", tmp_path / "many", "volumes"), *shape, *SHARDED)
    assert done.returncode == 0, done.stderr
    assert parts_of(tmp_path / "many") == 2
    require_same(tmp_path / "many", tmp_path / "one", "loss", "gradient_norm", "validation_dice")


@pytest.mark.slow
def test_panoptic_trainings_are_alike_with_sharded_weights(tmp_path: Path) -> None:
    """Against as many processes that each have all weights."""
    panoptic = beside("test_panoptic_training")
    panoptic.write_scenes(tmp_path / "scenes", "train", 16, 0)
    panoptic.write_scenes(tmp_path / "scenes", "val", 4, 1)
    # Adam would make steps of the rounding that is all the gradient of a bias before a norm
    shape = [*panoptic.TINY, *SHAPE, "training.optimizer=sgd"]
    runs = [tmp_path / "whole", tmp_path / "sharded"]
    for run, more in zip(runs, ([], SHARDED), strict=True):
        done = together(2, panoptic.written(tmp_path / "scenes", run), *shape, *more)
        assert done.returncode == 0, done.stderr
    assert parts_of(runs[1]) == 2
    require_same(runs[1], runs[0], "loss", "gradient_norm", "validation_pq")


@pytest.mark.slow
def test_sharded_batch_norm_is_that_of_unsharded_processes(discs: Path, tmp_path: Path) -> None:
    """Statistics of each process's own images; the running ones are the main process's."""
    norms = ["network.name=resnet26", "network.options={widths: [4, 8, 16, 32]}"]
    shape = [*IMAGES, *norms, "training.steps=3", "training.validate_every=1", "training.optimizer=sgd"]
    runs = []
    for name, more in (("whole", []), ("sharded", SHARDED), ("synced", [*SHARDED, SYNCED])):
        runs.append(tmp_path / name)
        done = together(2, written(discs, runs[-1]), *shape, *more)
        assert done.returncode == 0, done.stderr
    require_same(runs[1], runs[0], "loss", "validation_top1")
    alone(written(discs, tmp_path / "one"), *shape)
    losses = [torchrun.logged(run, "loss") for run in (runs[2], tmp_path / "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_sharded_run_goes_on_in_other_numbers_of_processes(discs: Path, tmp_path: Path) -> None:
    """SIGTERM to two processes; four go on sharded, are ended too, and one process ends it alone."""
    shape = [*IMAGES, "training.steps=40", "training.validate_every=20", "training.save_every=1000"]
    run = tmp_path / "parts"
    config = written(discs, run)
    ended_after(2, 4, run, [str(config), *shape, *SHARDED])
    ended_after(4, 4, run, [str(config), *shape, *SHARDED, "--resume"])
    assert parts_of(run) == 4
    alone(config, *shape, "--resume")
    assert parts_of(run) == 1
    alone(written(discs, tmp_path / "whole"), *shape)
    require_same(run, tmp_path / "whole", "loss", "validation_top1")


def ended_after(world: int, steps: int, run: Path, arguments: list[str]) -> None:
    """Train in so many processes until torchrun gets SIGTERM, after some more steps."""
    metrics, waited = run / "metrics.jsonl", time.monotonic() + 200
    lines = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
    command = [*LAUNCHER, str(world), *MODULE, "train", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < lines + steps:
        assert time.monotonic() < waited
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert out.count("stopped by SIGTERM at step") == 1, err
    assert parts_of(run) == world


@pytest.mark.slow
def test_a_sharded_run_is_reproduced(discs: Path, tmp_path: Path) -> None:
    """To the bit, by as many processes; within rounding by one."""
    run = tmp_path / "run"
    assert together(2, written(discs, run), *IMAGES, *SHAPE, *SHARDED).returncode == 0
    reproduce = [*LAUNCHER, "2", *MODULE, "reproduce", str(run), "--output", str(tmp_path / "again")]
    done = subprocess.run(reproduce, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "equal to the bit" in done.stdout
    assert main(["reproduce", str(run), "--output", str(tmp_path / "one"), "--tolerance", "1e-4"]) == 0
