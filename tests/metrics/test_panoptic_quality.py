"""PQ against an evaluator written from its definition with dictionaries, closed forms, and real segments."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medattn.errors import InputError
from medattn.io.panoptic import PanopticFile, read_ids, read_panoptic
from medattn.metrics.panoptic_quality import (
    ClassCounts,
    Quality,
    add_up,
    class_iou,
    class_quality,
    contingency,
    count,
    mean_iou,
    mean_quality,
    pooled_quality,
)
from medattn.panoptic import VOID, Annotation, Categories, Category, Segment

CATEGORIES = Categories(
    tuple(
        Category(number, name, thing, (0, 0, 0))
        for number, name, thing in (
            (7, "cat", True),
            (1, "dog", True),
            (200, "sky", False),
            (13, "sea", False),
        )
    )
)
Picture = tuple[np.ndarray, list[Segment]]
ALL_IDS = (1, 2, 255, 256, 65_537, 256**3 - 1)


def picture(rows: Sequence[Sequence[int]], *segments: Segment) -> Picture:
    return np.array(rows, np.int32), list(segments)


def counted(prediction: Picture, reference: Picture) -> ClassCounts:
    return count(*prediction, *reference, CATEGORIES)


def by_definition(pairs: Sequence[tuple[Picture, Picture]], categories: Categories) -> dict[int, list[float]]:
    """Category id -> [sum of IoUs, TP, FP, FN]: pixels in dictionaries, one segment after the other."""
    found: dict[int, list[float]] = defaultdict(lambda: [0.0, 0, 0, 0])
    for (said, predicted), (true, expected) in pairs:
        together = Counter(zip(true.ravel().tolist(), said.ravel().tolist(), strict=True))
        area_true, area_said = Counter(true.ravel().tolist()), Counter(said.ravel().tolist())
        matched_true, matched_said = set(), set()
        for reference in expected:
            for prediction in predicted:
                if reference.crowd or reference.category != prediction.category:
                    continue
                shared = together[reference.id, prediction.id]
                union = area_true[reference.id] + area_said[prediction.id] - shared
                iou = shared / (union - together[VOID, prediction.id])
                if iou > 0.5:
                    found[reference.category][0] += iou
                    found[reference.category][1] += 1
                    assert reference.id not in matched_true
                    assert prediction.id not in matched_said
                    matched_true.add(reference.id)
                    matched_said.add(prediction.id)
        crowd = {reference.category: reference.id for reference in expected if reference.crowd}
        for reference in expected:
            if not reference.crowd and reference.id not in matched_true:
                found[reference.category][3] += 1
        for prediction in predicted:
            if prediction.id in matched_said:
                continue
            aside = together[VOID, prediction.id]
            if prediction.category in crowd:
                aside += together[crowd[prediction.category], prediction.id]
            if aside / area_said[prediction.id] <= 0.5:
                found[prediction.category][2] += 1
    return found


def class_map(ids: np.ndarray, segments: list[Segment]) -> np.ndarray:
    """Category ids, -1 for VOID."""
    category = {VOID: -1} | {segment.id: segment.category for segment in segments}
    return np.array([[category[number] for number in row] for row in ids.tolist()])


def quality_by_definition(found: dict[int, list[float]], chosen: Callable[[Category], bool]) -> Quality:
    rows = []
    for category in CATEGORIES:
        iou, tp, fp, fn = found[category.id]
        if chosen(category) and tp + fp + fn:
            below = tp + fp / 2 + fn / 2
            rows.append((iou / below, iou / tp if tp else 0.0, tp / below))
    if not rows:
        return Quality(None, None, None, 0)
    return Quality(*(sum(column) / len(rows) for column in zip(*rows, strict=True)), len(rows))


@st.composite
def pictures(draw: st.DrawFn, shape: tuple[int, int], crowds: bool) -> Picture:
    """Blocks of few ids, so that segments are large enough to match; any id may be VOID."""
    height, width = shape
    ids = draw(st.lists(st.sampled_from(ALL_IDS), unique=True, max_size=5))
    cells = st.sampled_from([VOID, *ids])
    block = draw(st.sampled_from((1, 2, 3)))
    size = (-(-height // block), -(-width // block))
    flat = draw(st.lists(cells, min_size=size[0] * size[1], max_size=size[0] * size[1]))
    coarse = np.array(flat, np.int32).reshape(size)
    found = np.kron(coarse, np.ones((block, block), np.int32))[:height, :width]
    return found, [
        Segment(number, draw(st.sampled_from((7, 1, 200, 13))), crowds and draw(st.integers(0, 4)) == 0)
        for number in draw(st.permutations(ids))
        if (found == number).any()
    ]


@st.composite
def compared(draw: st.DrawFn) -> tuple[Picture, Picture]:
    """A reference and a prediction: another picture, or the reference with some pixels exchanged."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    reference = draw(pictures(shape, crowds=True))
    if draw(st.booleans()):
        return draw(pictures(shape, crowds=False)), reference
    ids, segments = reference[0].copy(), reference[1]
    for _ in range(draw(st.integers(0, 12))):
        y, x = draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))
        ids[y, x] = draw(st.sampled_from([VOID, *(segment.id for segment in segments)]))
    return (ids, [Segment(s.id, s.category) for s in segments if (ids == s.id).any()]), reference


