"""Prediction under torchrun, by command or at the end of a training, against one process: the same bytes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from medattn.classifier import ImageCard, save_classifier
from medattn.data.images.classes import Classes
from medattn.data.images.transforms import EvaluationTransform
from medattn.data.panoptic.transforms import PanopticView
from medattn.data.phantom import write_phantoms
from medattn.inference.panoptic import PanopticRules
from medattn.labels import LabelSet
from medattn.panoptic import Categories, Category
from medattn.panoptic_segmenter import PanopticCard, save_panoptic
from medattn.segmenter import save_model
from medattn_pipelines.cli import main
from medattn_pipelines.configfile import load
from medattn_pipelines.image_prediction import BATCH
from medattn_pipelines.volumes import describe_model, plan_data

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
MODULE = ["-m", "medattn_pipelines.cli"]


def random_weights(network: nn.Module) -> nn.Module:
    """Large ones, so that all kinds of answers occur."""
    torch.manual_seed(0)
    for weight in network.parameters():
        nn.init.normal_(weight)
    return network


def volumes(root: Path) -> tuple[Path, Path]:
    """A model and five scans."""
    write_phantoms(root / "cases", cases=5, size=32, seed=1)
    (root / "run").mkdir()
    (root / "config.yaml").write_text(f"data: {{root: {root}/cases, validation: 0.4}}\n")
    small = ["data.spacing_mm=[10, 10, 10]", "data.patch_size=[16, 16, 16]"]
    network = ["network.name=unet", "network.options={widths: [4, 8], strides: [2]}"]
    config = load(root / "config.yaml", [*small, *network, f"run.dir={root}/run"])
    label_set = LabelSet.load("hn_oar")
    folder, plan = plan_data(config, root / "run", label_set)
    card = describe_model(config, folder, plan, label_set)
    save_model(root / "model", card, random_weights(card.build()).state_dict())
    return root / "model", root / "cases"


def write_images(folder: Path, number: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in range(number):
        Image.fromarray(rng.integers(0, 255, (32, 40, 3), np.uint8)).save(folder / f"{name:03}.png")


def classification(root: Path) -> tuple[Path, Path]:
    """A model and images for three batches, the last of which is smaller."""
    write_images(root / "images", 2 * BATCH + 5)
    classes = Classes(("n01", "n02", "n03"), ("a", "b", "c"))
    options = {"image_size": 32, "widths": [4, 8, 16, 32]}
    card = ImageCard("resnet26", options, classes, EvaluationTransform(32, 1.0))
    save_classifier(root / "model", card, random_weights(card.build()).state_dict())
    return root / "model", root / "images"


def panoptic(root: Path) -> tuple[Path, Path]:
    """A model and five images."""
    write_images(root / "images", 5)
    categories = Categories(
        (Category(5, "disc", True, (220, 20, 60)), Category(9, "ground", False, (128, 64, 128)))
    )
    options = {"depths": [1, 1, 1, 1], "scale": 0.125, "width": 16, "rows": 33, "projection": True}
    rules = PanopticRules(nms_kernel=5, stuff_area=10)
    card = PanopticCard("axial_deeplab_s", options, categories, PanopticView(49), rules)
    torch.manual_seed(0)
    save_panoptic(root / "model", card, card.build().state_dict())
    return root / "model", root / "images"


def together(world: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command in so many processes of torchrun."""
    command = [*TORCHRUN, str(world), *MODULE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def contents(folder: Path) -> dict[str, object]:
    """Bytes by path; of the manifest, all but the seconds."""
    found: dict[str, object] = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    if "report.json" in found:
        report = json.loads((folder / "report.json").read_text())
        assert all(row.pop("seconds") >= 0 for row in report["cases"])
        found["report.json"] = report
    return found


@pytest.mark.parametrize(
    ("task", "broken", "world"),
    [
        pytest.param(volumes, "broken.nii.gz", 2, id="volumes"),
        pytest.param(classification, "broken.png", 2, id="classification", marks=pytest.mark.slow),
        pytest.param(panoptic, "broken.png", 2, id="panoptic", marks=pytest.mark.slow),
        pytest.param(volumes, "broken.nii.gz", 8, id="more-processes-than-volumes", marks=pytest.mark.slow),
    ],
)
def test_processes_write_what_one_writes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    task: Callable[[Path], tuple[Path, Path]],
    broken: str,
    world: int,
) -> None:
    """And name the input that cannot be read once, whoever of them was to read it."""
    model, inputs = task(tmp_path)
    more = [inputs]
    for number in range(2):
        more.append(tmp_path / f"{number}{broken}")
        more[-1].write_bytes(b"nothing")
    export = ["--export", "seg.nrrd"] if task is volumes else []
    one = main(
        ["predict", str(model), *map(str, more), "--output", f"{tmp_path}/one", "--device", "cpu", *export]
    )
    said = [line for line in capsys.readouterr().err.splitlines() if "medattn: error: " in line]
    assert (one, len(said)) == (2, 2)
    done = together(world, "predict", model, *more, "--output", tmp_path / "many", "--device", "cpu", *export)
    assert done.returncode == 1, "torchrun's own code"
    assert [line for line in done.stderr.splitlines() if "medattn: error: " in line] == said
    assert done.stderr.count(f"(first of {world} processes)") >= 1
    found = contents(tmp_path / "many")
    assert found == contents(tmp_path / "one")
    assert len(found) > 1


