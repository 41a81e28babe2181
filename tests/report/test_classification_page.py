"""A classifier's report: scores against closed forms and scikit-learn; the page whole, offline, escaped."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from medattn.data.images.classes import Classes
from medattn.data.images.reading import Skipped
from medattn.metrics.topk import calibration_error
from medattn.report.classification import COLUMNS, Bin, ImageEvaluation, Real, to_csv, to_json
from medattn.report.classification_page import reliability_diagram, render, thumbnail

VOID = {"meta", "img", "input", "br"}
CLASSES = Classes(("n1", "n2", "n3"), ("cat", "dog", "n3"))


def evaluation(**changes: object) -> ImageEvaluation:
    """Four images of two classes, the third has none: right 0.9, right 0.6, wrong 0.9 and wrong 0.5."""
    base = ImageEvaluation(
        prediction="P",
        reference="R",
        classes=CLASSES,
        names=["n1/a.png", "n1/b.png", "n2/c.png", "n2/d.png"],
        target=np.array([0, 0, 1, 1]),
        best=np.array([[0, 1], [0, 2], [0, 1], [0, 2]]),
        probability=np.array([[0.9, 0.05], [0.6, 0.4], [0.9, 0.1], [0.5, 0.3]]),
        versions={"medattn": "0.1.0"},
    )
    return dataclasses.replace(base, **changes)


def drawn(images: int, classes: int, seed: int) -> tuple[np.ndarray, ImageEvaluation]:
    """All probabilities, and the evaluation that knows the best five."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(images, classes)) * 2)
    probability = logits.softmax(1)
    target = rng.integers(0, classes, images)
    best = probability.topk(5)
    wnids = [f"n{number:03}" for number in range(classes)]
    return probability.numpy(), evaluation(
        classes=Classes.of(wnids),
        names=[f"{wnids[t]}/{number}.png" for number, t in enumerate(target)],
        target=target,
        best=best.indices.numpy(),
        probability=best.values.numpy(),
    )


def content(found: ImageEvaluation) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.json")

    return json.loads(to_json(found), parse_constant=refuse)


