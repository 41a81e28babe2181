"""`evaluate --task panoptic` and `check FILE.json` on small files: scores, refusals, nothing half written."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medattn.errors import InputError
from medattn.io.panoptic import write_ids
from medattn_pipelines.cli import main
from medattn_pipelines.panoptic_evaluation import evaluate

CAT, SKY = 17, 187
CATEGORIES = [
    {"id": CAT, "name": "cat", "isthing": 1, "color": [220, 20, 60]},
    {"id": SKY, "name": "sky", "isthing": 0, "color": [70, 130, 180]},
]
Content = dict[str, Any]
MAPS = {
    "a": [[1, 1, 2, 2], [1, 1, 2, 2]],
    "b": [[2, 2, 2, 2], [2, 2, 2, 2]],
    "c": [[1, 1, 1, 0], [3, 3, 3, 0]],
}
SEGMENTS = {1: CAT, 2: SKY, 3: CAT}


def write(path: Path, maps: dict[str, list[list[int]]], **sections: object) -> Path:
    """A JSON file with its PNGs of these segment ids; of images no more than what a prediction needs."""
    annotations = []
    for name, rows in maps.items():
        ids = np.array(rows)
        write_ids(path.with_suffix("") / f"{name}.png", ids)
        present = [number for number in SEGMENTS if (ids == number).any()]
        segments = [{"id": number, "category_id": SEGMENTS[number]} for number in present]
        annotations.append({"image_id": name, "file_name": f"{name}.png", "segments_info": segments})
    path.write_text(json.dumps({"annotations": annotations} | sections))
    return path


def change(path: Path, **sections: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | sections))


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    for name in MAPS:
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (4, 2), "olive").save(tmp_path / "photos" / f"{name}.jpg")
    images = [{"id": name, "file_name": f"{name}.jpg", "height": 2, "width": 4} for name in MAPS]
    return write(tmp_path / "reference.json", MAPS, categories=CATEGORIES, images=images)


@pytest.fixture
def prediction(tmp_path: Path) -> Path:
    """As the reference, but for one cat of `c` that nobody found."""
    return write(tmp_path / "prediction.json", MAPS | {"c": [[1, 1, 1, 0], [0, 0, 0, 0]]})


def metrics(output: Path) -> Content:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.json")

    return json.loads((output / "metrics.json").read_text(), parse_constant=refuse)


def problems(*arguments: Path, **options: Any) -> Sequence[str]:
    with pytest.raises(InputError) as error:
        evaluate(*arguments, **options)
    return error.value.problems


def test_all_three_files_and_the_scores_in_them(prediction: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(prediction, reference, out, images=tmp_path / "photos")
    found = metrics(out)
    cat = 2 / (2 + 0.5)  # two found, one missed
    assert found["all"] == {"pq": (cat + 1) / 2, "sq": 1.0, "rq": (cat + 1) / 2, "n": 2}
    assert found["things"] == {"pq": cat, "sq": 1.0, "rq": cat, "n": 1}
    assert found["stuff"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 1}
    row = found["per_class"][str(CAT)]
    assert (row["name"], row["tp"], row["fp"], row["fn"], row["pq"]) == ("cat", 2, 0, 1, cat)
    assert found["miou"] == pytest.approx((7 / 10 + 1) / 2)
    assert found["ap"] == pytest.approx(67 / 101), "two of three cats: recalls to 0.66"
    assert (found["instances"], found["instances_without_score"], found["images"]) == (2, 2, 3)
    assert set(found["versions"]) >= {"medattn", "python", "faster-coco-eval"}
    with (out / "metrics.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["cat", "sky"]
    assert (out / "report.html").read_text().count("data:image/jpeg;base64,") == 9
    assert not list(tmp_path.rglob(".writing-*"))


def test_neither_workers_nor_the_order_of_the_prediction_change_a_byte(
    prediction: Path, reference: Path, tmp_path: Path
) -> None:
    outputs = []
    for workers in (1, 3):
        evaluate(prediction, reference, tmp_path / "out", workers=workers)
        outputs.append([file.read_bytes() for file in sorted((tmp_path / "out").iterdir())])
        change(prediction, annotations=json.loads(prediction.read_text())["annotations"][::-1])
    assert outputs[0] == outputs[1]


def test_scores_rank_instances_and_are_counted(prediction: Path, reference: Path, tmp_path: Path) -> None:
    """With a cat too many, scored lowest or highest: AP tells, PQ does not."""
    found = {}
    for score in (0.1, 0.9):
        maps = MAPS | {"b": [[3, 2, 2, 2], [2, 2, 2, 2]]}
        write(prediction, maps)
        annotations = json.loads(prediction.read_text())["annotations"]
        for annotation in annotations:
            for segment in annotation["segments_info"]:
                segment["score"] = score if annotation["image_id"] == "b" else 0.5
        change(prediction, annotations=annotations)
        evaluate(prediction, reference, tmp_path / "out")
        found[score] = metrics(tmp_path / "out")
    assert (found[0.1]["ap"], found[0.9]["ap"]) == (pytest.approx(1.0), pytest.approx(3 / 4))
    assert found[0.1]["all"] == found[0.9]["all"]
    assert found[0.1]["instances_without_score"] == 0


def test_missing_images_are_all_listed_and_further_ones_noted(
    prediction: Path, reference: Path, tmp_path: Path
) -> None:
    annotations = json.loads(prediction.read_text())["annotations"]
    change(prediction, annotations=annotations[:1])
    (problem,) = problems(prediction, reference, tmp_path / "out")
    assert "2 of the 3 images" in problem
    assert "'b', 'c'" in problem
    assert not (tmp_path / "out").exists()
    change(prediction, annotations=[*annotations, annotations[0] | {"image_id": "z", "file_name": "z.png"}])
    evaluate(prediction, reference, tmp_path / "out")
    (note,) = metrics(tmp_path / "out")["notes"]
    assert "predictions of 1 images" in note


def test_every_problem_of_every_file_is_listed_and_nothing_written(
    prediction: Path, reference: Path, tmp_path: Path
) -> None:
    folder = prediction.with_suffix("")
    write_ids(folder / "a.png", np.array([[1, 1, 9, 9], [1, 1, 9, 9]]))
    write_ids(folder / "b.png", np.full((3, 4), 2))
    (reference.with_suffix("") / "c.png").unlink()
    content = json.loads(prediction.read_text())
    content["annotations"][0]["segments_info"][0] |= {"category_id": 5, "area": 7}
    change(prediction, **content)
    (tmp_path / "photos" / "a.jpg").unlink()
    found = problems(prediction, reference, tmp_path / "out", images=tmp_path / "photos")
    for part, problem in zip(
        (
            "a.jpg: no such file",
            "unknown categories 5",
            "ids 9 that no segment",
            "no pixel of the segments 2",
            "`area` of 1 segments",
            "4 x 3 pixels, expected 4 x 2",
            "c.png: no such file",
        ),
        found,
        strict=True,
    ):
        assert part in problem
    assert not (tmp_path / "out").exists()


def test_problems_of_both_json_files_are_listed_together(
    prediction: Path, reference: Path, tmp_path: Path
) -> None:
    prediction.write_text("{")
    change(reference, images=[{"id": 1}])
    first, second = problems(prediction, reference, tmp_path / "out")
    assert "prediction.json: not readable as JSON" in first
    assert "images[0]: malformed" in second
    write(tmp_path / "bare.json", MAPS)
    (problem,) = problems(tmp_path / "bare.json", tmp_path / "bare.json", tmp_path / "out")
    assert "no `categories`" in problem
    (tmp_path / "alone.json").write_text('{"annotations": []}')
    assert "no such folder" in problems(tmp_path / "alone.json", tmp_path / "bare.json", tmp_path / "out")[0]


def test_categories_of_other_names_are_noted(prediction: Path, reference: Path, tmp_path: Path) -> None:
    """Which is what class indices in place of the data set's ids look like."""
    change(prediction, categories=[CATEGORIES[0] | {"name": "person"}, CATEGORIES[1]])
    evaluate(prediction, reference, tmp_path / "out")
    (note,) = metrics(tmp_path / "out")["notes"]
    assert "category 17 is 'person'" in note


