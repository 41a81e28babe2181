"""Training, prediction and evaluation of an image classifier end to end, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import medattn_pipelines.classification as classification
from medattn.errors import InputError
from medattn_pipelines.classification import Trained, distillation_loss, train
from medattn_pipelines.cli import main
from medattn_pipelines.configfile import load_any
from medattn_pipelines.imageconfig import ImageConfig

SHAPES = {"n01": "red", "n02": "lime", "n03": "blue"}
SMALL = "{widths: [4, 8, 16, 32]}"  # ResNet-26 of 58 thousand parameters
TINY = [
    "image_size=32",
    "network.name=resnet26",
    f"network.options={SMALL}",
    "data.workers=1",
    "run.tracking=false",
    "training.steps=12",
    "training.batch_size=12",
    "training.learning_rate=0.05",
    "training.warmup_epochs=0",
    "training.precision=fp32",
    "training.device=cpu",
    "training.log_every=1",
    "inference.image_size=32",
    "inference.crop_ratio=1",
    "inference.batch_size=8",
]
# a batch sees the images as they are, whatever their place in it
UNCHANGED = ["augment.scale_range=[1, 1]", "augment.ratio_range=[1, 1]", "augment.flip_probability=0"]


def write_shapes(folder: Path, per_class: int, seed: int) -> None:
    """Discs of three colours, at random places on noise."""
    rng = np.random.default_rng(seed)
    for wnid, colour in SHAPES.items():
        (folder / wnid).mkdir(parents=True)
        for number in range(per_class):
            image = Image.fromarray(rng.integers(0, 90, (32, 32, 3), np.uint8))
            x, y = rng.integers(0, 16, 2).tolist()
            ImageDraw.Draw(image).ellipse((x, y, x + 15, y + 15), fill=colour)
            image.save(folder / wnid / f"{seed}_{wnid}_{number}.png")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images to train on per class, and four to validate with."""
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root / "train", 12, 0)
    write_shapes(root / "val", 4, 1)
    return root


def written(root: Path, run: Path) -> Path:
    path = run.parent / f"{run.name}.yaml"
    path.write_text(f"task: classification\ndata: {{root: {root}}}\nrun: {{dir: {run}}}\n")
    return path


def config(root: Path, run: Path, *overrides: str) -> ImageConfig:
    found = load_any(written(root, run), [*TINY, *overrides])
    assert isinstance(found, ImageConfig)
    return found


def weights(done: Trained) -> dict[str, torch.Tensor]:
    return load_file(done.run / "model/model.safetensors")


def logged(run: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def test_train_predict_and_evaluate_by_command(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    precision = "training.precision=auto"  # that of predict
    rhythm = ("training.steps=40", "training.validate_every=20", "training.save_every=40")
    arguments = [*TINY, *UNCHANGED, *rhythm, precision]
    assert main(["train", str(written(shapes, run)), *arguments]) == 0
    assert "top-1" in capsys.readouterr().out
    trained = json.loads((run / "report/metrics.json").read_text())
    assert (trained["n"], trained["top5"]) == (12, 1.0)
    assert trained["top1"] >= 0.75, "three colours"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "model/model.json",
        "report/report.html",
        "report/metrics.csv",
    ):
        assert (run / name).is_file(), name
    assert not list(run.rglob(".writing-*"))

    assert (
        main(["predict", str(run / "model"), str(shapes / "val"), "--output", str(out), "--device", "cpu"])
        == 0
    )
    for prediction in (out, run / "predictions"):
        report = ["--reference", str(shapes / "val"), "--output", str(tmp_path / "report")]
        assert main(["evaluate", "--task", "classification", "--prediction", str(prediction), *report]) == 0
        again = json.loads((tmp_path / "report/metrics.json").read_text())
        assert (again["top1"], again["confusions"]) == (trained["top1"], trained["confusions"])
    assert main(["train", str(written(shapes, run)), *arguments]) == 2
    assert "this run exists" in capsys.readouterr().err


def stop_at(settings: ImageConfig, step: int) -> None:
    """Train in this process and send it SIGTERM while step `step` runs."""
    original = classification.loss_function

    def counting(*arguments: object) -> Callable[..., torch.Tensor]:
        loss_of, seen = original(*arguments), [0]  # type: ignore[arg-type]

        def loss(network: torch.nn.Module, batch: object) -> torch.Tensor:
            seen[0] += 1
            if seen[0] == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss_of(network, batch)  # type: ignore[arg-type]

        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classification, "loss_function", counting)
        done = train(settings)
    assert (done.reason, done.step, done.evaluation) == ("SIGTERM", step, None)


