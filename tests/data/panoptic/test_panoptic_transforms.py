"""Images and labels stay on each other whatever is done to them, and predictions find their way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medattn.data.images import ColourJitter
from medattn.data.panoptic import (
    ColourPolicy,
    PanopticTransform,
    PanopticView,
    Picture,
    TargetRules,
    panoptic_images,
    targets,
)
from medattn.data.panoptic import colour as colour_module
from medattn.errors import InputError
from medattn.panoptic import IGNORED, Categories, Category, Segment

KNOWN = Categories((Category(4, "cat", True, (255, 0, 0)), Category(9, "sky", False, (0, 0, 255))))
PLAIN = PanopticTransform(40, scale=(1.0, 1.0), flip=0)
SEGMENTS = (Segment(1, 4), Segment(2, 9), Segment(3, 4))


def painted(height: int, width: int, seed: int = 0) -> Picture:
    """An image whose colours are its labels: red 80 per id, so that each shows the other."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(1, 4, (3, 3))
    ids = coarse[np.arange(height)[:, None] * 3 // height, np.arange(width) * 3 // width].astype(np.int32)
    return Picture(Image.fromarray(np.stack([80 * ids] * 3, -1).astype(np.uint8)), ids, SEGMENTS)


def shown(
    image: npt.NDArray[np.float32], transform: PanopticTransform | PanopticView
) -> npt.NDArray[np.float64]:
    """[3, h, w] normalised -> ids times 80 of `painted`."""
    grey: npt.NDArray[np.float64] = (image[0].astype(float) * transform.std[0] + transform.mean[0]) * 255
    return grey


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("height", "width"), [(90, 120), (30, 200), (25, 31)])
def test_labels_lie_on_their_pixels(seed: int, height: int, width: int) -> None:
    transform = PanopticTransform((70, 60), scale=(0.5, 2.0), step=0)
    sample = transform(painted(height, width, seed), KNOWN, np.random.default_rng(seed))
    assert sample.image.shape == (3, 70, 60)
    assert sample.image.dtype == np.float32
    inside = sample.targets.semantic != IGNORED
    assert (sample.image[:, ~inside] == 0).all()
    of_pixels = np.rint(shown(sample.image, transform) / 80).astype(int)
    expected = np.where(of_pixels == 2, 1, 0)
    # only pixels that mix two colours may differ: those within two pixels of an edge between labels
    agree = (sample.targets.semantic == expected)[inside]
    assert agree.mean() > 0.9


def test_nothing_is_changed_where_nothing_is_asked() -> None:
    picture = painted(40, 40)
    sample = PLAIN(picture, KNOWN, np.random.default_rng(0))
    assert np.allclose(shown(sample.image, PLAIN), np.asarray(picture.image)[..., 0], atol=1e-4)
    for made, plain in zip(sample.targets, targets(picture.ids, SEGMENTS, KNOWN), strict=True):
        assert np.array_equal(made, plain)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.3, 3.0])
def test_a_crop_is_a_part_of_the_whole_resized_image(scale: float) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (61, 83, 3), np.uint8)
    ids = rng.integers(1, 4, (61, 83)).astype(np.int32)
    transform = PanopticTransform((20, 30), scale=(scale, scale), flip=0)
    part = transform.crop(Picture(Image.fromarray(pixels), ids, SEGMENTS), np.random.default_rng(3))
    whole = Image.fromarray(pixels).resize((round(83 * scale), round(61 * scale)), Image.Resampling.BILINEAR)
    labels = np.asarray(Image.fromarray(ids).resize(whole.size, Image.Resampling.NEAREST))
    places = [
        (y, x)
        for y in range(whole.height - 19)
        for x in range(whole.width - 29)
        if np.array_equal(labels[y : y + 20, x : x + 30], part.ids)
    ]
    assert len(places) == 1
    y, x = places[0]
    seen = np.asarray(whole.crop((x, y, x + 30, y + 20)), int)
    assert np.abs(seen - np.asarray(part.image, int)).max() <= 1


def test_flipping_is_mirroring() -> None:
    picture = painted(50, 50)
    mirrored = Picture(
        picture.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), picture.ids[:, ::-1], SEGMENTS
    )
    always = PanopticTransform(50, scale=(1.0, 1.0), flip=1)
    never = PanopticTransform(50, scale=(1.0, 1.0), flip=0)
    one, other = (
        always(picture, KNOWN, np.random.default_rng(0)),
        never(mirrored, KNOWN, np.random.default_rng(0)),
    )
    assert np.array_equal(one.image, other.image)
    assert all(np.array_equal(a, b) for a, b in zip(one.targets, other.targets, strict=True))