@given(st.lists(compared(), min_size=1, max_size=2))
def test_random_pictures_equal_the_definition(pairs: list[tuple[Picture, Picture]]) -> None:
    total = add_up([counted(prediction, reference) for prediction, reference in pairs])
    expected = by_definition(pairs, CATEGORIES)
    for n, category in enumerate(CATEGORIES):
        assert [total.tp[n], total.fp[n], total.fn[n]] == expected[category.id][1:]
        assert total.iou[n] == pytest.approx(expected[category.id][0], abs=1e-12)
    classes = class_quality(total)
    for chosen in (lambda c: True, lambda c: c.thing, lambda c: not c.thing):
        found = mean_quality([q for q, c in zip(classes, CATEGORIES, strict=True) if chosen(c)])
        wanted = quality_by_definition(expected, chosen)
        assert found.n == wanted.n
        if found.n:
            assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(wanted), abs=1e-12)
        else:
            assert found == wanted


@given(st.lists(compared(), min_size=1, max_size=2))
def test_mean_iou_is_that_of_maps_of_classes(pairs: list[tuple[Picture, Picture]]) -> None:
    inside, either = Counter[int](), Counter[int]()
    for prediction, reference in pairs:
        said, true = (class_map(*side) for side in (prediction, reference))
        for category in (7, 1, 200, 13):
            a, b = (said == category) & (true != -1), true == category
            inside[category] += int((a & b).sum())
            either[category] += int((a | b).sum())
    total = add_up([counted(prediction, reference) for prediction, reference in pairs])
    wanted = [inside[c.id] / either[c.id] if either[c.id] else None for c in CATEGORIES]
    assert class_iou(total) == wanted
    filled = [value for value in wanted if value is not None]
    assert mean_iou(total) == (pytest.approx(sum(filled) / len(filled)) if filled else None)


@given(pictures((6, 5), crowds=False))
def test_identical_pictures_are_perfect(both: Picture) -> None:
    found = counted(both, both)
    assert (found.fp.sum(), found.fn.sum(), found.tp.sum()) == (0, 0, len(both[1]))
    assert pooled_quality(found) == (1.0 if both[1] else None)
    assert mean_quality(class_quality(found)).pq == (1.0 if both[1] else None)


@settings(max_examples=30)
@given(st.lists(compared(), min_size=2, max_size=4), st.randoms())
def test_no_order_of_images_changes_a_bit(pairs: list[tuple[Picture, Picture]], rng: random.Random) -> None:
    parts = [counted(prediction, reference) for prediction, reference in pairs]
    first = add_up(parts)
    rng.shuffle(parts)
    for field in dataclasses.fields(ClassCounts):
        assert np.array_equal(getattr(first, field.name), getattr(add_up(parts), field.name))


def test_an_iou_of_exactly_one_half_is_no_match() -> None:
    reference = picture([[1, 1, 0, 0]], Segment(1, 7))
    half = counted(picture([[5, 0, 0, 0]], Segment(5, 7)), reference)
    assert (half.tp[0], half.fp[0], half.fn[0]) == (0, 1, 1)
    rows = [[1] * 3 + [2] * 3]
    more = counted(picture([[5, 5, 0, 0, 0, 0]], Segment(5, 7)), picture(rows, Segment(1, 7), Segment(2, 1)))
    assert (more.tp[0], more.iou[0]) == (1, 2 / 3)