def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(shapes: Path, tmp_path: Path) -> None:
    """With all that is random and all that has a memory: augmentation, mixing, averaged weights, momentum."""
    overrides = (
        *("training.ema_decay=0.9", "training.steps=8", "training.validate_every=4"),
        *("augment.mixup=0.8", "augment.cutmix=1.0", "augment.randaugment_magnitude=9"),
        *("augment.erase_probability=0.25", "augment.repeats=2"),
    )
    whole = train(config(shapes, tmp_path / "whole", *overrides))
    half = config(shapes, tmp_path / "half", *overrides)
    stop_at(half, 5)
    resumed = train(half, resume=True)
    first, second = weights(whole), weights(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [logged(run, "loss") for run in (whole.run, resumed.run)]
    assert losses[0] == losses[1]
    assert sorted(losses[0]) == list(range(1, 9))


def test_two_halves_of_a_batch_make_the_step_of_the_whole(shapes: Path, tmp_path: Path) -> None:
    """In a network without batch norm, and without chance."""
    overrides = (
        *("network.name=eamlp_7", "network.options={dropout: 0}", "training.learning_rate=0.01"),
        *("training.steps=2", "training.validate_every=2", "training.save_every=2", *UNCHANGED),
    )
    one = train(config(shapes, tmp_path / "one", *overrides))
    halves = ("training.batch_size=6", "training.accumulate=2")
    two = train(config(shapes, tmp_path / "two", *overrides, *halves))
    assert logged(one.run, "loss") == pytest.approx(logged(two.run, "loss"), rel=1e-5)
    assert logged(one.run, "learning_rate") == logged(two.run, "learning_rate")
    first, second = weights(one), weights(two)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_images_that_cannot_be_decoded_are_counted_and_named(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(shapes, tmp_path / "data"))
    for name in ("train/n01/broken.png", "val/n02/broken.png"):
        (root / name).write_bytes(b"no picture")
    # n03's last batch of one holds nothing that can be read
    (root / "val/n03/zz.png").write_bytes(b"")
    command = [
        "train",
        str(written(root, tmp_path / "run")),
        *TINY,
        "training.steps=4",
        "inference.batch_size=1",
    ]
    assert main(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "training images that cannot be used and were replaced: 1 (" in out
    assert "train/n01/broken.png: cannot identify image" in out
    assert "images that cannot be decoded and count nowhere: 2 (val/n02/broken.png: " in out
    report = json.loads((tmp_path / "run/report/metrics.json").read_text())
    assert report["n"] == 12
    assert [image["name"] for image in report["unreadable"]] == ["val/n02/broken.png", "val/n03/zz.png"]

    assert main([*command, "--overwrite", "data.corrupt_limit=1"]) == 2
    error = capsys.readouterr().err
    assert "2 images cannot be decoded, expected at most 1" in error
    assert "Traceback" not in error


def test_prediction_names_what_it_cannot_read_and_classifies_the_rest(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(config(shapes, tmp_path / "run", "training.steps=1")).run
    shutil.copy(shapes / "val/n01/1_n01_0.png", tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    inputs = [str(tmp_path / name) for name in ("bad.png", "good.png")]
    assert (
        main(["predict", str(run / "model"), *inputs, "--output", str(tmp_path / "out"), "--device", "cpu"])
        == 2
    )
    assert "bad.png: cannot identify image" in capsys.readouterr().err
    rows = (tmp_path / "out/predictions.csv").read_text().splitlines()
    assert [Path(row.split(",")[0]).name for row in rows[1:]] == ["good.png"]


def test_other_networks_options_and_data_are_refused_in_a_sentence(shapes: Path, tmp_path: Path) -> None:
    for overrides, message in (
        (["network.name=unet", "network.options={}"], "'unet' segments volumes and does not classify images"),
        (["network.name=resnet62"], r"unknown network 'resnet62'; did you mean"),
        (["network.options={width: 3}"], r"has no option 'width'|cannot be built with"),
        (["training.batch_size=100"], "batch of 100 from 36 images"),
        (["data.validation=test"], "test: no such folder"),
        (["data.ground_truth=nowhere.txt"], r"nowhere\.txt: cannot be read"),
        ([f"network.weights={tmp_path}"], r"model\.json"),
    ):
        with pytest.raises(InputError, match=message):
            train(config(shapes, tmp_path / "run", *overrides))
    only = tmp_path / "two"
    shutil.copytree(shapes / "train", only / "train")
    shutil.copytree(shapes / "val", only / "val")
    shutil.rmtree(only / "val/n02")
    with pytest.raises(InputError, match=r"no image of 1 of 3 classes \(n02\)"):
        train(config(only, tmp_path / "run"))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="finds no CUDA device"):
            train(config(shapes, tmp_path / "run", "training.device=cuda"))


def test_fine_tuning_and_teachers_start_from_a_model_folder(shapes: Path, tmp_path: Path) -> None:
    """At another resolution, with the model as its own teacher; other networks and classes are refused."""
    model = train(config(shapes, tmp_path / "first", "training.steps=2")).run / "model"
    finer = ("training.steps=1", "image_size=48", "inference.image_size=48", f"network.weights={model}")
    taught = (f"distillation.teacher={model}", "distillation.kind=soft", "training.learning_rate=1e-9")
    second = train(config(shapes, tmp_path / "second", *finer, *taught))
    first, after = load_file(model / "model.safetensors"), weights(second)
    for name, weight in first.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(weight, after[name], rtol=0, atol=1e-6)
    options = "network.options={widths: [4, 8, 16, 64]}"
    with pytest.raises(InputError, match=r"weights do not fit network\.name"):
        train(config(shapes, tmp_path / "third", f"network.weights={model}", options))
    fewer = tmp_path / "fewer"
    for part in ("train", "val"):
        shutil.copytree(shapes / part, fewer / part, ignore=shutil.ignore_patterns("n03"))
    train(config(fewer, tmp_path / "fourth", "training.steps=1", f"network.weights={model}"))
    with pytest.raises(InputError, match="the teacher was trained on other classes"):
        train(config(fewer, tmp_path / "fifth", f"distillation.teacher={model}"))


def test_distillation_in_closed_form() -> None:
    logits, taught = torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    assert float(distillation_loss(logits, taught, "hard", 1.0)) == pytest.approx(np.log(1 + np.exp(2)))
    p, q = (torch.softmax(x / 2, 1) for x in (logits, taught))
    expected = 4 * float((q * (q / p).log()).sum())
    assert float(distillation_loss(logits, taught, "soft", 2.0)) == pytest.approx(expected)
    assert float(distillation_loss(logits, logits, "soft", 3.0)) == pytest.approx(0, abs=1e-7)