def test_a_small_image_is_placed_anywhere_in_void_of_mean_colour() -> None:
    places = set()
    for seed in range(40):
        sample = PLAIN(painted(38, 40), KNOWN, np.random.default_rng(seed))
        inside = (sample.targets.semantic != IGNORED).all(1)
        assert inside.sum() == 38
        assert not sample.image[:, ~inside].any()
        assert not sample.targets.centre_weight[0, ~inside].any()
        places.add(int(np.argmax(inside)))
    assert places == {0, 1, 2}


@given(st.integers(0, 2**32 - 1))
def test_factors_are_steps_of_the_range(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = {round(PanopticTransform(9).factor(rng), 6) for _ in range(300)}
    assert steps == {0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5}
    assert {PanopticTransform(9, scale=(2, 2)).factor(rng)} == {2}
    assert 0.5 <= PanopticTransform(9, step=0).factor(rng) < 1.5


def test_the_longer_side_is_what_factors_apply_to() -> None:
    transform = PanopticTransform(100, longest=64, scale=(1.5, 1.5), flip=0)
    part = transform.crop(painted(30, 40), np.random.default_rng(0))
    assert part.image.size == (96, 72)


def test_small_instances_are_measured_at_the_size_that_the_network_sees() -> None:
    picture = Picture(Image.new("RGB", (60, 60)), np.ones((60, 60), np.int32), (Segment(1, 4),))
    for scale, weight in ((1.0, 3.0), (1.5, 1.0)):
        sample = PanopticTransform(100, scale=(scale, scale))(picture, KNOWN, np.random.default_rng(0))
        inside = sample.targets.semantic == 0
        assert inside.sum() == (60 * scale) ** 2
        assert set(sample.targets.semantic_weight[inside]) == {weight}


def test_one_seed_gives_one_sample_and_colours_leave_labels_alone() -> None:
    picture = painted(50, 70)
    plain = PanopticTransform(40)
    coloured = PanopticTransform(40, policy=ColourPolicy(), jitter=ColourJitter(0.9, 0.9, 0.9, 0.1))
    changed = 0
    for seed in range(5):
        one, again = (coloured(picture, KNOWN, np.random.default_rng(seed)) for _ in range(2))
        other = plain(picture, KNOWN, np.random.default_rng(seed))
        assert np.array_equal(one.image, again.image)
        assert all(np.array_equal(a, b) for a, b in zip(one.targets, other.targets, strict=True))
        changed += not np.array_equal(one.image, other.image)
    assert changed == 5


def test_rules_reach_the_targets() -> None:
    transform = PanopticTransform(50, scale=(1, 1), rules=TargetRules(small_weight=7))
    sample = transform(painted(50, 50), KNOWN, np.random.default_rng(0))
    assert 7 in sample.targets.semantic_weight


@pytest.mark.parametrize(
    "options",
    [{"scale": (0, 1)}, {"scale": (2, 1)}, {"step": -0.1}, {"flip": 1.5}, {"size": 0}, {"longest": 0}],
)
def test_transforms_without_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="panoptic transform"):
        PanopticTransform(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("view", "size", "seen", "padded"),
    [
        (PanopticView(641), (480, 640), (480, 640), (481, 641)),
        (PanopticView(641, enlarge=True), (480, 640), (481, 641), (481, 641)),
        (PanopticView(641), (1200, 800), (641, 427), (641, 433)),
        (PanopticView(641, enlarge=True, size=641), (375, 500), (481, 641), (641, 641)),
        (PanopticView(960, shortest=640, enlarge=True), (480, 500), (640, 667), (641, 673)),
        (PanopticView(960, shortest=640, enlarge=True), (200, 800), (240, 960), (241, 961)),
        (PanopticView(2049, size=(1025, 2049)), (1024, 2048), (1024, 2048), (1025, 2049)),
        (PanopticView(2049, size=(513, 2049)), (1024, 2048), (513, 1026), (513, 2049)),
        (PanopticView(33), (1, 2000), (1, 33), (1, 33)),
    ],
)
def test_views_are_as_large_as_asked(
    view: PanopticView, size: tuple[int, int], seen: tuple[int, int], padded: tuple[int, int]
) -> None:
    viewed = view(Image.new("RGB", size[::-1], (255, 255, 255)))
    assert (viewed.seen, viewed.original) == (seen, size)
    assert tuple(viewed.image.shape) == (3, *padded)
    assert (viewed.image[:, : seen[0], : seen[1]] > 2).all()
    assert not viewed.image[:, seen[0] :].any()
    assert not viewed.image[:, :, seen[1] :].any()


def test_a_view_survives_a_model_file() -> None:
    view = PanopticView(33, size=(40, 50))
    stored = {
        k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(json.dumps(asdict(view))).items()
    }
    assert PanopticView(**stored) == view


