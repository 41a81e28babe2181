"""What a training says and keeps when disks are full or read-only, clocks jump, or the data change."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import medattn_pipelines.volumes as volumes
from medattn.data.phantom import write_phantoms
from medattn.errors import InputError
from medattn.io import Volume, read_volume, write_volume
from medattn.training.checkpoint_reading import PlainReader
from medattn_pipelines.cli import main
from medattn_pipelines.configfile import load_any
from medattn_pipelines.datawatch import watch_data

TINY = [
    "data.spacing_mm=[10, 10, 10]",
    "data.patch_size=[16, 16, 16]",
    "data.workers=1",
    "network.name=unet",
    "network.options={widths: [4, 8], strides: [2]}",
    "training.precision=fp32",
    "training.device=cpu",
    "training.steps=6",
    "training.log_every=1",
    "training.save_every=2",
    "training.validate_every=3",
    "run.tracking=false",
]
Train = Callable[..., int]


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    write_phantoms(tmp_path / "cases", cases=3, size=32, seed=1)
    return tmp_path / "cases"


@pytest.fixture
def train(cases: Path, tmp_path: Path) -> Train:
    """Trains into `run` by the command line; returns the exit code."""

    def command(run: Path, *arguments: str) -> int:
        path = tmp_path / "tiny.yaml"
        store = tmp_path / "prepared"
        path.write_text(f"data: {{root: {cases}, cache: {store}}}\nrun: {{dir: {run}}}\n")
        return main(["train", str(path), *TINY, *arguments])

    return command


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Have something happen while step `step` (from 1) of this process's next training computes its loss."""
    original, seen = volumes.loss_function, [0]

    def counting(*arguments: Any) -> Any:
        loss_of = original(*arguments)

        def loss(network: torch.nn.Module, batch: Any) -> torch.Tensor:
            seen[0] += 1
            if seen[0] == step:
                act()
            return loss_of(network, batch)

        return loss

    monkeypatch.setattr(volumes, "loss_function", counting)


def step_of(checkpoint: Path) -> int:
    """That of a checkpoint, which is whole: all files that its table names are as long as it says."""
    reader = PlainReader(checkpoint)
    table = reader.read_metadata()
    for stored in table.storage_data.values():
        assert (checkpoint / stored.relative_path).stat().st_size >= stored.offset + stored.length
    (state,) = [value for key, value in table.storage_data.items() if key.fqn == "state"]
    with (checkpoint / state.relative_path).open("rb") as file:
        file.seek(state.offset)
        step: int = json.loads(torch.load(io.BytesIO(file.read(state.length)), weights_only=True))["step"]
        return step


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1, err
    return lines[0]


def test_files_that_may_not_grow_keep_the_last_checkpoint(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files fails every larger write, as a full disk or a quota does."""
    run, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1])))
    try:
        assert train(run) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(run) in only_error(capsys)
    assert step_of(run / "checkpoints/last") == 2
    assert train(run, "--resume") == 0
    assert not list(run.rglob(".writing-*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(path)], capture_output=True
    )
    if done.returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_and_then_a_read_only_disk(
    train: Train, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"

    def fill() -> None:
        free = os.statvfs(small_disk)
        ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - 8192)))

    at_step(monkeypatch, 3, fill)
    assert train(run) == 2
    assert "space" in (said := only_error(capsys)) or "disk is full" in said
    assert step_of(run / "checkpoints/last") == 2
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert train(run, "--resume") == 2
    assert "read-only" in only_error(capsys)
    assert step_of(run / "checkpoints/last") == 2
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert train(run, "--resume") == 0


def test_a_clock_that_jumps_changes_nothing(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By years, back and forth, at every look; and with a limit that such a jump would be beyond."""
    assert train(tmp_path / "steady") == 0
    rng = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + rng.uniform(-1e9, 1e9))
    assert train(tmp_path / "jumping", "training.max_minutes=600") == 0
    assert train(tmp_path / "other") == 0
    steady, other = (load_file(tmp_path / name / "model/model.safetensors") for name in ("steady", "other"))
    assert all(torch.equal(steady[name], other[name]) for name in steady)
    assert (tmp_path / "jumping/metrics.jsonl").read_text().count("loss") == 6


