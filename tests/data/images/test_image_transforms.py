"""Evaluation equals timm's and torchvision's transforms to the pixel; training draws as they draw."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medattn.data.images import (
    ColourJitter,
    EvaluationTransform,
    RandAugment,
    RandomErasing,
    TrainingTransform,
    decode,
)
from medattn.data.images.crops import Interpolation, random_box
from medattn.data.images.erasing import erased_box
from medattn.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD, jittered, normalised
from medattn.errors import InputError

EVALUATIONS = [
    (size, ratio, interpolation)
    for size in (224, 256, 384)
    for ratio in (0.875, 0.9, 1.0)
    for interpolation in ("bilinear", "bicubic")
]


def compare_evaluation(
    paths: list[Path], size: int, ratio: float, interpolation: Interpolation, timm: ModuleType
) -> None:
    from timm.data import create_transform
    from torchvision import transforms

    ours = EvaluationTransform(size, ratio, interpolation=interpolation)
    pixels = create_transform(size, interpolation=interpolation, crop_pct=ratio, normalize=False)
    floats = create_transform(size, interpolation=interpolation, crop_pct=ratio)
    resize = transforms.Resize(math.floor(size / ratio), transforms.InterpolationMode(interpolation))
    crop = transforms.Compose([resize, transforms.CenterCrop(size)])
    last = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    for path in paths:
        image = decode(path.read_bytes())
        seen = np.asarray(ours.crop(image))
        assert np.array_equal(seen, np.asarray(crop(image))), path
        assert np.array_equal(seen, pixels(image).permute(1, 2, 0).numpy()), path
        result = ours(image)
        assert torch.equal(result, floats(image)), path
        assert torch.equal(result, last(crop(image))), path


@pytest.mark.parametrize("number", range(len(EVALUATIONS)))
def test_evaluation_equals_timm_and_torchvision(full_size: list[Path], timm: ModuleType, number: int) -> None:
    """Every image in one of the forms; the slow test has every image in every form."""
    compare_evaluation(full_size[number :: len(EVALUATIONS)], *EVALUATIONS[number], timm)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "ratio", "interpolation"), EVALUATIONS)
def test_evaluation_equals_timm_and_torchvision_everywhere(
    full_size: list[Path], timm: ModuleType, size: int, ratio: float, interpolation: Interpolation
) -> None:
    compare_evaluation(full_size, size, ratio, interpolation, timm)


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([8, 13]), st.sampled_from([0.875, 0.9, 1.0]))
def test_small_images_equal_torchvision(width: int, height: int, size: int, ratio: float) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))
    mode = functional.InterpolationMode.BICUBIC
    resized = functional.resize(image, [math.floor(size / ratio)], mode)
    peer = np.asarray(functional.center_crop(resized, [size]))
    ours = np.asarray(EvaluationTransform(size, ratio).crop(image))
    far = max(width, height) > 64 * min(width, height)  # cropped before it is resized
    assert np.abs(ours.astype(int) - peer).max() <= (1 if far else 0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 20000), (20000, 1), (3, 500)])
def test_images_of_a_pixel_or_a_line_work_in_little_memory(shape: tuple[int, int]) -> None:
    image = Image.new("RGB", shape, (10, 200, 30))
    wanted = normalised(Image.new("RGB", (224, 224), (10, 200, 30)), IMAGENET_MEAN, IMAGENET_STD)
    assert torch.equal(EvaluationTransform()(image), torch.from_numpy(wanted))
    assert torch.equal(TrainingTransform()(image, np.random.default_rng(0)), torch.from_numpy(wanted))


def test_resize_of_a_recipe_is_the_ratio() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    assert torch.equal(EvaluationTransform(224, resize=256)(image), EvaluationTransform(224, 0.875)(image))
    assert not torch.equal(EvaluationTransform(224, resize=232)(image), EvaluationTransform(224)(image))


@pytest.mark.parametrize(
    "options", [{"crop_ratio": 0.0}, {"crop_ratio": 1.1}, {"resize": 200}, {"interpolation": "nearest"}]
)
def test_evaluations_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected"):
        EvaluationTransform(224, **options)  # type: ignore[arg-type]


class Standard:
    """The random numbers that timm draws, from Python's generator."""

    def uniform(self, low: float, high: float, /) -> float:
        return random.uniform(low, high)

    def integers(self, end: int, /) -> int:
        return random.randint(0, end - 1)


class Torch:
    """The random numbers that torchvision draws."""

    def uniform(self, low: float, high: float, /) -> float:
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, end: int, /) -> int:
        return int(torch.randint(0, end, (1,)))