def test_one_process_speaks(tmp_path: Path) -> None:
    model, inputs = classification(tmp_path)
    done = together(2, "predict", model, inputs, "--output", tmp_path / "out", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("predictions: ") == 1
    rows = (tmp_path / "out/predictions.csv").read_text().splitlines()
    names = [row.split(",")[0] for row in rows[1:]]
    assert names == [str(path) for path in sorted(inputs.iterdir())]


def beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def volume_training(root: Path) -> list[str | Path]:
    """Of twelve cases, three to validate with."""
    write_phantoms(root / "data", cases=12, size=32, seed=1)
    torchrun = beside("test_torchrun")
    return [torchrun.written(root / "data", root / "run", "volumes"), *torchrun.VOLUMES, "training.steps=2"]


def image_training(root: Path) -> list[str | Path]:
    """Ten images to validate with, in batches of 4, 4 and 2."""
    for part, number in (("train", 12), ("val", 5)):
        (root / "data" / part).mkdir(parents=True)
        for wnid in ("n01", "n02"):
            write_images(root / "data" / part / wnid, number)
    torchrun = beside("test_torchrun")
    return [torchrun.written(root / "data", root / "run"), *torchrun.IMAGES, "training.steps=2"]


def panoptic_training(root: Path) -> list[str | Path]:
    """Five images to validate with."""
    scenes = beside("test_panoptic_training")
    scenes.write_scenes(root / "data", "train", 8, 0)
    scenes.write_scenes(root / "data", "val", 5, 1)
    return [scenes.written(root / "data", root / "run"), *scenes.TINY, "training.steps=2"]


@pytest.mark.parametrize(
    ("task", "share"),
    [
        pytest.param(image_training, "Classifying (first of 2 processes) 6/6", id="classification"),
        pytest.param(
            volume_training, "Segmenting (first of 2 processes) 2/2", id="volumes", marks=pytest.mark.slow
        ),
        pytest.param(
            panoptic_training, "Segmenting (first of 2 processes) 3/3", id="panoptic", marks=pytest.mark.slow
        ),
    ],
)
def test_processes_share_the_predictions_at_the_end_of_a_training(
    tmp_path: Path, task: Callable[[Path], list[str | Path]], share: str
) -> None:
    """One process that resumes the complete run repeats its end: predictions and report are the same."""
    command = ["train", *map(str, task(tmp_path))]
    done = together(2, *command)
    assert done.returncode == 0, done.stderr
    assert share in done.stderr
    assert done.stdout.count("report:") == 1
    assert "stopped by" not in done.stdout
    run = tmp_path / "run"
    for name in ("predictions", "report"):
        (run / name).rename(tmp_path / name)
    assert main([*command, "--resume"]) == 0
    for name in ("predictions", "report"):
        found = contents(run / name)
        assert found == contents(tmp_path / name)
        assert len(found) > 1
