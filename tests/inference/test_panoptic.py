"""Segments against a loop over pixels and instances written from the definition; what files get."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from medattn.errors import InputError
from medattn.inference import panoptic_centres
from medattn.inference.panoptic import PanopticRules, SegmentMaps, annotate, segment
from medattn.inference.panoptic_centres import find_centres, group
from medattn.inference.panoptic_resize import Placement, resized, restored
from medattn.panoptic import IGNORED, Categories, Category, PanopticOutput

RULES = PanopticRules(threshold=0.1, nms_kernel=3, top_k=6, stuff_area=4)
THINGS = torch.tensor([True, False, True, False, True])
GRID = 0.25  # of random numbers: equal heat and equal distances are common, and float32 is exact


@dataclass
class Expected:
    ids: npt.NDArray[np.int64]
    classes: list[int]
    scores: list[float]
    areas: list[int]


def by_definition(output: PanopticOutput, things: Tensor, rules: PanopticRules, n: int) -> Expected:
    """Image n, pixel by pixel and instance by instance, in Python's own numbers."""
    heat, offset = output.centre[n, 0].tolist(), output.offset[n].tolist()
    logits = output.semantic[n].permute(1, 2, 0).double().softmax(-1).tolist()
    height, width, kinds = len(heat), len(heat[0]), len(things)
    pixels = [(y, x) for y in range(height) for x in range(width)]
    label = {p: max(range(kinds), key=lambda c, p=p: (logits[p[0]][p[1]][c], -c)) for p in pixels}
    reach = rules.nms_kernel // 2
    peaks = [
        (y, x)
        for y, x in pixels
        if heat[y][x] > rules.threshold
        and all(heat[b][a] <= heat[y][x] for b, a in pixels if abs(b - y) <= reach and abs(a - x) <= reach)
    ]
    warmest = sorted(peaks, key=lambda p: (-heat[p[0]][p[1]], p))
    kept = warmest[: rules.top_k]
    if rules.strict_top_k and len(peaks) >= rules.top_k:
        last = heat[warmest[rules.top_k - 1][0]][warmest[rules.top_k - 1][1]]
        kept = [p for p in peaks if heat[p[0]][p[1]] > last]
    centres = sorted(kept)
    members: dict[int, list[tuple[int, int]]] = {}
    for y, x in pixels:
        if things[label[y, x]] and centres:
            at = y + offset[0][y][x], x + offset[1][y][x]
            squares = [(at[0] - b) ** 2 + (at[1] - a) ** 2 for b, a in centres]
            members.setdefault(1 + squares.index(min(squares)), []).append((y, x))
        elif not things[label[y, x]]:
            members.setdefault(1 + rules.top_k + label[y, x], []).append((y, x))
    segments = rules.top_k + kinds + 1
    result = Expected(np.zeros((height, width), np.int64), [-1] * segments, [0.0] * segments, [0] * segments)
    for number, mask in members.items():
        instance = number <= rules.top_k
        if len(mask) < (rules.thing_area if instance else rules.stuff_area):
            continue
        votes = [label[p] for p in mask]
        kind = max(sorted(set(votes)), key=votes.count)
        result.classes[number], result.areas[number] = kind, len(mask)
        score = math.fsum(logits[y][x][kind] for y, x in mask) / len(mask)
        if instance:
            score *= heat[centres[number - 1][0]][centres[number - 1][1]]
        result.scores[number] = score
        for pixel in mask:
            result.ids[pixel] = number
    result.areas[0] = int((result.ids == 0).sum())
    return result


def assert_by_definition(output: PanopticOutput, things: Tensor, rules: PanopticRules) -> SegmentMaps:
    maps = segment(output, things, rules)
    for n in range(len(output.centre)):
        expected = by_definition(output, things, rules, n)
        np.testing.assert_array_equal(maps.ids[n].numpy(), expected.ids)
        assert maps.classes[n].tolist() == expected.classes
        assert maps.areas[n].tolist() == expected.areas
        np.testing.assert_allclose(maps.scores[n].numpy(), expected.scores, rtol=2e-6, atol=1e-7)
    return maps


