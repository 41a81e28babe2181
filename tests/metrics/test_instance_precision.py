"""Instance AP of panoptic pictures: masks against the pictures, AP against closed forms made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from faster_coco_eval import mask
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from medattn.metrics.instance_precision import ImageInstances, average_precision, instances
from medattn.panoptic import VOID, Categories, Category, Segment

CATEGORIES = Categories(
    (
        Category(9, "sky", False, (0, 0, 0)),
        Category(4, "cat", True, (0, 0, 0)),
        Category(5, "dog", True, (0, 0, 0)),
    )
)
CAT, DOG, SKY = 4, 5, 9
Picture = tuple[list[list[int]], list[Segment]]


def image(predicted: Picture, expected: Picture) -> ImageInstances:
    said, true = (np.array(rows, np.int32) for rows, _ in (predicted, expected))
    return ImageInstances(
        (true.shape[0], true.shape[1]),
        instances(said, predicted[1], CATEGORIES),
        instances(true, expected[1], CATEGORIES),
    )


@given(
    arrays.arrays(
        np.int32,
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        elements=st.sampled_from([VOID, 3, 2**24 - 1]),
    )
)
def test_masks_are_those_of_the_picture(ids: np.ndarray) -> None:
    segments = [Segment(int(number), CAT) for number in np.unique(ids) if number]
    for segment, instance in zip(segments, instances(ids, segments, CATEGORIES), strict=True):
        assert np.array_equal(mask.decode(dict(instance.mask)), (ids == segment.id).astype(np.uint8))
        assert instance.area == int((ids == segment.id).sum())


def test_stuff_is_left_out_and_a_missing_score_is_one() -> None:
    segments = [Segment(1, SKY), Segment(2, CAT), Segment(3, DOG, score=0.25)]
    found = instances(np.array([[1, 2, 3]]), segments, CATEGORIES)
    assert [(instance.index, instance.score) for instance in found] == [(1, 1.0), (2, 0.25)]


def test_a_hit_a_miss_and_a_near_hit_in_closed_form() -> None:
    """Ranked: IoU 1, none, IoU 5/8. Up to threshold 0.60 precision is 1, 1/2, 2/3, above it 1, 1/2, 1/3."""
    cats = [Segment(1, CAT), Segment(2, CAT)]
    expected = [[1, 1, 1, 1, 1, 0, 0, 0], [2, 2, 2, 2, 2, 2, 2, 2]], cats
    predicted = (
        [[1, 1, 1, 1, 1, 0, 3, 3], [2, 2, 2, 2, 2, 0, 0, 0]],
        [Segment(1, CAT, score=0.9), Segment(2, CAT, score=0.7), Segment(3, CAT, score=0.8)],
    )
    found = average_precision([image(predicted, expected)], CATEGORIES)
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 101  # of 101 recalls those up to 0.50 are reached by the first
    assert found.ap == pytest.approx((3 * low + 7 * high) / 10, abs=1e-12)
    assert found.ap50 == pytest.approx(low, abs=1e-12)
    assert found.ap75 == pytest.approx(high, abs=1e-12)
    assert found.ap_small == found.ap
    assert (found.ap_medium, found.ap_large) == (None, None)
    assert found.per_class == (None, found.ap, None)


def test_a_prediction_inside_a_crowd_is_no_error_and_one_on_void_is() -> None:
    expected = [[1, 1, 2, 2, 0, 0]], [Segment(1, CAT), Segment(2, CAT, crowd=True)]
    in_crowd = [[1, 1, 3, 0, 0, 0]], [Segment(1, CAT, score=0.5), Segment(3, CAT, score=0.9)]
    on_void = [[1, 1, 0, 0, 3, 3]], [Segment(1, CAT, score=0.5), Segment(3, CAT, score=0.9)]
    assert average_precision([image(in_crowd, expected)], CATEGORIES).ap == 1.0
    assert average_precision([image(on_void, expected)], CATEGORIES).ap == pytest.approx(0.5)


def test_the_mean_is_over_classes_with_instances_in_the_reference() -> None:
    expected = [[1, 2, 3]], [Segment(1, CAT), Segment(2, DOG), Segment(3, SKY)]
    predicted = [[1, 0, 3]], [Segment(1, CAT), Segment(3, SKY)]
    found = average_precision([image(predicted, expected)], CATEGORIES)
    assert (found.ap, found.per_class) == (0.5, (None, 1.0, 0.0))
    alone = average_precision([image(expected, ([[1, 0, 0]], [Segment(1, CAT)]))], CATEGORIES)
    assert alone.per_class == (None, 1.0, None), "a dog is predicted where no reference has one"


def test_nothing_predicted_is_zero_and_nothing_expected_is_none() -> None:
    nothing: Picture = [[0, 0]], []
    cat: Picture = [[1, 1]], [Segment(1, CAT)]
    crowd: Picture = [[1, 1]], [Segment(1, CAT, crowd=True)]
    assert average_precision([image(nothing, cat)], CATEGORIES).ap == 0.0
    for reference in (nothing, crowd):
        assert average_precision([image(cat, reference)], CATEGORIES).ap is None
    stuff = Categories(CATEGORIES.members[:1])
    assert average_precision([image(nothing, nothing)], stuff).per_class == (None,)


def test_instances_of_one_image_match_no_other_image() -> None:
    cat: Picture = [[1, 0]], [Segment(1, CAT)]
    nothing: Picture = [[0, 0]], []
    assert average_precision([image(cat, nothing), image(nothing, cat)], CATEGORIES).ap == 0.0
    assert average_precision([image(cat, cat), image(nothing, cat)], CATEGORIES).ap == pytest.approx(51 / 101)
