"""Training, prediction and evaluation of a panoptic segmenter end to end, through the command line."""

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
from PIL import Image
from safetensors.torch import load_file

import medattn_pipelines.panoptic as pipeline
from medattn.classifier import ImageCard, save_classifier
from medattn.data.images.classes import Classes
from medattn.data.images.transforms import EvaluationTransform
from medattn.errors import InputError
from medattn.io.panoptic import read_ids, read_panoptic, write_ids, write_panoptic
from medattn.panoptic import Annotation, Categories, Category, ImageRecord, Segment
from medattn_pipelines.cli import main
from medattn_pipelines.configfile import load_any
from medattn_pipelines.panoptic import Trained, train
from medattn_pipelines.panopticconfig import PanopticConfig

CATEGORIES = Categories(
    (
        Category(5, "disc", True, (220, 20, 60)),
        Category(9, "ground", False, (128, 64, 128)),
        Category(2, "square", True, (0, 180, 60)),
    )
)
COLOURS = {5: (230, 40, 40), 2: (40, 210, 60)}
SMALL = "{depths: [1, 1, 1, 1], scale: 0.125, width: 16, rows: 33, projection: true}"
TINY = [
    "crop_size=[49, 49]",
    f"network.options={SMALL}",
    "data.workers=1",
    "run.tracking=false",
    "augment.scale_range=[1, 1]",
    "targets.sigma=2",
    "targets.small_area=0",
    "training.steps=6",
    "training.batch_size=4",
    "training.optimizer=adamw",
    "training.learning_rate=0.005",
    "training.warmup_steps=0",
    "training.precision=fp32",
    "training.device=cpu",
    "training.log_every=1",
    "training.validate_every=3",
    "training.save_every=3",
    "inference.longest_side=49",
    "inference.nms_kernel=5",
    "inference.stuff_area=10",
]


def scene(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray, tuple[Segment, ...]]:
    """Two or three instances, apart from each other, on grey ground: 49 x 49 pixels."""
    ids = np.full((49, 49), 1, np.int32)
    pixels = rng.integers(90, 130, (49, 49, 3)).astype(np.uint8)
    y, x = np.mgrid[:49, :49]
    segments = [Segment(1, 9)]
    corners = rng.permutation([(12, 12), (12, 36), (36, 12), (36, 36)])[: rng.integers(2, 4)]
    for number, (down, right) in enumerate(corners.tolist(), start=2):
        kind = (5, 2)[int(rng.integers(2))]
        far = np.maximum(abs(y - down), abs(x - right)) if kind == 2 else np.hypot(y - down, x - right)
        ids[far <= 8], pixels[far <= 8] = number, COLOURS[kind]
        segments.append(Segment(number, kind))
    return Image.fromarray(pixels), ids, tuple(segments)


def write_scenes(root: Path, split: str, count: int, seed: int) -> None:
    """In COCO's layout."""
    rng = np.random.default_rng(seed)
    json_path = root / f"annotations/panoptic_{split}2017.json"
    annotations, images = [], []
    (root / f"{split}2017").mkdir(parents=True)
    for number in range(1, count + 1):
        image, ids, segments = scene(rng)
        image.save(root / f"{split}2017/{number:012d}.png")
        write_ids(json_path.with_suffix("") / f"{number:012d}.png", ids)
        annotations.append(Annotation(number, f"{number:012d}.png", segments))
        images.append(ImageRecord(number, f"{number:012d}.png", 49, 49))
    write_panoptic(json_path, annotations, images=images, categories=CATEGORIES)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, "train", 16, 0)
    write_scenes(root, "val", 4, 1)
    return root


def written(root: Path, run: Path) -> Path:
    path = run.parent / f"{run.name}.yaml"
    path.write_text(f"task: panoptic\ndata: {{root: {root}}}\nrun: {{dir: {run}}}\n")
    return path


def config(root: Path, run: Path, *overrides: str) -> PanopticConfig:
    found = load_any(written(root, run), [*TINY, *overrides])
    assert isinstance(found, PanopticConfig)
    return found


def weights(done: Trained) -> dict[str, torch.Tensor]:
    return load_file(done.run / "model/model.safetensors")