SHAPES = [(500, 375), (375, 500), (64, 64), (1, 1), (900, 40), (30, 700), (3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_same_numbers_same_crop(timm: ModuleType, shape: tuple[int, int], scale: tuple[float, float]) -> None:
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision.transforms import RandomResizedCrop

    image, ratio = Image.new("RGB", shape), (3 / 4, 4 / 3)
    for seed in range(30):
        torch.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(image, list(scale), list(ratio))
        torch.manual_seed(seed)
        assert random_box(*shape, scale, ratio, Torch()) == (left, top, left + width, top + height)
        if min(shape) < 4:
            continue  # timm's box of such an image may be empty
        random.seed(seed)
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
        random.seed(seed)
        assert random_box(*shape, scale, ratio, Standard()) == (left, top, left + width, top + height)


@given(
    st.integers(1, 900), st.integers(1, 900), st.floats(0.001, 1), st.floats(0.05, 1), st.integers(0, 2**32)
)
def test_a_crop_lies_inside_and_is_not_empty(
    width: int, height: int, least: float, ratio: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    left, top, right, bottom = random_box(width, height, (least, 1), (ratio, 1 / ratio), rng)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_a_training_crop_equals_torchvisions_of_the_same_box(torchvision: ModuleType) -> None:
    from torchvision.transforms import functional

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    left, top, right, bottom = random_box(120, 90, (0.08, 1), (3 / 4, 4 / 3), np.random.default_rng(4))
    for interpolation in ("bilinear", "bicubic"):
        ours = TrainingTransform(32, flip=0, interpolation=interpolation)  # type: ignore[arg-type]
        mode = functional.InterpolationMode(interpolation)
        peer = functional.resized_crop(image, top, left, bottom - top, right - left, [32, 32], mode)
        assert np.array_equal(ours.crop(image, np.random.default_rng(4)), peer)
        mirrored = TrainingTransform(32, flip=1, interpolation=interpolation)  # type: ignore[arg-type]
        assert np.array_equal(mirrored.crop(image, np.random.default_rng(4)), functional.hflip(peer))


def test_jitter_equals_torchvisions_of_the_same_factors(torchvision: ModuleType) -> None:
    from torchvision.transforms import functional

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    peers = [functional.adjust_brightness, functional.adjust_contrast,
             functional.adjust_saturation, functional.adjust_hue]  # fmt: skip
    for _ in range(20):
        factors = [*rng.uniform(0.6, 1.4, 3).tolist(), float(rng.uniform(-0.5, 0.5))]
        order = rng.permutation(4).tolist()
        peer = image
        for number in order:
            peer = peers[number](peer, factors[number])
        assert np.array_equal(jittered(image, factors, order), peer)


def test_jitter_of_nothing_changes_nothing() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    assert np.array_equal(ColourJitter(0, 0, 0, 0)(image, np.random.default_rng(1)), image)
    assert not np.array_equal(ColourJitter()(image, np.random.default_rng(1)), image)


@pytest.mark.parametrize("shape", [(224, 224), (32, 48), (2, 2)])
def test_same_numbers_same_erased_box(timm: ModuleType, shape: tuple[int, int]) -> None:
    from timm.data.random_erasing import RandomErasing as Peer

    height, width = shape
    for seed in range(30):
        image = torch.ones(3, height, width)
        random.seed(seed)
        Peer(probability=1.0, mode="const", device="cpu")(image)
        random.seed(seed)
        random.random()  # whether to erase at all
        box = erased_box(width, height, RandomErasing().area, RandomErasing().ratio, Standard())
        ours = torch.ones(3, height, width)
        if box is not None:
            ours[:, box[1] : box[3], box[0] : box[2]] = 0
        assert torch.equal(ours, image)


def test_erasing_fills_one_box_with_what_is_asked() -> None:
    areas = []
    for seed in range(200):
        image = np.full((3, 40, 40), 7, np.float32)
        RandomErasing(1.0, "const")(image, np.random.default_rng(seed))
        rows, columns = np.nonzero(image[0] == 0)
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert box == len(rows)
        assert np.array_equal(image[0], image[2])
        areas.append(box / 1600)
        noise = np.full((3, 40, 40), 7, np.float32)
        RandomErasing(1.0, "pixel")(noise, np.random.default_rng(seed))
        assert np.array_equal(noise == 7, image == 7)
    assert 0.015 < min(areas) < 0.05
    assert 0.28 < max(areas) < 0.36
    erased = [image.min() for image in map(erase_half, range(400))]
    assert 0.4 < np.mean(np.array(erased) == 0) < 0.6


def erase_half(seed: int) -> np.ndarray:
    image = np.ones((3, 8, 8), np.float32)
    RandomErasing(0.5, "const")(image, np.random.default_rng(seed))
    return image


def test_training_depends_on_its_random_numbers_only() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    transform = TrainingTransform(
        32, interpolation="random", randaugment=RandAugment(), jitter=ColourJitter(), erasing=RandomErasing()
    )
    first, again, other = (transform(image, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first.shape == (3, 32, 32)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