def random_output(seed: int, images: int, size: tuple[int, int], reach: float = 4) -> PanopticOutput:
    generator = torch.Generator().manual_seed(seed)

    def steps(channels: int, low: float, high: float) -> Tensor:
        values = torch.rand(images, channels, *size, generator=generator) * (high - low) + low
        return (values / GRID).round() * GRID

    return PanopticOutput(steps(len(THINGS), -2, 2), steps(1, 0, 1), steps(2, -reach, reach))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    kernel=st.sampled_from([1, 3, 5, 9]),
    top_k=st.integers(1, 9),
    strict=st.booleans(),
    thing_area=st.integers(0, 3),
)
def test_segments_are_those_of_the_definition(
    seed: int, size: tuple[int, int], kernel: int, top_k: int, strict: bool, thing_area: int
) -> None:
    rules = replace(RULES, nms_kernel=kernel, top_k=top_k, strict_top_k=strict, thing_area=thing_area)
    assert_by_definition(random_output(seed, 2, size), THINGS, rules)


def blank(size: tuple[int, int] = (12, 15), kind: int = 0) -> PanopticOutput:
    """One image of one class, without heat."""
    semantic = torch.zeros(1, len(THINGS), *size)
    semantic[:, kind] = 5
    return PanopticOutput(semantic, torch.zeros(1, 1, *size), torch.zeros(1, 2, *size))


def test_without_a_centre_things_are_void() -> None:
    maps = assert_by_definition(blank(), THINGS, RULES)
    assert not maps.ids.any()
    assert maps.areas[0, 0] == 12 * 15
    assert (maps.classes == IGNORED).all()


def test_an_image_of_stuff_is_one_segment_or_void_by_its_area() -> None:
    output = blank(kind=3)
    output.centre[..., 4, 4] = 0.9
    maps = assert_by_definition(output, THINGS, replace(RULES, stuff_area=12 * 15))
    assert (maps.ids == RULES.top_k + 1 + 3).all()
    assert not assert_by_definition(output, THINGS, replace(RULES, stuff_area=12 * 15 + 1)).ids.any()


def test_pixels_between_two_centres_go_to_the_first() -> None:
    output = blank((11, 30))
    output.centre[..., 5, 3] = output.centre[..., 5, 23] = 0.75
    maps = assert_by_definition(output, THINGS, RULES)
    assert (maps.ids[0, :, :14] == 1).all()
    assert (maps.ids[0, :, 14:] == 2).all()  # column 13 is the middle, and of the first


def test_all_pixels_of_a_plateau_are_centres_in_the_order_of_rows() -> None:
    output = blank()
    output.centre[..., 3:5, 6:8] = 0.5
    maps = assert_by_definition(output, THINGS, RULES)
    assert sorted(maps.ids.unique().tolist()) == [1, 2, 3, 4]
    assert maps.ids[0, 3, 6] == 1
    assert maps.ids[0, 4, 7] == 4


@pytest.mark.parametrize(
    ("heats", "strict", "expected"),
    [
        ([0.9, 0.8, 0.7], False, [0.9, 0.8, 0.7]),
        ([0.9, 0.8, 0.7], True, [0.9, 0.8]),
        ([0.9, 0.8], True, [0.9, 0.8]),
        ([0.9, 0.7, 0.7, 0.7], True, [0.9]),
        ([0.7, 0.7, 0.9, 0.7], False, [0.7, 0.7, 0.9]),
        ([0.7] * 4, True, []),
    ],
)
def test_strict_keeps_what_is_warmer_than_the_last_place(
    heats: list[float], strict: bool, expected: list[float]
) -> None:
    heat = torch.zeros(1, 9, 9 * len(heats))
    for n, value in enumerate(heats):
        heat[0, 4, 9 * n] = value
    centres = find_centres(heat, threshold=0.1, kernel=3, top_k=3, strict=strict)
    torch.testing.assert_close(centres.heat[0, centres.valid[0]], torch.tensor(expected))


