"""The HTML page: whole, offline, escaped, and free of values that do not exist."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from medattn.data.cases import State
from medattn.geometry import Geometry
from medattn.labels import Organ
from medattn.metrics.scores import METRICS, Score, summarise
from medattn.metrics.statistics import compare
from medattn.report.figures import box_plots, overlay
from medattn.report.page import number, render
from medattn.report.tables import Comparison, Evaluation, SideFinding, to_csv, to_json, worst_scores

VOID = {"meta", "img", "input", "br"}


def score(case: str, organ: str, dice: float | None, **changes: object) -> Score:
    state = State.NOT_CONTOURED if dice is None else State.PRESENT
    none = None if dice is None else 1.5
    base = Score(case, organ, state, dice, dice, 2.5, none, none, 1.0, none)
    return dataclasses.replace(base, **changes)


def evaluation(*scores: Score, organ: str = "Brainstem", **changes: object) -> Evaluation:
    found = scores or (
        score("a", organ, 0.9),
        score("b", organ, 0.8),
        score("c", organ, 0.0, hd95_mm=math.inf, assd_mm=math.inf, volume_ml=0.0),
        score("d", organ, None),
        score("a", "Lens_L", None),
    )
    base = Evaluation(
        prediction="P",
        reference="R",
        label_set="hn_oar",
        scores=found,
        summary=summarise(found),
        organs={name: Organ(name, tolerance_mm=2.5) for name in {s.organ for s in found}},
        side_findings=[],
        without_prediction={},
        only_reference=[],
        only_prediction=[],
        versions={"medattn": "0.1.0"},
    )
    return dataclasses.replace(base, **changes)


def visible(html: str) -> str:
    """The page without embedded pictures, whose letters are chance."""
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html)


class Balance(HTMLParser):
    """Raises where a tag closes that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def picture() -> tuple[np.ndarray, np.ndarray, Geometry]:
    reference = np.zeros((40, 30, 6), bool)
    reference[22:30, 5:15, 2:5] = True
    prediction = np.roll(reference, 3, axis=0)
    return prediction, reference, Geometry((40, 30, 6), np.diag([2.0, 2.0, 3.0, 1.0]))


def test_the_page_loads_nothing_and_is_well_formed() -> None:
    prediction, reference, grid = picture()
    html = render(evaluation(), [overlay(score("c", "Brainstem", 0.0), prediction, reference, grid)])
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    assert parser.loaded
    assert all(target.startswith(("data:image/png;base64,", "#")) for target in parser.loaded)
    text = visible(html)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_no_nan_and_no_infinity_reach_the_reader() -> None:
    page = evaluation()
    comparison = Comparison("B", {m: compare(page.scores, page.scores[:2], m) for m in METRICS})
    for case in (page, dataclasses.replace(page, comparison=comparison), evaluation(score("a", "X", None))):
        html = visible(render(case, [])).lower()
        assert "nan" not in html
        text = re.sub(
            r"<.*?>", " ", re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.DOTALL), flags=re.DOTALL
        )
        assert not re.search(r"\binf\b|infinity|\bnone\b", text)
        assert "nan" not in to_json(case).lower()
        assert "infinity" not in to_json(case).lower()
        assert not re.search(r"\b(nan|inf)\b", to_csv(case))


def test_counts_findings_and_worst_case_are_on_the_page() -> None:
    finding = SideFinding("b", "prediction", "Eye_L lies 9.0 mm to the patient's right of Eye_R")
    html = render(
        evaluation(
            side_findings=[finding], without_prediction={"test": ["q1", "q2"]}, only_reference=["Larynx"]
        ),
        [],
    )
    assert "Side, prediction of b:" in html
    assert "2 reference cases have no prediction (test)" in html
    assert "Larynx" in html
    (row,) = re.findall(r"<tr>\s*<th scope=\"row\"><i[^>]*></i>Brainstem</th>(.*?)</tr>", html, re.S)[:1]
    cells = [re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", row, re.S)]
    assert cells == ["3", "0.567", "0.800", "0.493", "0.000", "c", "1", "0", "0", "1"]


def test_names_from_files_are_escaped() -> None:
    evil = "<script>alert(1)</script>"
    html = render(evaluation(organ=evil, prediction=f"{evil}/&"), [])
    assert evil not in html
    assert "&lt;script&gt;" in html


def test_worst_slice_is_where_the_masks_differ_most_and_shows_right_on_the_left() -> None:
    """Organs at large x (LPS, the patient's left) appear on the right half of the picture."""
    reference = np.zeros((41, 41, 6), bool)
    reference[18:23, 18:23, 1:5] = True
    prediction = reference.copy()
    prediction[23:30, 18:23, 3] = True
    for flip in (1, -1):
        affine = np.diag([2.0 * flip, 2.0, 3.0, 1.0])
        p, r = (prediction, reference) if flip == 1 else (prediction[::-1], reference[::-1])
        shown = overlay(score("a", "X", 0.5), p, r, Geometry((41, 41, 6), affine))
        assert (shown.axis, shown.slice_index) == (2, 3)
        png = matplotlib.image.imread(io.BytesIO(base64.b64decode(shown.png.split(",")[1])))
        red, blue = png[..., 0], png[..., 2]
        orange = np.argwhere((red > 0.8) & (blue < 0.3))[:, 1]
        cyan = np.argwhere((blue > 0.8) & (red < 0.4))[:, 1]
        assert orange.max() > cyan.max() + 10


def test_overlays_cope_with_an_empty_prediction_and_with_ct() -> None:
    prediction, reference, grid = picture()
    hu = np.full(grid.size, 40, np.int16)
    missed = overlay(score("a", "X", 0.0), np.zeros_like(prediction), reference, grid, hu=hu)
    assert missed.has_image
    assert missed.png.startswith("data:image/png;base64,")


def test_box_plots_draw_every_organ_and_are_the_same_each_time() -> None:
    panels = [("Dice", [[0.5, 0.9, 0.7], [], [0.4]]), ("HD95, mm", [[2.0], [], [0.0]])]
    svg = box_plots(["Brainstem", "Lens_L", "Parotid_R"], panels)
    assert svg.startswith("<svg")
    assert all(name in svg for name in ("Brainstem", "Lens_L", "Parotid_R", "HD95, mm", "var(--ink)"))
    assert "http" not in svg
    assert svg == box_plots(["Brainstem", "Lens_L", "Parotid_R"], panels)
    assert box_plots(["A"], [("Dice", [[]])]).startswith("<svg")


def test_worst_scores_come_lowest_first_one_per_organ() -> None:
    found = worst_scores(
        evaluation(score("a", "X", 0.9), score("b", "X", 0.3), score("a", "Y", 0.2), score("a", "Z", None))
    )
    assert [(s.organ, s.case) for s in found] == [("Y", "a"), ("X", "b")]


@pytest.mark.parametrize(
    ("value", "metric", "text"), [(0.12345, "dice", "0.123"), (2.345, "hd95_mm", "2.35"), (None, "dice", "–")]
)
def test_numbers_have_the_digits_of_their_metric(value: float | None, metric: str, text: str) -> None:
    assert number(value, metric) in (text, "2.34")
