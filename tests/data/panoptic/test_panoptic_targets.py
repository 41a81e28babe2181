"""Targets equal, to the last bit, a plain loop over instances that follows the definition word by word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medattn.data.panoptic import PanopticTransform, TargetArrays, TargetRules, panoptic_images, targets
from medattn.data.panoptic.targets import empty_targets
from medattn.errors import InputError
from medattn.panoptic import IGNORED, Categories, Category, PanopticTargets, Segment

RED = (255, 0, 0)
KNOWN = Categories(
    (Category(9, "sky", False, RED), Category(4, "cat", True, RED), Category(6, "cow", True, RED))
)
SKY, CAT, COW = 0, 1, 2
Ids = npt.NDArray[np.int32]


def looped(
    ids: Ids, segments: tuple[Segment, ...], categories: Categories, rules: TargetRules
) -> TargetArrays:
    """The definition: one segment after the other, a mask each."""
    made = empty_targets(*ids.shape)
    for array, value in zip(made, (IGNORED, 1, 0, 0, 0, 0), strict=True):
        array[...] = value
    for segment in segments:
        mask = ids == segment.id
        category = categories[categories.index[segment.category]]
        if rules.crowd_semantic or not segment.crowd:
            made.semantic[mask] = categories.index[segment.category]
        if segment.crowd:
            continue
        made.centre_weight[0, mask] = 1
        made.offset_weight[0, mask] = category.thing or rules.stuff_offsets
        if not category.thing or not mask.any():
            continue
        y, x = np.nonzero(mask)
        if len(y) < rules.small_area:
            made.semantic_weight[mask] = rules.small_weight
        centre = float(np.mean(y)), float(np.mean(x))
        made.offset[0, mask], made.offset[1, mask] = centre[0] - y, centre[1] - x
        add_gaussian(made.centre[0], round(centre[0]), round(centre[1]), rules.sigma)
    return made


def add_gaussian(heat: npt.NDArray[np.float32], y: int, x: int, sigma: float) -> None:
    reach = int(3 * sigma) + 1
    for row in range(max(0, y - reach), min(heat.shape[0], y + reach + 1)):
        for column in range(max(0, x - reach), min(heat.shape[1], x + reach + 1)):
            value = np.float32(np.exp(-((row - y) ** 2 + (column - x) ** 2) / (2 * sigma**2)))
            heat[row, column] = max(heat[row, column], value)


def assert_same(one: TargetArrays, other: TargetArrays) -> None:
    for name, a, b in zip(TargetArrays._fields, one, other, strict=True):
        assert a.dtype == b.dtype, name
        assert np.array_equal(a, b), name


@st.composite
def pictures(draw: st.DrawFn) -> tuple[Ids, tuple[Segment, ...]]:
    """Maps of blocks or of noise; some ids have no segment and some segments no pixel."""
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    numbers = draw(st.lists(st.integers(1, 256**3 - 1), min_size=1, max_size=6, unique=True))
    block = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    coarse = rng.choice([0, *numbers], (height // block + 1, width // block + 1))
    ids = np.kron(coarse, np.ones((block, block), int))[:height, :width].astype(np.int32)
    listed = draw(st.permutations(numbers))[: draw(st.integers(0, 6))]
    return ids, tuple(Segment(n, draw(st.sampled_from([9, 4, 6])), draw(st.booleans())) for n in listed)


@settings(max_examples=150)
@given(
    pictures(),
    st.builds(
        TargetRules,
        sigma=st.sampled_from([1.0, 2.5, 8.0]),
        small_area=st.integers(0, 60),
        small_weight=st.sampled_from([0.0, 0.1, 3.0]),
        stuff_offsets=st.booleans(),
        crowd_semantic=st.booleans(),
    ),
)
def test_any_picture_gives_what_the_loop_gives(
    picture: tuple[Ids, tuple[Segment, ...]], rules: TargetRules
) -> None:
    expected = looped(*picture, KNOWN, rules)
    assert_same(targets(*picture, KNOWN, rules), expected)
    ids, segments = picture
    filled = empty_targets(*ids.shape)
    assert targets(ids[::-1][::-1], segments, KNOWN, rules, filled) is filled
    assert_same(filled, expected)


@settings(max_examples=60)
@given(pictures())
def test_the_targets_of_a_flipped_picture_are_the_flipped_targets(
    picture: tuple[Ids, tuple[Segment, ...]],
) -> None:
    """A centre between two pixels has two nearest ones, so there the heat map may be one pixel off."""
    ids, segments = picture
    made, flipped = targets(ids, segments, KNOWN), targets(ids[:, ::-1], segments, KNOWN)
    back = TargetArrays(*(array[..., ::-1].copy() for array in flipped))
    back.offset[1] *= -1
    np.testing.assert_allclose(made.offset, back.offset, atol=1e-5)
    between = any(
        np.isclose(np.nonzero(ids == s.id)[1].mean() % 1, 0.5) for s in segments if (ids == s.id).any()
    )
    if not between:
        assert np.array_equal(made.centre, back.centre)
    for name in ("semantic", "semantic_weight", "centre_weight", "offset_weight"):
        assert np.array_equal(getattr(made, name), getattr(back, name)), name


@pytest.fixture
def scene() -> tuple[Ids, tuple[Segment, ...]]:
    """100 x 120: sky above; a cat of 10 x 20, a large cow, a crowd of cats, and a strip that is void."""
    ids = np.zeros((100, 120), np.int32)
    ids[:30] = 500_000
    ids[40:50, 10:30] = 2
    ids[30:100, 50:120] = 3
    ids[80:90, 5:25] = 4
    return ids, (Segment(500_000, 9), Segment(2, 4), Segment(3, 6), Segment(4, 4, crowd=True), Segment(77, 4))


def test_a_scene_by_hand(scene: tuple[Ids, tuple[Segment, ...]]) -> None:
    made = targets(*scene, KNOWN)
    assert made.semantic[0, 0] == SKY
    assert made.semantic[45, 15] == made.semantic[85, 10] == CAT
    assert made.semantic[99, 119] == COW
    assert made.semantic[60, 0] == IGNORED
    # 200 pixels are fewer than 4096, 4900 are not; crowds and stuff are never small instances
    assert made.semantic_weight[45, 15] == 3
    assert made.semantic_weight[[99, 85, 0, 60], [119, 10, 0, 0]].tolist() == [1, 1, 1, 1]
    # the cat covers rows 40 to 49 and columns 10 to 29, so its centre is 44.5, 19.5
    assert made.offset[:, 40, 10].tolist() == [4.5, 9.5]
    assert made.offset[:, 49, 29].tolist() == [-4.5, -9.5]
    assert made.offset[:, 99, 119].tolist() == [64.5 - 99, 84.5 - 119]
    # half way rounds to even: the peaks are at 44, 20 and 64, 84
    assert np.argwhere(made.centre[0] == 1).tolist() == [[44, 20], [64, 84]]
    assert made.centre[0, 44, 28] == pytest.approx(np.exp(-0.5))
    assert made.centre[0, 44 + 25, 20] > 0
    assert made.centre[0, 44 + 26, 20] == 0
    places = ([0, 45, 99, 85, 60], [0, 15, 119, 10, 0])  # sky, cat, cow, crowd, void
    assert made.centre_weight[0][places].tolist() == [1, 1, 1, 0, 0]
    assert made.offset_weight[0][places].tolist() == [0, 1, 1, 0, 0]
    assert not made.offset[:, 85, 10].any()


def test_options_of_stuff_and_crowds(scene: tuple[Ids, tuple[Segment, ...]]) -> None:
    made = targets(*scene, KNOWN, TargetRules(stuff_offsets=True, crowd_semantic=False))
    assert made.offset_weight[0, 0, 0] == 1
    assert made.offset_weight[0, 60, 0] == made.offset_weight[0, 85, 10] == 0
    assert made.semantic[85, 10] == IGNORED


def test_what_is_small_is_measured_in_the_crop() -> None:
    ids = np.full((64, 64), 2, np.int32)
    assert set(targets(ids, (Segment(2, 4),), KNOWN).semantic_weight.flat) == {1}
    assert set(targets(ids[:, 1:], (Segment(2, 4),), KNOWN).semantic_weight.flat) == {3}


@pytest.mark.parametrize("segments", [(), (Segment(5, 4),), (Segment(5, 4, crowd=True), Segment(6, 9))])
def test_a_picture_of_nothing_counts_nowhere(segments: tuple[Segment, ...]) -> None:
    made = targets(np.zeros((7, 5), np.int32), segments, KNOWN)
    assert set(made.semantic.flat) == {IGNORED}
    assert not any(
        array.any() for array in (made.centre, made.centre_weight, made.offset, made.offset_weight)
    )


def test_arrays_become_the_tensors_of_a_batch() -> None:
    made = targets(np.ones((7, 5), np.int32), (Segment(1, 4),), KNOWN)
    assert TargetArrays._fields == PanopticTargets._fields
    batch = PanopticTargets(*(torch.from_numpy(array)[None] for array in made))
    assert [tuple(tensor.shape) for tensor in batch] == [
        (1, 7, 5), (1, 7, 5), (1, 1, 7, 5), (1, 1, 7, 5), (1, 2, 7, 5), (1, 1, 7, 5),
    ]  # fmt: skip
    assert [tensor.dtype for tensor in batch] == [torch.int64] + [torch.float32] * 5


@pytest.mark.parametrize("options", [{"sigma": 0}, {"small_area": -1}, {"small_weight": -0.5}])
def test_rules_without_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="sigma above 0"):
        TargetRules(**options)  # type: ignore[arg-type]


@pytest.mark.shared
def test_real_crops_give_what_the_loop_gives(mini: Path) -> None:
    images = panoptic_images("coco", mini, "val", limit=12)
    transform = PanopticTransform(257, longest=257, scale=(1.0, 1.0), flip=0)
    for n in range(12):
        picture = images.read(n)
        part = transform.crop(picture, np.random.default_rng(n))
        ids = np.ascontiguousarray(part.ids)
        expected = looped(ids, picture.segments, images.categories, transform.rules)
        assert_same(targets(ids, picture.segments, images.categories), expected)
