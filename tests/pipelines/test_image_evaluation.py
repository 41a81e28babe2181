"""`evaluate --task classification` on small folders: what is matched, refused and written."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from medattn.data.images.classes import Classes
from medattn.errors import InputError
from medattn.metrics.topk import calibration_error
from medattn_pipelines.cli import main
from medattn_pipelines.image_evaluation import evaluate, match
from medattn_pipelines.prediction_table import columns, read_predictions, write_predictions

CLASSES = Classes(("n1", "n2", "n3"), ("cat", "dog", "hen"))
COLOURS = {"n1": "red", "n2": "green", "n3": "blue"}
Row = tuple[str, list[tuple[str, float]]]
# three right, one wrong with much confidence
ROWS: list[Row] = [
    ("n1/a.png", [("n1", 0.9), ("n2", 0.1), ("n3", 0.0)]),
    ("n1/b.png", [("n1", 0.6), ("n3", 0.3), ("n2", 0.1)]),
    ("n2/c.png", [("n2", 0.5), ("n1", 0.25), ("n3", 0.25)]),
    ("n3/d.png", [("n1", 0.8), ("n3", 0.15), ("n2", 0.05)]),
]


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    for name, _ in ROWS:
        path = tmp_path / "R" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), COLOURS[name[:2]]).save(path)
    return tmp_path / "R"


@pytest.fixture
def prediction(tmp_path: Path) -> Path:
    write_predictions(tmp_path / "P", ROWS, CLASSES)
    return tmp_path / "P"


def metrics(output: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.json")

    return json.loads((output / "metrics.json").read_text(), parse_constant=refuse)


def problems(*arguments: object, **options: object) -> Sequence[str]:
    with pytest.raises(InputError) as error:
        evaluate(*arguments, **options)  # type: ignore[arg-type]
    return error.value.problems


def table(folder: Path, *lines: str, head: str | None = None) -> Path:
    """A folder of predictions with these rows as text."""
    folder.mkdir(exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(dict(zip(CLASSES.wnids, CLASSES.names, strict=True))))
    (folder / "predictions.csv").write_text("\n".join([head or ",".join(columns(3)), *lines]) + "\n")
    return folder


def test_all_three_files_and_the_scores_in_them(prediction: Path, reference: Path, tmp_path: Path) -> None:
    found = evaluate(prediction, reference, tmp_path / "out")
    content = metrics(tmp_path / "out")
    assert (content["n"], content["top1"], content["top5"]) == (4, 0.75, 1.0)
    scores = torch.tensor([[dict(best)[wnid] for wnid in CLASSES.wnids] for _, best in ROWS]).double()
    assert content["ece"] == pytest.approx(calibration_error(scores, torch.tensor([0, 0, 1, 2])))
    assert content["per_class"]["n1"] == {
        "name": "cat", "n": 2, "top1": 1.0, "top5": 1.0, "predicted": 3, "precision": 2 / 3
    }  # fmt: skip
    assert content["confusions"] == [{"true": "n3", "predicted": "n1", "n": 1, "share": 1.0}]
    assert "real" not in content
    assert content["top1"] == found.top1
    with (tmp_path / "out" / "metrics.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["cat", "dog", "hen"]
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("data:image/jpeg;base64,") == 1
    assert not list(tmp_path.rglob(".writing-*"))


def test_what_was_written_is_read_back_exactly(prediction: Path) -> None:
    found = read_predictions(prediction / "predictions.csv", CLASSES)
    assert [
        (name, [(CLASSES.wnids[c], p) for c, p in zip(*pair, strict=True)])
        for name, *pair in zip(found.names, found.best.tolist(), found.probability.tolist(), strict=True)
    ] == ROWS
    assert json.loads((prediction / "classes.json").read_text()) == {"n1": "cat", "n2": "dog", "n3": "hen"}


def test_neither_the_order_of_rows_nor_how_images_are_named_matters(reference: Path, tmp_path: Path) -> None:
    """Paths from elsewhere, bare file names and the table instead of its folder give the same files."""
    outputs = []
    renamed = [("somewhere/R/n1/a.png", ROWS[0][1]), ("b.png", ROWS[1][1]), *ROWS[2:]]
    for number, rows in enumerate((ROWS, renamed[::-1])):
        path = write_predictions(tmp_path / "P", rows, CLASSES)
        evaluate(path if number else path.parent, reference, tmp_path / f"out{number}")
        outputs.append([file.read_bytes() for file in sorted((tmp_path / f"out{number}").iterdir())])
    assert outputs[0] == outputs[1]


def test_a_file_name_that_several_images_have_means_none() -> None:
    known = ["cat/1.png", "dog/1.png", "dog/2.png"]
    assert match(["1.png", "2.png", "dog/1.png", "hen/2.png", "", "3.png"], known) == [
        *(None, 2, 1, 2, None, None)
    ]


def test_columns_that_others_add_do_no_harm(tmp_path: Path, reference: Path) -> None:
    """Such as the unnamed one of pandas, in front of a mark of where the text begins."""
    lines = (
        f"{number},{name},{','.join(f'{wnid},{p}' for wnid, p in best)},new"
        for number, (name, best) in enumerate(ROWS)
    )
    folder = table(tmp_path / "P", *lines, head=f"\ufeff,{','.join(columns(3))},note")
    assert evaluate(folder, reference, tmp_path / "out").top1 == 0.75


def test_more_classes_than_the_reference_has_are_fine(tmp_path: Path, reference: Path) -> None:
    many = Classes.of([*CLASSES.wnids, *(f"n{number}" for number in range(4, 10))])
    rest = [("n5", 0.0), ("n6", 0.0)]
    rows = [(name, [(wnid, p / 2) for wnid, p in best] + rest) for name, best in ROWS]
    evaluate(write_predictions(tmp_path / "P", rows, many), reference, tmp_path / "out")
    content = metrics(tmp_path / "out")
    assert (content["n_classes"], list(content["per_class"])) == (9, ["n1", "n2", "n3"])


def test_a_flat_folder_with_ground_truth(prediction: Path, reference: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, _ in ROWS:
        shutil.copy(reference / name, flat)
    labels = tmp_path / "truth.txt"
    labels.write_text("\n".join(f"{name[3:]} {name[:2]}" for name, _ in ROWS))
    found = evaluate(prediction, flat, tmp_path / "out", ground_truth=labels)
    assert (found.top1, found.n) == (0.75, 4)
    assert "for the flat official validation images give their labels" in problems(
        prediction, flat, tmp_path / "no"
    )[0]  # fmt: skip


def test_images_on_one_side_alone_and_twice_are_all_named(reference: Path, tmp_path: Path) -> None:
    rows = [*ROWS[:2], ("a.png", ROWS[0][1]), ("n1/z.png", ROWS[0][1]), ("n2/y.png", ROWS[0][1])]
    write_predictions(tmp_path / "P", rows, CLASSES)
    strangers, twice, missing = problems(tmp_path / "P", reference, tmp_path / "out")
    assert "images that are not in" in strangers
    assert "2 (n1/z.png, n2/y.png), expected paths such as n1/a.png" in strangers
    assert "images in several rows: 1 (n1/a.png)" in twice
    assert "no prediction of 2 of the 4 images" in missing
    assert "(n2/c.png, n3/d.png)" in missing
    assert not (tmp_path / "out").exists()


def test_an_image_that_nobody_can_decode_needs_no_prediction(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_predictions(tmp_path / "P", ROWS, CLASSES)
    (reference / "n2/broken.png").write_bytes(b"no picture")
    arguments = ["--prediction", str(tmp_path / "P"), "--reference", str(reference)]
    out = tmp_path / "out"
    assert main(["evaluate", "--task", "classification", *arguments, "--output", str(out)]) == 0
    content = metrics(out)
    assert content["n"] == 4
    assert [image["name"] for image in content["unreadable"]] == ["n2/broken.png"]
    assert "cannot be decoded and count nowhere: 1 (n2/broken.png: " in capsys.readouterr().out
    assert "n2/broken.png</strong> cannot be decoded" in (out / "report.html").read_text()


BAD_ROWS = {
    "unknown": (
        "n1/a.png,n9,0.5,n2,0.3,n8,0.2",
        r"1 row with classes that classes\.json .* \(line 2: n9, n8\)",
    ),
    "twice": ("n1/a.png,n1,0.5,n1,0.3,n3,0.2", r"1 row naming a class twice \(line 2: n1, n1, n3\)"),
    "above": (
        "n1/a.png,n1,1.5,n2,0.3,n3,0.2",
        r"outside 0 to 1 \(line 2: 1\.5, 0\.3, 0\.2\); apply a softmax",
    ),
    "below": ("n1/a.png,n1,0.5,n2,0.3,n3,-0.2", r"outside 0 to 1 \(line 2: 0\.5, 0\.3, -0\.2\)"),
    "nan": ("n1/a.png,n1,nan,n2,0.3,n3,0.2", r"outside 0 to 1 \(line 2: nan"),
    "sum": ("n1/a.png,n1,0.9,n2,0.3,n3,0.2", r"sum to more than 1 \(line 2: 0\.9, 0\.3, 0\.2\)"),
    "order": ("n1/a.png,n1,0.2,n2,0.3,n3,0.1", r"do not fall \(line 2: 0\.2, 0\.3, 0\.1\)"),
    "word": ("n1/a.png,n1,high,n2,0.3,n3,0.2", r"a probability that is no number \(line 2\)"),
    "short": ("n1/a.png,n1,0.5", r"1 row without one value in each column \(line 2\)"),
    "long": ("n1/a.png,n1,0.5,n2,0.3,n3,0.2,n1,0.1", r"without one value in each column \(line 2\)"),
    "nameless": (",n1,0.5,n2,0.3,n3,0.2", r"without one value in each column \(line 2\)"),
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_named(row: str, tmp_path: Path, reference: Path) -> None:
    text, message = BAD_ROWS[row]
    with pytest.raises(InputError, match=message):
        evaluate(table(tmp_path / "P", text), reference, tmp_path / "out")


def test_every_kind_of_problem_comes_once_with_its_first_lines(tmp_path: Path, reference: Path) -> None:
    high, unordered = "x.png,n1,1.5,n2,0.3,n3,0.2", "y.png,n1,0.2,n2,0.3,n3,0.1"
    outside, falling = problems(table(tmp_path / "P", *[high] * 7, unordered), reference, tmp_path / "out")
    assert "7 rows with probabilities outside 0 to 1 (line 2: 1.5" in outside
    assert "; ...)" in outside
    assert "1 row whose probabilities do not fall (line 9" in falling


def test_the_reference_and_the_table_are_complained_of_together(tmp_path: Path, reference: Path) -> None:
    (reference / "n7").mkdir()
    Image.new("RGB", (8, 8)).save(reference / "n7/x.png")
    first, second = problems(
        table(tmp_path / "P", "n1/a.png,n1,1.5,n2,0.3,n3,0.2"), reference, tmp_path / "out"
    )
    assert "1 wnids that are not among the 3 classes (n7)" in first
    assert "outside 0 to 1" in second


def empty(folder: Path) -> None:
    (folder / "predictions.csv").write_text("")


def headed(folder: Path) -> None:
    table(folder)


def narrow(folder: Path) -> None:
    table(folder, "n1/a.png,n1,0.5", head="image,class_1,probability_1")


def missing(folder: Path) -> None:
    (folder / "predictions.csv").unlink()


def no_classes(folder: Path) -> None:
    (folder / "classes.json").unlink()


def broken_classes(folder: Path) -> None:
    (folder / "classes.json").write_text("[1, 2]")


def binary(folder: Path) -> None:
    (folder / "predictions.csv").write_bytes(bytes(range(256)) * 4)


def nowhere(folder: Path) -> None:
    shutil.rmtree(folder)


BAD_FILES = {
    nowhere: r"P: no such folder, expected one with predictions\.csv and classes\.json",
    empty: r"no column image, class_1, .* found an empty file; expected image",
    headed: r"no image in it, expected one row per image",
    narrow: r"no column class_2, probability_2, class_3, probability_3, found image, class_1, probability_1",
    missing: r"predictions\.csv: cannot be read",
    no_classes: r"classes\.json: no class list",
    broken_classes: r"classes\.json: no class list \(no object of strings\)",
    binary: r"predictions\.csv: (no column|cannot be read)",
}


@pytest.mark.parametrize("spoil", BAD_FILES)
def test_bad_files_are_one_sentence_and_code_2(  # type: ignore[no-untyped-def]
    spoil, prediction: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(prediction)
    with pytest.raises(InputError, match=BAD_FILES[spoil]):
        evaluate(prediction, reference, tmp_path / "out")
    arguments = [
        "--prediction",
        str(prediction),
        "--reference",
        str(reference),
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(["evaluate", "--task", "classification", *arguments]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def imagenet(folder: Path, real: Mapping[int, list[int]]) -> tuple[Path, Path, Path]:
    """Predictions of a model of 1000 classes: two images, of class 7 and 8, both called class 7."""
    classes = Classes.of(f"n{number:08}" for number in range(1000))
    best = [(classes.wnids[c], p) for c, p in ((7, 0.6), (8, 0.2), (1, 0.1), (2, 0.05), (3, 0.05))]
    rows = []
    for number, target in ((1, 7), (2, 8)):
        name = f"{classes.wnids[target]}/ILSVRC2012_val_{number:08}.png"
        (folder / "R" / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "R" / name)
        rows.append((name, best))
    (folder / "real.json").write_text(json.dumps([real.get(number, []) for number in (1, 2)]))
    return write_predictions(folder / "P", rows, classes), folder / "R", folder / "real.json"


def test_reassessed_labels_accept_several_classes_and_skip_images_without(tmp_path: Path) -> None:
    table, reference, real = imagenet(tmp_path, {1: [3], 2: [8, 7]})
    found = evaluate(table, reference, tmp_path / "out", real=real)
    assert (found.top1, found.top5) == (0.5, 1.0)
    assert metrics(tmp_path / "out")["real"] == {"top1": 0.5, "n": 2}
    real.write_text("[[], []]")
    evaluate(table, reference, tmp_path / "out", real=real)
    assert metrics(tmp_path / "out")["real"] == {"top1": None, "n": 0}
    for text in ("{}", "[1, 2]", '[["x"], [1]]', "[[7]]", "no json"):
        real.write_text(text)
        with pytest.raises(InputError, match=r"real\.json"):
            evaluate(table, reference, tmp_path / "out", real=real)


def test_reassessed_labels_need_the_classes_of_imagenet(
    prediction: Path, reference: Path, tmp_path: Path
) -> None:
    (tmp_path / "real.json").write_text("[[1]]")
    (found,) = problems(prediction, reference, tmp_path / "out", real=tmp_path / "real.json")
    assert "ReaL labels count ImageNet's 1000 classes, found 3 in the predictions" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--real", "real.json"], "--real: found with --task volumes"),
        (["--ground-truth", "x"], "--ground-truth: found with --task volumes"),
        (["--task", "classification", "--baseline", "x"], "--baseline: found with --task classification"),
        (["--task", "segmentation"], "invalid choice"),
    ],
)
def test_options_of_another_task_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--prediction", "P", "--reference", "R", "--output", "O", *arguments]
    try:
        code = main(command)
    except SystemExit as stop:  # argparse's own complaint
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    assert message in capsys.readouterr().err
    assert not Path("O").exists()


def test_names_that_are_no_text_survive(tmp_path: Path) -> None:
    name = b"R/n1/\xe4.png".decode("utf-8", "surrogateescape")
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(path, "PNG")
    write_predictions(tmp_path / "P", [("n1/" + path.name, ROWS[3][1])], CLASSES)
    found = evaluate(tmp_path / "P", tmp_path / "R", tmp_path / "out")
    assert (found.n, found.top1) == (1, 1.0)