def test_data_that_change_under_a_training_stop_it(
    train: Train,
    cases: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before the next validation; and a --resume on them is refused as well, until they are back."""
    run, path = tmp_path / "run", sorted(cases.glob("*/label.nii.gz"))[0]
    before = path.read_bytes()

    def change() -> None:
        volume = read_volume(path)
        array = volume.array.copy()
        array[:2, :2, :2] = 1
        write_volume(path, Volume(array, volume.geometry))

    at_step(monkeypatch, 3, change)
    assert train(run) == 2
    assert f"{path}: changed since the training began" in only_error(capsys)
    assert step_of(run / "checkpoints/last") == 2
    assert train(run, "--resume") == 2
    assert f"not what the run in {run} began with" in (said := only_error(capsys))
    assert f"changed last: {path.relative_to(cases)}" in said
    assert step_of(run / "checkpoints/last") == 2
    path.write_bytes(before)
    assert train(run, "--resume") == 0


def picture(path: Path, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((side, side), 50).convert("RGB").save(path)


@pytest.mark.parametrize("task", ["classification", "panoptic"])
def test_images_that_come_go_or_change_are_noticed(tmp_path: Path, task: str) -> None:
    root = tmp_path / "images"
    if task == "classification":
        image, folders = root / "train/n01/a.png", ("train/n01", "train/n02", "val/n01", "val/n02")
    else:
        image, folders = (
            root / "train2017/a.png",
            ("train2017", "val2017", "annotations/panoptic_train2017", "annotations/panoptic_val2017"),
        )
        for split in ("train", "val"):
            (root / "annotations").mkdir(parents=True, exist_ok=True)
            (root / f"annotations/panoptic_{split}2017.json").write_text("{}")
    for folder in folders:
        picture(root / folder / "a.png")
    source = tmp_path / "c.yaml"
    source.write_text(f"task: {task}\ndata: {{root: {root}}}\nrun: {{dir: {tmp_path / 'run'}}}\n")
    config = load_any(source)
    watch = watch_data(config, tmp_path / "run", resume=False)
    digest = watch.data_sets[0].digest
    watch.check(thorough=True)
    picture(image, 16)
    with pytest.raises(InputError, match=r"changed since the training began; the last checkpoint is intact"):
        watch.check(thorough=True)
    assert watch_data(config, tmp_path / "run", resume=False).data_sets[0].digest != digest
    picture(image, 8)
    (image.parent / "new.png").write_bytes(b"")
    with pytest.raises(InputError, match="changed since the training began"):
        watch.check()
    (image.parent / "new.png").unlink()
    picture(image.parent / "deeper/a.png")
    with pytest.raises(InputError, match=r"deeper: is new since the training began"):
        watch.check()


def test_images_of_another_listing_are_not_resumed_on(tmp_path: Path, capsys: Any) -> None:
    root, run = tmp_path / "images", tmp_path / "run"
    for split in ("train", "val"):
        for wnid in ("n01", "n02"):
            for number in range(3):
                picture(root / split / wnid / f"{number}.png", 32)
    source = tmp_path / "c.yaml"
    source.write_text(f"task: classification\ndata: {{root: {root}}}\nrun: {{dir: {run}}}\n")
    small = "network.options={widths: [4, 8, 16, 32]}"
    shape = ["image_size=32", "network.name=resnet26", small, "inference.image_size=32"]
    rhythm = ["training.steps=2", "training.batch_size=4", "data.workers=0", "training.device=cpu"]
    command = ["train", str(source), *shape, *rhythm, "training.precision=fp32", "run.tracking=false"]
    assert main(command) == 0
    capsys.readouterr()
    picture(root / "train/n01/later.png", 32)
    assert main([*command, "training.steps=4", "--resume"]) == 2
    assert f"{root}: not what the run in {run} began with" in (said := only_error(capsys))
    assert "changed last: train/n01" in said
    assert step_of(run / "checkpoints/last") == 2
