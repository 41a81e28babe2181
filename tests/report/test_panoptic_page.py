"""The panoptic report: its numbers and files, the page whole and offline, and the overlays."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from medattn.metrics.instance_precision import ImageInstances, average_precision, instances
from medattn.metrics.panoptic_quality import count
from medattn.panoptic import Categories, Category, Segment
from medattn.report.figures import jpeg
from medattn.report.panoptic import COLUMNS, PanopticEvaluation, to_csv, to_json
from medattn.report.panoptic_overlay import BORDER, overlay
from medattn.report.panoptic_page import THUMBNAIL, Shown, pictures, quality_figure, render

CATEGORIES = Categories(
    (
        Category(17, "cat", True, (200, 40, 40)),
        Category(3, "sky", False, (40, 40, 200)),
        Category(18, "dog", True, (40, 200, 40)),
    )
)
UNCLOSED = {"meta", "img", "input", "br"}
CAT, SKY = Segment(1, 17), Segment(2, 3)


def evaluation(**changes: object) -> PanopticEvaluation:
    """Three images: cat and sky as they are; the cat too large, 2 pixels for 1; no segments at all."""
    good = np.array([[1, 1, 2, 2]])
    small, large = np.array([[1, 2, 2, 2]]), np.array([[1, 1, 2, 2]])
    nothing = np.zeros((1, 4), np.int64)
    pairs = [(good, good, [CAT, SKY]), (large, small, [CAT, SKY]), (nothing, nothing, [])]
    things = [
        ImageInstances((1, 4), *(instances(ids, segments, CATEGORIES) for ids in (said, true)))
        for said, true, segments in pairs
    ]
    base = PanopticEvaluation(
        prediction="P.json",
        reference="R.json",
        categories=CATEGORIES,
        images=[("a", "a.png"), ("b", "b.png"), ("c", "c.png")],
        counts=[count(said, segments, true, segments, CATEGORIES) for said, true, segments in pairs],
        precision=average_precision(things, CATEGORIES),
        instances=2,
        unscored=2,
        versions={"medattn": "0.1.0"},
    )
    return dataclasses.replace(base, **changes)


def content(found: PanopticEvaluation) -> dict:
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
        if tag not in UNCLOSED:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def shown(found: PanopticEvaluation, place: int, photo: Image.Image | None = None) -> Shown:
    ids = np.repeat(np.repeat([[1, 2]], 30, 0), 40, 1)
    return pictures(found.per_image[place], photo, (ids, [CAT, SKY]), (ids, [CAT, SKY]), CATEGORIES)


def test_three_images_in_closed_form() -> None:
    """The second cat has an IoU of 1/2, which is no match; its sky has 2/3."""
    found = evaluation()
    cat, sky, dog = found.per_class
    assert (cat.tp, cat.fp, cat.fn, cat.quality.pq, cat.quality.sq) == (1, 1, 1, 0.5, 1.0)
    assert (sky.tp, sky.fp, sky.fn) == (2, 0, 0)
    assert sky.quality.pq == pytest.approx(5 / 6)
    assert (dog.quality.pq, dog.quality.n, dog.ap, dog.semantic_iou) == (None, 0, None, None)
    assert found.all.pq == pytest.approx((0.5 + 5 / 6) / 2)
    assert (found.all.n, found.things.n, found.stuff.n, found.things.pq) == (2, 1, 1, 0.5)
    assert found.miou == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert [score.pq for score in found.per_image] == [1.0, pytest.approx((2 / 3) / 2), None]
    assert found.worst == [1, 0], "an image without segments has no quality"
    assert cat.ap == pytest.approx((1 + 9 * 51 / 101) / 10), "1/2 is a match at COCO's lowest threshold"


def test_json_is_whole_and_in_full_precision() -> None:
    found = evaluation()
    whole = content(found)
    assert whole["all"] == {"pq": found.all.pq, "sq": found.all.sq, "rq": found.all.rq, "n": 2}
    assert set(whole) >= {"schema", "things", "stuff", "per_class", "miou", "ap", "ap50", "ap75", "versions"}
    assert whole["schema"] == "medattn.panoptic_evaluation/1"
    assert list(whole["per_class"]) == ["17", "3", "18"]
    absent = whole["per_class"]["18"]
    assert [absent[key] for key in ("name", "isthing", "pq", "n", "tp", "ap")] == ["dog", 1, 0.0, 0, 0, None]
    assert (whole["instances"], whole["instances_without_score"]) == (2, 2)
    assert [image["pq"] for image in whole["per_image"]] == [score.pq for score in found.per_image]


def test_csv_has_a_row_per_class_and_empty_fields_where_nothing_is() -> None:
    found = evaluation()
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert tuple(rows[0]) == COLUMNS
    assert [row["name"] for row in rows] == ["cat", "sky", "dog"]
    assert float(rows[1]["pq"]) == found.per_class[1].quality.pq
    assert (rows[2]["pq"], rows[2]["ap"], rows[2]["tp"]) == ("", "", "0")


def test_the_page_loads_nothing_is_well_formed_and_the_same_each_time() -> None:
    found = evaluation(notes=["something to know"] * 25)
    images = [shown(found, 1, Image.new("RGB", (80, 30), "teal")), shown(found, 0)]
    html = render(found, images)
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    assert sum(target.startswith("data:image/jpeg;base64,") for target in parser.loaded) == 5
    assert all(target.startswith(("data:image/jpeg;base64,", "#")) for target in parser.loaded)
    text = re.sub(r"data:image/jpeg;base64,[\w+/=]*", "", html)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    words = re.sub(r"<(style|script)>.*?</\1>|<.*?>", " ", text, flags=re.DOTALL).lower()
    assert not re.search(r"\b(nan|none|inf|null)\b", words)
    assert "and 5 more, all in metrics.json" in html
    assert "no scores" in html
    assert "2 of 2 predicted instances" in " ".join(words.split())
    assert html == render(evaluation(notes=found.notes), images)


def test_the_worst_image_and_class_come_first() -> None:
    found = evaluation()
    html = render(found, [shown(found, place) for place in found.worst])
    assert html.index("b.png") < html.index("a.png")
    assert html.index("</span>cat</th>") < html.index("</span>sky</th>")
    assert "</span>dog</th>" not in html, "a class without segments is in no table"


def test_an_evaluation_of_nothing_has_a_page_too() -> None:
    found = evaluation()
    empty = evaluation(images=found.images[2:], counts=found.counts[2:], instances=0, unscored=0)
    empty = dataclasses.replace(empty, precision=average_precision([], CATEGORIES))
    assert (empty.all.pq, empty.miou, empty.worst) == (None, None, [])
    html = render(empty, [])
    assert "Images, the worst first" not in html
    assert "Quality by class" not in html
    assert content(empty)["all"] == {"pq": None, "sq": None, "rq": None, "n": 0}


def test_names_are_escaped_on_the_page_and_in_the_figure() -> None:
    evil = "<script>alert(1)</script>$x^$"
    members = (dataclasses.replace(CATEGORIES[0], name=evil), *CATEGORIES.members[1:])
    found = evaluation(categories=Categories(members), prediction=evil, notes=[evil])
    html = render(
        found,
        [dataclasses.replace(shown(found, 0), score=dataclasses.replace(found.per_image[0], file_name=evil))],
    )
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert "http" not in quality_figure(found.per_class[:2])


def test_thumbnails_are_small_and_both_sides_have_one_size() -> None:
    ids = np.ones((2000, 1000), np.int32)
    found = evaluation()
    image = pictures(found.per_image[0], None, (ids, [CAT]), (ids, [CAT]), CATEGORIES)
    assert image.photo == ""
    assert image.reference == image.prediction
    tiny = pictures(found.per_image[0], None, (ids[:1, :1], [CAT]), (ids[:1, :1], [CAT]), CATEGORIES)
    assert tiny.reference == jpeg(
        overlay(Image.new("RGB", (1, 1), (128,) * 3), ids[:1, :1], [CAT], CATEGORIES)
    )
    assert len(image.reference) < THUMBNAIL**2


def test_segments_get_their_colour_void_gets_darker_and_borders_lie_between() -> None:
    ids = np.zeros((40, 60), np.int32)
    ids[:, 20:40] = 2**24 - 1
    grey = Image.new("RGB", (60, 40), (100, 100, 100))
    found = np.asarray(overlay(grey, ids, [Segment(2**24 - 1, 18)], CATEGORIES)).astype(int)
    assert found.shape == (40, 60, 3)
    assert found[2, 2].tolist() == [35, 35, 35]
    assert found[2, 25].tolist() == [67, 155, 67], "0.45 of the photo and 0.55 of the category"
    assert (found[2, 20] > 0.7 * np.array(BORDER)).all()
    assert (found[2, 40] > 0.7 * np.array(BORDER)).all()
    alone = np.asarray(overlay(grey, ids * 0, [], CATEGORIES))
    assert (alone == 35).all()


def test_instances_of_a_category_are_told_apart_and_stay_the_same() -> None:
    ids = np.repeat(np.arange(1, 6), 3)[None].repeat(3, 0)
    segments = [Segment(number, 17) for number in range(1, 6)]
    black = Image.new("RGB", (15, 3))
    found = overlay(black, ids, segments, CATEGORIES)
    colours = {found.getpixel((3 * n + 1, 2)) for n in range(5)}
    assert len(colours) == 5
    assert found.tobytes() == overlay(black, ids, segments, CATEGORIES).tobytes()


def test_names_stand_on_large_segments_alone_and_never_on_each_other() -> None:
    ids = np.ones((200, 300), np.int32)
    ids[:5, :5] = 2
    plain = Image.new("RGB", (300, 200), (90, 90, 90))
    named = np.asarray(overlay(plain, ids, [Segment(1, 3), Segment(2, 17)], CATEGORIES)).astype(int)
    flat = np.array([round(0.45 * 90 + 0.55 * part) for part in CATEGORIES[1].colour])
    written = (np.abs(named - flat).max(-1) > 60)[8:]
    rows, columns = np.nonzero(written)
    assert written.any(), "the sky's name"
    assert rows.max() - rows.min() < 30
    assert columns.max() - columns.min() < 60
    assert (named[written.nonzero()[0] + 8, written.nonzero()[1]].min(-1) > 200).any(), (
        "white on a dark colour"
    )
    assert (np.abs(named[:4, :4] - named[0, 0]) == 0).all(), "no name on 25 pixels"


def test_a_photo_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one size"):
        overlay(Image.new("RGB", (3, 2)), np.zeros((3, 2), np.int32), [], CATEGORIES)