@pytest.mark.parametrize("options", [{"longest": 0}, {"shortest": 700}, {"size": (5, 0)}])
def test_views_without_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="panoptic view"):
        PanopticView(**options)  # type: ignore[arg-type]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_ids_find_their_way_back(height: int, width: int, longest: int, enlarge: bool) -> None:
    """What is enlarged and brought back is as it was; otherwise each pixel is that of the nearest."""
    viewed = PanopticView(longest, enlarge=enlarge)(Image.new("RGB", (width, height)))
    ids = np.zeros(viewed.image.shape[1:], np.int32)
    rows, columns = viewed.seen
    ids[:rows, :columns] = 1 + np.arange(rows * columns).reshape(rows, columns)
    back = viewed.restored(ids)
    assert back.shape == (height, width)
    assert back.min() > 0
    y, x = np.divmod(back - 1, columns)
    assert (
        np.abs((y[:, 0] + 0.5) / rows * height - np.arange(height) - 0.5) <= height / rows / 2 + 1e-9
    ).all()
    assert (
        np.abs((x[0] + 0.5) / columns * width - np.arange(width) - 0.5) <= width / columns / 2 + 1e-9
    ).all()
    assert all((a <= b).all() for a, b in pairwise(y))


def test_the_policy_is_deeplab2s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs are drawn alike; each operation runs with its probability at a fifth of its magnitude."""
    called: list[tuple[str, float]] = []

    def note(name: str) -> Callable[..., Image.Image]:
        def change(image: Image.Image, magnitude: float, setting: object) -> Image.Image:
            called.append((name, round(magnitude, 6)))
            return image

        return change

    monkeypatch.setattr(colour_module, "OPERATIONS", {name: note(name) for name in colour_module.OPERATIONS})
    image, rng, count = Image.new("RGB", (2, 2)), np.random.default_rng(0), 20_000
    for _ in range(count):
        ColourPolicy()(image, rng)
    shares = {call: called.count(call) / count for call in set(called)}
    assert shares == {
        ("sharpness", 1.4): pytest.approx(0.08, abs=0.01),
        ("brightness", 2.0): pytest.approx(0.04, abs=0.01),
        ("contrast", 2.0): pytest.approx(0.04, abs=0.01),
        ("sharpness", 1.8): pytest.approx(0.04, abs=0.01),
        ("colour", 1.8): pytest.approx(0.04, abs=0.01),
        ("solarize", 1.4): pytest.approx(0.04, abs=0.01),
        ("equalize", 1.8): pytest.approx(0.12, abs=0.01),
        ("sharpness", 0.2): pytest.approx(0.04, abs=0.01),
        ("equalize", 1.4): pytest.approx(0.04, abs=0.01),
    }


def test_the_policys_brightness_and_solarizing_by_hand() -> None:
    """Magnitude 2 of 10: brightness times 0.2 * 1.8 + 0.1; magnitude 1.4: values from 35 on are inverted."""
    image = Image.new("RGB", (1, 1), (200, 100, 20))
    operations, unmoved = colour_module.OPERATIONS, colour_module.UNMOVED
    assert operations["brightness"](image, 2.0, unmoved).getpixel((0, 0)) == (92, 46, 9)
    assert operations["solarize"](image, 1.4, unmoved).getpixel((0, 0)) == (55, 155, 20)


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_policies_without_sense_are_refused(strength: float) -> None:
    with pytest.raises(InputError, match="colour policy"):
        ColourPolicy(strength)


@pytest.mark.slow
@pytest.mark.shared
def test_real_images_become_samples(mini: Path) -> None:
    """A pixel's class is one of the picture's; offsets of each instance point to one place, its centre."""
    transform = PanopticTransform(321, longest=321)
    for split in ("train", "val"):
        images = panoptic_images("coco", mini, split)
        for n in range(0, len(images), 2):
            picture = images.read(n)
            sample = transform(picture, images.categories, np.random.default_rng(n))
            assert np.isfinite(sample.image).all()
            classes = {images.categories.index[s.category] for s in picture.segments}
            assert set(np.unique(sample.targets.semantic).tolist()) <= classes | {IGNORED}
            things = (sample.targets.offset_weight[0] > 0) & (sample.targets.centre_weight[0] > 0)
            points = np.rint((sample.targets.offset[:, things] + np.argwhere(things).T) * 64)
            instances = [
                images.categories.things[images.categories.index[s.category]] for s in picture.segments
            ]
            # float32 may put either coordinate of a centre on either side of where it is rounded
            assert len(np.unique(points[0] * 2**20 + points[1])) <= 4 * sum(instances)
            assert (sample.targets.centre.max() == 1) == bool(things.any())