class Balance(HTMLParser):
    """Raises where a tag closes that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_four_images_in_closed_form() -> None:
    found = evaluation()
    assert (found.n, found.top1, found.top5) == (4, 0.5, 0.75)
    # two at 0.9, half of them right; one right at 0.6; one wrong at 0.5
    assert found.ece == pytest.approx(2 / 4 * 0.4 + 1 / 4 * 0.4 + 1 / 4 * 0.5)
    cat, dog = found.per_class
    assert (cat.n, cat.top1, cat.top5, cat.predicted, cat.precision) == (2, 1.0, 1.0, 4, 0.5)
    assert (dog.n, dog.top1, dog.top5, dog.predicted, dog.precision) == (2, 0.0, 0.5, 0, None)
    assert [dataclasses.astuple(pair) for pair in found.confusions] == [(1, 0, 2, 1.0)]
    assert found.mistakes == [2, 3], "the most confident first"
    assert found.mean_per_class == 0.5


def test_the_best_five_classes_tell_what_all_tell() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    probability, found = drawn(400, 9, 0)
    labels, said = range(9), probability.argmax(1)
    for value, k in ((found.top1, 1), (found.top5, 5)):
        assert value == pytest.approx(
            metrics.top_k_accuracy_score(found.target, probability, k=k, labels=labels)
        )
    recall = metrics.recall_score(found.target, said, average=None)
    assert [score.top1 for score in found.per_class] == pytest.approx(recall.tolist())
    precision = metrics.precision_score(found.target, said, average=None)
    assert [score.precision for score in found.per_class] == pytest.approx(precision.tolist())
    matrix = metrics.confusion_matrix(found.target, said)
    assert all(pair.n == matrix[pair.true, pair.predicted] for pair in found.confusions)
    assert sum(pair.n for pair in found.confusions) == matrix.sum() - matrix.trace()
    assert found.confusions[0].n == (matrix - np.diag(matrix.diagonal())).max()
    whole = calibration_error(torch.from_numpy(probability), torch.from_numpy(found.target))
    assert found.ece == pytest.approx(whole)


def test_bins_of_the_calibration_equal_scikit_learn() -> None:
    calibration = pytest.importorskip("sklearn.calibration")
    _, found = drawn(300, 7, 1)
    accuracy, confidence = calibration.calibration_curve(
        found.right[:, 0], found.probability[:, 0], n_bins=15
    )
    filled = [entry for entry in found.bins if entry.n]
    assert [entry.accuracy for entry in filled] == pytest.approx(accuracy.tolist())
    assert [entry.confidence for entry in filled] == pytest.approx(confidence.tolist())
    assert sum(entry.n for entry in found.bins) == found.n


def test_json_is_whole_and_says_null_where_nothing_is() -> None:
    whole = content(evaluation(real=Real(None, 0), unreadable=[Skipped("n1/x.png", "no image")]))
    assert (whole["schema"], whole["n"], whole["n_classes"]) == ("medattn.image_evaluation/1", 4, 3)
    assert whole["real"] == {"top1": None, "n": 0}
    assert whole["per_class"]["n2"]["precision"] is None
    assert whole["per_class"]["n2"]["name"] == "dog"
    assert list(whole["per_class"]) == ["n1", "n2"], "a class without images has no score"
    assert whole["confusions"] == [{"true": "n2", "predicted": "n1", "n": 2, "share": 1.0}]
    assert whole["unreadable"] == [{"name": "n1/x.png", "reason": "no image"}]
    assert sum(entry["n"] for entry in whole["bins"]) == 4
    assert "real" not in content(evaluation())


def test_csv_and_json_have_full_precision() -> None:
    _, found = drawn(100, 7, 2)
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert tuple(rows[0]) == COLUMNS
    assert [float(row["top1"]) for row in rows] == [score.top1 for score in found.per_class]
    assert content(found)["ece"] == found.ece
    assert list(csv.DictReader(io.StringIO(to_csv(evaluation()))))[1]["precision"] == ""


def test_the_page_loads_nothing_is_well_formed_and_the_same_each_time() -> None:
    found = evaluation(real=Real(0.25, 4), unreadable=[Skipped("n1/x.png", "no image")] * 25)
    picture = thumbnail(Image.new("RGB", (40, 30), "red"))
    html = render(found, found.mistakes, {2: picture})
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    assert picture in parser.loaded
    assert all(target.startswith(("data:image/jpeg;base64,", "#")) for target in parser.loaded)
    text = html.replace(picture, "")
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    shown = re.sub(r"<(style|script)>.*?</\1>|<.*?>", " ", text, flags=re.DOTALL).lower()
    assert not re.search(r"\b(nan|none|inf|null)\b", shown)
    assert "and 5 more, all in metrics.json" in html
    assert "not readable" in html
    assert html == render(evaluation(real=Real(0.25, 4), unreadable=found.unreadable), [2, 3], {2: picture})


def test_the_worst_class_and_the_most_confident_mistake_come_first() -> None:
    found = evaluation()
    html = render(found, found.mistakes, {})
    assert html.index('<th scope="row">dog (n2)') < html.index('<th scope="row">cat (n1)')
    captions = re.findall(r"<figcaption>called <b>(.*?)</b> (.*?)\s*<span>is (.*?)</span>", html)
    assert captions == [("cat", "0.900", "dog"), ("cat", "0.500", "dog")]


def test_a_perfect_classifier_has_a_page_too() -> None:
    found = evaluation(target=np.array([0, 0, 0, 0]))
    assert (found.top1, found.confusions, found.mistakes) == (1.0, [], [])
    html = render(found, [], {})
    assert "Most confused" not in html
    assert "Most confident mistakes" not in html


def test_names_are_escaped_and_bytes_that_are_no_text_replaced() -> None:
    evil = "<script>alert(1)</script>"
    found = evaluation(
        classes=Classes(("n1", "n2", "n3"), (evil, evil, evil)),
        names=[evil, "b", f"{evil}/\udce4.png", "d"],
        prediction=evil,
        unreadable=[Skipped(evil, evil)],
    )
    html = render(found, found.mistakes, {})
    assert evil not in html
    assert "&lt;script&gt;" in html
    html.encode("utf-8")
    assert content(found)["n"] == 4


def test_the_diagram_follows_the_page_and_copes_with_one_bin() -> None:
    svg = reliability_diagram([Bin(0.0, 0.5, 0, None, None), Bin(0.5, 1.0, 3, 0.75, 1.0)])
    assert svg.startswith("<svg")
    assert "var(--accent)" in svg
    assert "http" not in svg


def test_thumbnails_keep_the_shape_of_the_image() -> None:
    assert thumbnail(Image.new("RGB", (1, 1))).startswith("data:image/jpeg;base64,")
    assert thumbnail(Image.new("RGB", (2000, 1))).startswith("data:image/jpeg;base64,")