def logged(run: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def scores(path: Path) -> dict[str, dict[str, float]]:
    found = json.loads(path.read_text())
    return {group: found[group] for group in ("all", "things", "stuff")}


def test_train_predict_and_evaluate_by_command(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few steps teach the ground; predictions of the model are those of the training's end."""
    run, out = tmp_path / "run", tmp_path / "out"
    rhythm = ["training.steps=30", "training.validate_every=15", "training.precision=auto"]
    command = ["train", str(written(scenes, run)), *TINY, *rhythm]
    assert main(command) == 0
    assert "PQ" in capsys.readouterr().out
    trained = scores(run / "report/metrics.json")
    assert trained["stuff"]["pq"] > 0.5
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "model/model.json",
        "report/report.html",
        "report/metrics.csv",
    ):
        assert (run / name).is_file(), name
    assert not list(run.rglob(".writing-*"))
    assert len(list((run / "predictions/overlays").glob("*.jpg"))) == 4

    images = str(scenes / "val2017")
    assert main(["predict", str(run / "model"), images, "--output", str(out), "--device", "cpu"]) == 0
    found = read_panoptic(out / "predictions.json")
    assert [annotation.image_id for annotation in found.annotations] == [1, 2, 3, 4]
    reference = str(scenes / "annotations/panoptic_val2017.json")
    for prediction in (out, run / "predictions"):
        report = ["--prediction", str(prediction / "predictions.json"), "--output", str(tmp_path / "report")]
        task = ["--task", "panoptic", "--reference", reference, "--images", images]
        assert main(["evaluate", *task, *report]) == 0
        assert scores(tmp_path / "report/metrics.json") == trained
    assert main(command) == 2
    assert "this run exists" in capsys.readouterr().err


def test_areas_and_boxes_of_predictions_are_those_of_their_pngs(scenes: Path, tmp_path: Path) -> None:
    """Also where the network sees a smaller picture than the image is: `check` finds nothing."""
    run = train(config(scenes, tmp_path / "run")).run
    for number in (1, 2):
        with Image.open(scenes / f"val2017/{number:012d}.png") as image:
            (tmp_path / "large").mkdir(exist_ok=True)
            image.resize((131, 97)).save(tmp_path / f"large/{number}.png")
    arguments = [str(tmp_path / "large"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["predict", str(run / "model"), *arguments]) == 0
    file = read_panoptic(tmp_path / "out/predictions.json")
    assert [image.width for image in file.images] == [131, 131]
    for annotation in file.annotations:
        ids = read_ids(file.png(annotation))
        assert ids.shape == (97, 131)
        assert set(np.unique(ids)) - {0} == {segment.id for segment in annotation.segments}
        for segment in annotation.segments:
            y, x = np.nonzero(ids == segment.id)
            assert segment.area == len(y)
            assert segment.box == (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1)
            assert segment.score is not None
            assert segment.score > 0
    assert main(["check", str(tmp_path / "out/predictions.json")]) == 0


def stop_at(settings: PanopticConfig, step: int) -> None:
    """Train in this process and send it SIGTERM while step `step` runs."""
    original = pipeline.loss_function

    def counting(*arguments: object) -> Callable[..., torch.Tensor]:
        loss_of, seen = original(*arguments), [0]  # type: ignore[arg-type]

        def loss(network: torch.nn.Module, batch: object) -> torch.Tensor:
            seen[0] += 1
            if seen[0] == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss_of(network, batch)  # type: ignore[arg-type]

        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "loss_function", counting)
        done = train(settings)
    assert (done.reason, done.step, done.evaluation) == ("SIGTERM", step, None)


def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(scenes: Path, tmp_path: Path) -> None:
    """With all that is random and all that has a memory: crops, colours, averaged weights, Lookahead."""
    overrides = (
        *("training.ema_decay=0.9", "training.optimizer=radam_lookahead", "augment.color_jitter=0.4"),
        *("augment.scale_range=[0.7, 1.4]", "augment.scale_step=0", "augment.color_policy=0.5"),
    )
    whole = train(config(scenes, tmp_path / "whole", *overrides))
    half = config(scenes, tmp_path / "half", *overrides)
    stop_at(half, 4)
    resumed = train(half, resume=True)
    first, second = weights(whole), weights(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [logged(run, "loss") for run in (whole.run, resumed.run)]
    assert losses[0] == losses[1]
    assert sorted(losses[0]) == list(range(1, 7))


def test_views_are_averaged_in_validation_and_by_the_model(scenes: Path, tmp_path: Path) -> None:
    done = train(config(scenes, tmp_path / "run", "inference.scales=[0.5, 1]", "inference.flip=true"))
    card = json.loads((done.run / "model/model.json").read_text())
    assert (card["scales"], card["flip"]) == ([0.5, 1.0], True)
    assert done.evaluation is not None


def test_images_that_cannot_be_used_are_counted_and_named(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(scenes, tmp_path / "data"))
    (root / "train2017/000000000003.png").write_bytes(b"no picture")
    Image.new("RGB", (30, 30)).save(root / "train2017/000000000005.png")  # the labels are 49 x 49
    command = ["train", str(written(root, tmp_path / "run")), *TINY]
    assert main(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "training images that cannot be used and were replaced: 2 (" in out
    assert "30 x 30 pixels, but its labels" in out
    assert main([*command, "--overwrite", "data.corrupt_limit=1"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_backbone_starts_from_a_classifier(scenes: Path, tmp_path: Path) -> None:
    """Of the same network and widths; what does not fit is named."""
    classes = Classes.of(["n01", "n02"])
    for name, widths in (("good", [4, 8, 16, 32]), ("bad", [4, 8, 16, 64])):
        card = ImageCard("resnet26", {"widths": widths}, classes, EvaluationTransform())
        torch.manual_seed(3)
        save_classifier(tmp_path / name, card, card.build().state_dict())
    options = "{backbone: resnet26, backbone_options: {widths: [4, 8, 16, 32]}, width: 16}"
    resnet = ["network.name=panoptic_deeplab", f"network.options={options}"]
    slow = ("training.steps=1", "training.learning_rate=1e-9")
    done = train(config(scenes, tmp_path / "run", *resnet, *slow, f"network.backbone={tmp_path / 'good'}"))
    start, after = load_file(tmp_path / "good/model.safetensors"), weights(done)
    kept = [n for n in start if not n.startswith("head") and "running" not in n and "num_batches" not in n]
    assert len(kept) > 50
    for name in kept:
        torch.testing.assert_close(after[f"backbone.{name}"], start[name], rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=r"bad.*backbone"):
        train(config(scenes, tmp_path / "other", *resnet, *slow, f"network.backbone={tmp_path / 'bad'}"))


def test_a_model_of_other_classes_gives_all_but_its_classes(scenes: Path, tmp_path: Path) -> None:
    model = train(config(scenes, tmp_path / "first", "training.steps=2")).run / "model"
    fewer = tmp_path / "fewer"
    for split in ("train", "val"):
        shutil.copytree(scenes / f"{split}2017", fewer / f"{split}2017")
        path = scenes / f"annotations/panoptic_{split}2017.json"
        shutil.copytree(path.with_suffix(""), fewer / path.relative_to(scenes).with_suffix(""))
        file = read_panoptic(path)
        thing = Categories((Category(9, "ground", False, (1, 2, 3)), Category(5, "thing", True, (4, 5, 6))))
        merged = [
            Annotation(
                a.image_id,
                a.file_name,
                tuple(Segment(s.id, 9 if s.category == 9 else 5) for s in a.segments),
            )
            for a in file.annotations
        ]
        write_panoptic(fewer / path.relative_to(scenes), merged, images=file.images, categories=thing)
    slow = ("training.steps=1", "training.learning_rate=1e-9", f"network.weights={model}")
    second = weights(train(config(fewer, tmp_path / "second", *slow)))
    for name, weight in load_file(model / "model.safetensors").items():
        if weight.shape == second[name].shape and "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(weight, second[name], rtol=0, atol=1e-6)
    different = "network.options={depths: [1, 1, 1, 1], scale: 0.25, width: 16, rows: 33, projection: true}"
    with pytest.raises(InputError, match=r"weights do not fit network\.name"):
        train(config(fewer, tmp_path / "third", f"network.weights={model}", different))


def test_other_networks_options_and_data_are_refused_in_a_sentence(scenes: Path, tmp_path: Path) -> None:
    for overrides, message in (
        (["network.name=unet", "network.options={}"], "'unet' does segmentation and no panoptic"),
        (["network.name=axial_deeplab_t"], r"unknown network 'axial_deeplab_t'; did you mean"),
        (["network.options={breadth: 3}"], r"has no option 'breadth'|cannot be built with"),
        (["training.batch_size=100"], "batch of 100 from 16 images"),
        (["data.layout=cityscapes"], r"cityscapes_panoptic_train\.json: no such file"),
        ([f"network.weights={tmp_path}"], r"model\.json"),
        ([f"network.backbone={tmp_path}"], r"model\.json"),
        (["inference.nms_kernel=4"], "expected an odd number"),
    ):
        with pytest.raises(InputError, match=message):
            train(config(scenes, tmp_path / "run", *overrides))
    missing = Path(shutil.copytree(scenes, tmp_path / "missing"))
    (missing / "val2017/000000000002.png").unlink()
    with pytest.raises(InputError, match=r"1 of 4 images are missing \(000000000002\.png\)"):
        train(config(missing, tmp_path / "run"))


def test_any_backbone_is_a_config(scenes: Path, tmp_path: Path) -> None:
    """An attention of another family: the same pipeline, one option."""
    options = "{backbone: xcit_nano_12_p8, backbone_options: {width: 32, depth: 3, heads: 2}, width: 16}"
    done = train(
        config(
            scenes,
            tmp_path / "run",
            "network.name=panoptic_deeplab",
            f"network.options={options}",
            "training.steps=1",
        )
    )
    assert done.evaluation is not None