def test_more_places_than_pixels_keep_every_centre() -> None:
    output = random_output(3, 2, (3, 4))
    for strict in (False, True):
        assert_by_definition(output, THINGS, replace(RULES, nms_kernel=1, top_k=30, strict_top_k=strict))


def test_equal_votes_go_to_the_smallest_class() -> None:
    output = blank((4, 4), kind=4)
    output.semantic[:, 2, :2] = 9
    output.centre[..., 1, 1] = 0.5
    maps = assert_by_definition(output, THINGS, RULES)
    assert maps.classes[0, 1] == 2


def test_one_class_alone() -> None:
    output = random_output(5, 1, (9, 9))._replace(semantic=torch.zeros(1, 1, 9, 9))
    assert_by_definition(output, torch.tensor([True]), RULES)
    assert_by_definition(output, torch.tensor([False]), RULES)


def test_class_indices_give_the_segments_of_logits_and_void_stays_void() -> None:
    output = random_output(7, 2, (17, 14))
    known = output._replace(semantic=output.semantic.argmax(1))
    whole, maps = segment(output, THINGS, RULES), segment(known, THINGS, RULES)
    assert torch.equal(maps.ids, whole.ids)
    assert torch.equal(maps.classes, whole.classes)
    stuff = maps.classes[:, RULES.top_k + 1 :] != IGNORED
    assert (maps.scores[:, RULES.top_k + 1 :] == stuff).all()
    unknown = segment(known._replace(semantic=torch.full((2, 17, 14), IGNORED)), THINGS, RULES)
    assert not unknown.ids.any()
    assert unknown.areas[:, 0].tolist() == [17 * 14] * 2


def test_a_batch_is_its_images() -> None:
    output = random_output(11, 4, (21, 18))
    together = segment(output, THINGS, RULES)
    for n in range(4):
        alone = segment(PanopticOutput(*(part[n : n + 1] for part in output)), THINGS, RULES)
        for batch, single in zip(together, alone, strict=True):
            assert torch.equal(batch[n : n + 1], single)


@pytest.mark.parametrize("reach", [3, 40, 1e6], ids=["near", "across", "out of the image"])
def test_cells_settle_what_all_distances_do(reach: float, monkeypatch: pytest.MonkeyPatch) -> None:
    output = random_output(13, 2, (70, 90), reach)
    centres = find_centres(output.centre[:, 0], threshold=0.1, kernel=21, top_k=40, strict=False)
    points = [
        output.offset[:, axis] + torch.arange(side).view(-1, *[1] * (1 - axis))
        for axis, side in enumerate((70, 90))
    ]
    squares = sum(
        (p.double()[..., None] - c.double()[:, None, None]) ** 2
        for p, c in zip(points, (centres.y, centres.x), strict=True)
    )
    assert isinstance(squares, Tensor)
    things = torch.ones(2, 70, 90, dtype=torch.bool)
    if reach < 1e6:
        assert torch.equal(group(output.offset, centres, things), squares.argmin(-1) + 1)
    monkeypatch.setattr(panoptic_centres, "CPU_ELEMENTS", 64)
    dense = panoptic_centres._nearest(
        points[0].flatten(1), points[1].flatten(1), centres.y, centres.x, panoptic_centres.CPU_ELEMENTS
    )
    assert torch.equal(group(output.offset, centres, things), dense.view(2, 70, 90) + 1)


