"""Models as MLflow loads them answer what `medattn predict` writes, and hold no pickle."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medattn.classifier import ImageCard, save_classifier
from medattn.data.images.classes import Classes
from medattn.data.images.transforms import EvaluationTransform
from medattn.data.phantom import write_phantoms
from medattn.errors import InputError
from medattn.io import read_volume
from medattn.io.panoptic import read_ids
from medattn.labels import LabelSet
from medattn.training.mlflow_model import written
from medattn_pipelines import image_prediction, panoptic_prediction, prediction
from medattn_pipelines.configfile import load_any
from medattn_pipelines.datawatch import watch_data
from medattn_pipelines.modelserving import paths_of
from medattn_pipelines.trackrecord import LOADER, plan_sets, report_numbers

# inside MLflow
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Any type hint:UserWarning"
)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("practice") / "cases"
    write_phantoms(root, cases=3, size=32, seed=1)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 255, (40 + number, 52, 3), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = (
            6 if number else 1
        )  # the orientation, which classifiers follow and panoptic ones do not
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=95, exif=exif)
    return [str(path) for path in sorted(folder.iterdir())]


def served(folder: Path) -> Any:
    from mlflow import pyfunc

    with written(folder, LOADER) as made:
        names = {path.name for path in made.rglob("*") if path.is_file()}
        assert {"MLmodel", "model.json", "model.safetensors"} <= names
        assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".py"))]
        # MLflow's tests for pickles look no further than the file that it names
        assert "pickle" not in (made / "MLmodel").read_text(encoding="utf-8")
        return pyfunc.load_model(str(made))


@pytest.fixture(scope="module")
def volume_model(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medattn.segmenter import save_model
    from medattn_pipelines.volumes import describe_model, plan_data

    run = tmp_path_factory.mktemp("volumes")
    path = run / "config.yaml"
    path.write_text(f"data: {{root: {cases}, validation: 0.4}}\n", encoding="utf-8")
    small = ["data.spacing_mm=[10, 10, 10]", "data.patch_size=[16, 16, 16]", "network.name=unet"]
    config = load_any(path, [*small, "network.options={widths: [4, 8], strides: [2]}", f"run.dir={run}"])
    label_set = LabelSet.load("hn_oar")
    folder, plan = plan_data(config, run, label_set)
    card = describe_model(config, folder, plan, label_set)
    torch.manual_seed(0)
    network = card.build()
    for weight in network.parameters():
        torch.nn.init.normal_(weight)  # so that some voxels are of organs
    save_model(run / "model", card, network.state_dict())
    return run / "model"


def test_a_path_of_a_scan_gives_its_segmentation(volume_model: Path, cases: Path, tmp_path: Path) -> None:
    scan = sorted(cases.glob("*/image.nii.gz"))[0]
    (answer,) = served(volume_model).predict([str(scan)])
    prediction.predict(volume_model, [scan], tmp_path, device="cpu")
    expected = read_volume(tmp_path / f"{scan.parent.name}.nii.gz").array
    assert answer["path"] == str(scan)
    assert answer["segmentation"].dtype == np.uint8
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(answer["segmentation"], expected)
    labels = json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))
    assert {str(value): name for value, name in answer["labels"].items()} == labels


def test_paths_of_images_give_their_classes(photos: list[str], tmp_path: Path) -> None:
    options = {"image_size": 32, "widths": [4, 8, 16, 32]}
    classes = Classes(("n01", "n02", "n03"), ("a", "b", "c"))
    card = ImageCard("resnet26", options, classes, EvaluationTransform(32, 1.0))
    torch.manual_seed(0)
    network = card.build()
    torch.nn.init.normal_(network.get_submodule("head").weight)
    save_classifier(tmp_path / "model", card, network.state_dict())
    answers = served(tmp_path / "model").predict(photos)
    table = image_prediction.predict(
        tmp_path / "model", [Path(p) for p in photos], tmp_path / "out", device="cpu"
    )
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert [answer["path"] for answer in answers] == photos
    for answer, row in zip(answers, rows[1:], strict=True):
        assert [one["wnid"] for one in answer["classes"]] == row[1::2]
        found = [one["probability"] for one in answer["classes"]]
        assert found == pytest.approx([float(text) for text in row[2::2]], abs=1e-5)
        assert sum(found) == pytest.approx(1)
    assert len({answer["classes"][0]["probability"] for answer in answers}) == len(photos)


def test_paths_of_images_give_their_segments(photos: list[str], tmp_path: Path) -> None:
    from medattn.panoptic import Categories, Category
    from medattn.panoptic_segmenter import save_panoptic
    from medattn_pipelines.panoptic import describe_model

    path = tmp_path / "config.yaml"
    path.write_text(f"task: panoptic\ndata: {{root: {tmp_path}}}\n", encoding="utf-8")
    small = "{depths: [1, 1, 1, 1], scale: 0.125, width: 16, rows: 33, projection: true}"
    view = ["inference.longest_side=49", "inference.nms_kernel=5", "inference.stuff_area=1"]
    config = load_any(path, ["crop_size=[49, 49]", f"network.options={small}", *view])
    categories = Categories(
        (Category(5, "disc", True, (220, 20, 60)), Category(9, "ground", False, (9, 9, 9)))
    )
    card = describe_model(config, categories)
    torch.manual_seed(0)
    save_panoptic(tmp_path / "model", card, card.build().state_dict())
    answers = served(tmp_path / "model").predict(photos)
    written_to = panoptic_prediction.predict(
        tmp_path / "model", [Path(p) for p in photos], tmp_path / "out", device="cpu"
    )
    annotations = json.loads(written_to.read_text(encoding="utf-8"))["annotations"]
    for answer, photo, expected in zip(answers, photos, annotations, strict=True):
        ids = read_ids(tmp_path / "out/predictions" / f"{Path(photo).stem}.png")
        np.testing.assert_array_equal(answer["ids"], ids)
        mine = [(one["id"], one["category"], one["area"]) for one in answer["segments"]]
        assert mine == [(one["id"], one["category_id"], one["area"]) for one in expected["segments_info"]]
        assert {one["name"] for one in answer["segments"]} <= {"disc", "ground"}


def test_every_file_that_cannot_be_read_is_named(volume_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.nii.gz").write_text("no volume", encoding="utf-8")
    paths = [str(tmp_path / name) for name in ("missing.nii.gz", "text.nii.gz")]
    with pytest.raises(InputError, match=r"missing\.nii\.gz[\s\S]*text\.nii\.gz"):
        served(volume_model).predict(paths)


def test_paths_come_in_many_forms() -> None:
    import pandas as pd

    expected = [Path("a.nii.gz"), Path("b.nii.gz")]
    names = ["a.nii.gz", "b.nii.gz"]
    forms = (names, tuple(expected), np.array(names), pd.DataFrame({"path": names}), pd.Series(names))
    assert [paths_of(form) for form in forms] == [expected] * len(forms)
    assert paths_of("a.nii.gz") == paths_of(Path("a.nii.gz")) == expected[:1]
    for wrong in (3, [3], np.zeros(2)):
        with pytest.raises(InputError, match="expected paths of files"):
            paths_of(wrong)


def test_volumes_have_a_digest_of_their_plan_too(cases: Path, volume_model: Path) -> None:
    run = volume_model.parent
    config = load_any(run / "config.yaml", [f"run.dir={run}"])
    (data,), (plan,) = watch_data(config, run, resume=False).data_sets, plan_sets(run)
    assert (data.name, data.source, plan.name) == ("contents", str(cases), "plan")
    assert len({data.digest, plan.digest}) == 2
    assert len(data.digest) == len(plan.digest) == 32, "MLflow takes 36 at most"


def test_the_means_of_a_report_are_its_numbers(tmp_path: Path) -> None:
    content = {
        "schema": 1,
        "mean": {"dice": {"mean": 0.5, "n_cases": 3, "worst": 0.1}, "hd95_mm": {"mean": None}},
        "per_organ": {"Brainstem": {"n": 4, "dice": {"mean": 0.25, "median": 0.3}}},
        "per_case": {"a": {"dice": 1.0}},
        "top1": 1,
        "ok": True,
    }
    (tmp_path / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    assert report_numbers(tmp_path) == {
        "mean.dice.mean": 0.5,
        "per_organ.Brainstem.dice.mean": 0.25,
        "top1": 1.0,
    }
    assert report_numbers(tmp_path / "none") == {}