def test_void_leaves_the_union_and_excuses_only_more_than_half() -> None:
    reference = picture([[1, 1, 0, 0, 0, 2]], Segment(1, 7), Segment(2, 200))
    found = counted(picture([[3, 3, 3, 3, 3, 0]], Segment(3, 7)), reference)
    assert (found.tp[0], found.iou[0]) == (1, 1.0), "two pixels of two; the three on VOID are not counted"
    half = counted(picture([[0, 4, 4, 0, 0, 0]], Segment(4, 13)), reference)
    assert half.fp.tolist() == [0, 0, 0, 1], "half on VOID is an error"
    most = counted(picture([[0, 4, 4, 4, 0, 0]], Segment(4, 13)), reference)
    assert most.fp.sum() == 0


def test_a_crowd_is_neither_matched_nor_missed_and_excuses_its_class_alone() -> None:
    reference = picture([[1, 1, 1, 2]], Segment(1, 7, crowd=True), Segment(2, 1))
    for category, wrong in ((7, 0), (1, 1)):
        found = counted(picture([[8, 8, 0, 9]], Segment(8, category), Segment(9, 1)), reference)
        assert found.tp.tolist() == [0, 1, 0, 0]
        assert (found.fn.sum(), found.fp.sum()) == (0, wrong)


def test_void_and_crowd_add_up_and_the_last_crowd_of_a_class_counts() -> None:
    """A quarter on VOID and a half on the crowd are more than half; of two crowds one is looked at."""
    rows = [[0, 1, 1, 2]]
    crowds = Segment(1, 7, crowd=True), Segment(2, 7, crowd=True)
    prediction = picture([[4, 4, 4, 4]], Segment(4, 7))
    assert counted(prediction, picture(rows, *crowds[::-1])).fp.sum() == 0, "1 + 2 of 4 pixels"
    assert counted(prediction, picture(rows, *crowds)).fp.sum() == 1, "1 + 1 of 4 pixels"


def test_pictures_without_segments_contribute_nothing() -> None:
    nothing = picture([[0, 0]])
    found = counted(nothing, nothing)
    assert pooled_quality(found) is None
    assert mean_quality(class_quality(found)) == Quality(None, None, None, 0)
    assert mean_iou(found) is None
    missed = counted(nothing, picture([[1, 0]], Segment(1, 7)))
    assert class_quality(missed)[0] == Quality(0.0, 0.0, 0.0, 1)
    empty = np.zeros((0, 4), np.int32), []
    assert counted(empty, empty).union.sum() == 0


def test_every_way_in_which_list_and_picture_disagree_is_named() -> None:
    good = picture([[1, 2]], Segment(1, 7), Segment(2, 1))
    bad = picture([[1, 3]], Segment(1, 99), Segment(1, 7), Segment(5, 7), Segment(0, 7))
    for prediction, reference, side in ((bad, good, "prediction"), (good, bad, "reference")):
        with pytest.raises(InputError) as error:
            counted(prediction, reference)
        assert [problem.split(",")[0] for problem in error.value.problems] == [
            f"{side}: ids in the picture that no segment has [3]",
            f"{side}: segments without any pixel [5]",
            f"{side}: segment ids given twice [1]",
            f"{side}: segments with the id of VOID [0]",
            f"{side}: unknown categories [99]",
        ]
    with pytest.raises(InputError, match=r"one size"):
        counted(good, picture([[1], [2]], Segment(1, 7), Segment(2, 1)))
    with pytest.raises(InputError, match="no image"):
        add_up([])


def test_pairs_of_the_largest_ids_do_not_overflow() -> None:
    largest = np.full((2, 3), 256**3 - 1, np.int32)
    pairs, pixels = contingency(largest, largest)
    assert (pairs.tolist(), pixels.tolist()) == ([256**6 - 1], [6])


@pytest.fixture(scope="module")
def real(shared_data: Path) -> tuple[PanopticFile, list[np.ndarray]]:
    """The first 30 validation images of COCO."""
    file = read_panoptic(shared_data / "coco_panoptic_mini" / "annotations" / "panoptic_val2017.json")
    file = dataclasses.replace(file, annotations=file.annotations[:30])
    return file, [read_ids(file.png(annotation)) for annotation in file.annotations]


Change = Callable[[np.ndarray, list[Segment]], tuple[np.ndarray, list[Segment]]]