@pytest.mark.parametrize("kernel", [1, 3, 7, 13, 41])
def test_the_window_maximum_is_that_of_pooling(kernel: int) -> None:
    maps = torch.randn(2, 23, 57, generator=torch.Generator().manual_seed(kernel))
    pooled = F.max_pool2d(maps, kernel, 1, kernel // 2)
    assert torch.equal(panoptic_centres._window_maximum(maps, kernel), pooled)


def test_offsets_that_are_no_numbers_do_not_stop_it() -> None:
    output = blank()
    output.centre[..., 5, 5] = 0.9
    output.offset[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    assert (segment(output, THINGS, RULES).ids == 1).all()


def test_half_precision_maps_are_taken() -> None:
    output = random_output(17, 1, (20, 20))
    halves = PanopticOutput(*(part.bfloat16() for part in output))
    exact = PanopticOutput(*(part.float() for part in halves))
    assert torch.equal(segment(halves, THINGS, RULES).ids, segment(exact, THINGS, RULES).ids)


def test_annotation_has_ids_without_gaps_and_their_extents() -> None:
    categories = Categories(
        tuple(Category(10 + n, f"c{n}", bool(thing), (n, n, n)) for n, thing in enumerate(THINGS))
    )
    output = random_output(19, 2, (25, 31))
    maps = segment(output, THINGS, replace(RULES, stuff_area=0))
    ids, segments = annotate(maps, 1, categories)
    assert ids.dtype == np.int32
    assert [s.id for s in segments] == list(range(1, len(segments) + 1))
    assert set(np.unique(ids)) - {0} == {s.id for s in segments}
    for part in segments:
        mask = ids == part.id
        dense = int(maps.ids[1].numpy()[mask][0])
        assert (maps.ids[1].numpy()[mask] == dense).all()
        assert part.category == 10 + int(maps.classes[1, dense])
        rows, columns = np.nonzero(mask)
        assert part.area == len(rows)
        assert part.box == (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
        assert part.score == pytest.approx(float(maps.scores[1, dense]))
    nothing = segment(blank(), THINGS, RULES)
    assert annotate(nothing, 0, categories)[1] == ()
    assert not annotate(nothing, 0, categories)[0].any()


def test_rules_name_every_number_that_cannot_be() -> None:
    with pytest.raises(InputError) as caught:
        PanopticRules(threshold=-1, nms_kernel=4, top_k=0, stuff_area=-1, thing_area=-2)
    assert len(caught.value.problems) == 5


def test_maps_of_other_sizes_are_refused() -> None:
    output = blank()
    with pytest.raises(ValueError, match="offset"):
        segment(output._replace(offset=output.offset[..., :-1]), THINGS, RULES)
    with pytest.raises(ValueError, match="logits"):
        segment(output, THINGS[:3], RULES)


def test_resizing_is_bilinear_with_aligned_corners_and_keeps_offsets() -> None:
    output = random_output(23, 2, (9, 13))
    for part, expected in zip(resized(output, (33, 49)), output, strict=True):
        torch.testing.assert_close(
            part, F.interpolate(expected, (33, 49), mode="bilinear", align_corners=True)
        )
    assert torch.equal(resized(output, (9, 13)).offset, output.offset)
    assert resized(random_output(1, 1, (1, 1)), (4, 3)).centre.unique().numel() == 1


def test_restoring_finds_the_pixels_that_pillow_made_the_input_of() -> None:
    # maps that are linear in position stay so under any bilinear resizing: their values say where a pixel was
    placement = Placement(network=(65, 65), valid=(40, 60), original=(80, 90))
    y, x = torch.meshgrid(torch.linspace(0, 64, 17), torch.linspace(0, 64, 17), indexing="ij")
    output = PanopticOutput(y[None, None], x[None, None], torch.stack([y, x])[None])
    result = restored(output, placement)
    rows = ((torch.arange(80) + 0.5) / 2 - 0.5).clamp(0, 39)
    columns = ((torch.arange(90) + 0.5) * 60 / 90 - 0.5).clamp(0, 59)
    torch.testing.assert_close(result.semantic[0, 0], rows[:, None].expand(80, 90))
    torch.testing.assert_close(result.centre[0, 0], columns.expand(80, 90))
    torch.testing.assert_close(result.offset[0, 0], 2 * rows[:, None].expand(80, 90))
    torch.testing.assert_close(result.offset[0, 1], 1.5 * columns.expand(80, 90))


def test_a_placement_larger_than_its_input_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        Placement((65, 65), (66, 0), (0, 10))
    assert len(caught.value.problems) == 3