def test_images_without_segments_are_scored_and_named(
    prediction: Path, reference: Path, tmp_path: Path
) -> None:
    empty = {name: [[0] * 4] * 2 for name in MAPS}
    write(prediction, empty)
    evaluate(prediction, reference, tmp_path / "out")
    found = metrics(tmp_path / "out")
    assert (found["all"]["pq"], found["ap"], found["miou"]) == (0.0, 0.0, 0.0)
    assert len(found["notes"]) == 3
    write(reference, empty, categories=CATEGORIES)
    evaluate(prediction, reference, tmp_path / "out")
    found = metrics(tmp_path / "out")
    assert found["all"] == {"pq": None, "sq": None, "rq": None, "n": 0}
    assert (found["ap"], found["miou"]) == (None, None)


def test_the_command_line_evaluates_and_refuses(
    prediction: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "evaluate",
        "--task",
        "panoptic",
        "--prediction",
        str(prediction),
        "--reference",
        str(reference),
    ]
    command += ["--output", str(tmp_path / "out")]
    assert main([*command, "--images", str(tmp_path / "photos"), "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "0.900" in shown
    assert "report.html" in shown
    assert main([*command, "--baseline", str(prediction)]) == 2
    assert "--baseline: found with --task panoptic, expected with --task volumes" in capsys.readouterr().err
    volumes = [part if part != "panoptic" else "volumes" for part in command]
    assert main([*volumes, "--images", str(tmp_path)]) == 2
    assert "expected with --task panoptic alone" in capsys.readouterr().err
    write_ids(prediction.with_suffix("") / "a.png", np.full((2, 4), 9))
    assert main(command) == 2
    assert "ids 9 that no segment" in capsys.readouterr().err


def test_check_takes_a_file_or_a_folder_of_them(
    prediction: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(reference), "--images", str(tmp_path / "photos")]) == 0
    assert "errors: 0, warnings and notes: 0" in capsys.readouterr().out
    write_ids(reference.with_suffix("") / "a.png", np.full((2, 4), 9))
    assert main(["check", str(reference)]) == 1
    assert "errors: 2" in capsys.readouterr().out
    assert main(["check", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "prediction.json: errors: 0" in shown.replace("\n", "")
    assert main(["check", str(reference), "--repair"]) == 2
    reference.write_text("[]")
    assert main(["check", str(reference)]) == 2


def test_check_takes_the_root_of_a_data_set(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    reference.rename(root / "annotations/panoptic_val2017.json")
    reference.with_suffix("").rename(root / "annotations/panoptic_val2017")
    assert main(["check", str(root)]) == 1, "photos of this layout are in val2017"
    (tmp_path / "photos").rename(root / "val2017")
    capsys.readouterr()
    assert main(["check", str(root)]) == 0
    assert "panoptic_val2017.json: errors: 0" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.shared
def test_real_predictions_that_are_the_reference_are_perfect(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "coco_panoptic_mini"
    file = root / "annotations" / "panoptic_val2017.json"
    content = json.loads(file.read_text())
    part = content | {"annotations": content["annotations"][:5]}
    for name in ("reference", "prediction"):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
        (tmp_path / name).symlink_to(file.with_suffix(""))
    evaluate(
        tmp_path / "prediction.json", tmp_path / "reference.json", tmp_path / "out", images=root / "val2017"
    )
    found = metrics(tmp_path / "out")
    assert (found["all"]["pq"], found["things"]["pq"], found["stuff"]["pq"]) == (1.0, 1.0, 1.0)
    assert (found["ap"], found["miou"]) == (1.0, 1.0)