def scores(real: tuple[PanopticFile, list[np.ndarray]], place: int, change: Change) -> dict[int, Quality]:
    """Category id -> quality where the prediction is the reference but for one changed image."""
    file, maps = real
    assert file.categories is not None
    counts = []
    for number, (annotation, ids) in enumerate(zip(file.annotations, maps, strict=True)):
        said = ids, list(annotation.segments)
        if number == place:
            said = change(ids.copy(), list(annotation.segments))
        counts.append(count(*said, ids, annotation.segments, file.categories))
    return dict(zip(file.categories.index, class_quality(add_up(counts)), strict=True))


def number_of(real: tuple[PanopticFile, list[np.ndarray]], category: int) -> int:
    return sum(s.category == category and not s.crowd for a in real[0].annotations for s in a.segments)


def image_with(real: tuple[PanopticFile, list[np.ndarray]], fits: Callable[[Annotation], bool]) -> int:
    return next(number for number, annotation in enumerate(real[0].annotations) if fits(annotation))


def two_of_a_kind(annotation: Annotation) -> tuple[Segment, Segment] | None:
    """The two largest of a class, of different areas, in an image without crowd."""
    ordered = sorted(annotation.segments, key=lambda s: -(s.area or 0))
    for large in ordered:
        for small in ordered:
            alike = large.category == small.category and (large.area or 0) > (small.area or 0)
            if alike and not any(s.crowd for s in annotation.segments):
                return large, small
    return None


@pytest.mark.shared
def test_real_segments_against_themselves_are_perfect(real: tuple[PanopticFile, list[np.ndarray]]) -> None:
    found = scores(real, -1, lambda ids, segments: (ids, segments))
    present = {s.category for a in real[0].annotations for s in a.segments if not s.crowd}
    assert {number for number, quality in found.items() if quality.n} == present
    assert mean_quality(list(found.values())) == Quality(1.0, 1.0, 1.0, len(present))


@pytest.mark.shared
def test_a_dropped_and_a_renamed_segment_cost_what_the_formula_says(
    real: tuple[PanopticFile, list[np.ndarray]],
) -> None:
    place = image_with(real, lambda a: not any(s.crowd for s in a.segments) and len(a.segments) > 3)
    victim = real[0].annotations[place].segments[0]
    k = number_of(real, victim.category)
    before = scores(real, -1, lambda ids, segments: (ids, segments))

    def drop(ids: np.ndarray, segments: list[Segment]) -> tuple[np.ndarray, list[Segment]]:
        return np.where(ids == victim.id, VOID, ids), segments[1:]

    found = scores(real, place, drop)
    assert found[victim.category].pq == (k - 1) / (k - 1 + 0.5)
    assert {c: q for c, q in found.items() if c != victim.category} == {
        c: q for c, q in before.items() if c != victim.category
    }

    other = next(c for c, q in before.items() if q.n and c != victim.category)
    renamed = scores(real, place, lambda ids, s: (ids, [dataclasses.replace(victim, category=other), *s[1:]]))
    m = number_of(real, other)
    assert renamed[victim.category].pq == (k - 1) / (k - 1 + 0.5)
    assert renamed[other].pq == m / (m + 0.5)
    assert renamed[other].sq == 1.0


@pytest.mark.shared
def test_void_painted_over_a_part_and_two_instances_merged(
    real: tuple[PanopticFile, list[np.ndarray]],
) -> None:
    place = image_with(real, lambda a: two_of_a_kind(a) is not None)
    pair = two_of_a_kind(real[0].annotations[place])
    assert pair is not None
    large, small = pair
    area, k = large.area or 0, number_of(real, large.category)

    def paint(ids: np.ndarray, segments: list[Segment]) -> tuple[np.ndarray, list[Segment]]:
        inside = np.flatnonzero(ids == large.id)
        ids.ravel()[inside[: area // 4]] = VOID
        return ids, segments

    found = scores(real, place, paint)[large.category]
    assert found.pq == pytest.approx((k - 1 + (area - area // 4) / area) / k, abs=1e-12)
    assert found.rq == 1.0

    def merge(ids: np.ndarray, segments: list[Segment]) -> tuple[np.ndarray, list[Segment]]:
        return np.where(ids == small.id, large.id, ids), [s for s in segments if s.id != small.id]

    found = scores(real, place, merge)[large.category]
    void_free = area / (area + (small.area or 0))
    assert found.pq == pytest.approx((k - 2 + void_free) / (k - 1 + 0.5), abs=1e-12)
    assert found.sq == pytest.approx((k - 2 + void_free) / (k - 1), abs=1e-12)
