"""Batches are a function of seed and step: resumed, sliced over processes, read by any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from medattn.data.images import ColourJitter
from medattn.data.panoptic import (
    ColourPolicy,
    PanopticBatch,
    PanopticImages,
    PanopticTransform,
    Picture,
    TrainingPanoptic,
    panoptic_images,
)
from medattn.errors import InputError
from medattn.panoptic import IGNORED, Categories, PanopticTargets

TRANSFORM = PanopticTransform((21, 17), policy=ColourPolicy(), jitter=ColourJitter())


def same(one: PanopticBatch, other: PanopticBatch) -> bool:
    equal = all(torch.equal(a, b) for a, b in zip(one.targets, other.targets, strict=True))
    return (
        equal
        and torch.equal(one.image, other.image)
        and (one.cases, one.skipped) == (other.cases, other.skipped)
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_step_is_the_same_from_wherever_it_is_reached(source: PanopticImages, workers: int) -> None:
    images = TrainingPanoptic(source, TRANSFORM, 5, seed=7)
    walked = list(islice(images.batches(0, workers), 8))
    started = list(islice(images.batches(5, workers), 3))
    assert all(same(*pair) for pair in zip(walked[5:], started, strict=True))
    assert same(walked[6], images.batch(6))
    assert not torch.equal(walked[0].image, walked[2].image)
    assert not torch.equal(walked[0].image, replace(images, seed=8).batch(0).image)


def test_a_batch_has_what_each_sample_has_alone(source: PanopticImages) -> None:
    plain = PanopticTransform((24, 30), scale=(1, 1), flip=0)
    batch = TrainingPanoptic(source, plain, 12, seed=0).batch(0)
    assert batch.image.shape == (12, 3, 24, 30)
    assert sorted(batch.cases) == [source.name(n) for n in range(12)]
    for place, case in enumerate(batch.cases):
        index = [source.name(n) for n in range(12)].index(case)
        alone = plain(source.read(index), source.categories, np.random.default_rng(0))
        assert np.array_equal(batch.image[place], alone.image)
        for made, expected in zip(batch.targets, alone.targets, strict=True):
            assert np.array_equal(made[place], expected)
            assert made[place].numpy().dtype == expected.dtype


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_one_global_batch(source: PanopticImages, world: int) -> None:
    alone = TrainingPanoptic(source, TRANSFORM, 12, seed=1)
    ranks = [replace(alone, rank=rank, world=world) for rank in range(world)]
    assert sorted(place for rank in ranks for place in rank.places) == list(range(12))
    for step in (0, 3):
        whole = alone.batch(step)
        for rank in ranks:
            part, places = rank.batch(step), list(rank.places)
            expected = PanopticTargets(*(target[places] for target in whole.targets))
            cases = tuple(whole.cases[place] for place in places)
            assert same(part, PanopticBatch(whole.image[places], expected, cases))


def test_an_epoch_sees_every_image_once_and_the_next_another_order(source: PanopticImages) -> None:
    images = TrainingPanoptic(source, TRANSFORM, 4, seed=0)
    assert images.steps_per_epoch == 3
    epochs = [[case for step in range(3) for case in images.batch(3 * e + step).cases] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [source.name(n) for n in range(12)]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 13}, "batch of 13 from 12 images"),
        ({"batch_size": 0}, "batch of 0 from 12 images"),
        ({"batch_size": 5, "world": 2}, "expected a multiple of the processes"),
        ({"batch_size": 8, "world": 2, "rank": 2}, "process 2 of 2"),
    ],
)
def test_batches_that_do_not_fit_are_refused(
    source: PanopticImages, options: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TrainingPanoptic(source, TRANSFORM, **{"seed": 0, **options})  # type: ignore[arg-type]


def label(source: PanopticImages, index: int) -> Path:
    return source.labels / source.label_files[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_takes_the_place_of_one_that_cannot_be_used(
    source: PanopticImages, workers: int
) -> None:
    Path(source.name(3)).write_bytes(b"no image")
    label(source, 4).unlink()
    label(source, 11).write_bytes(label(source, 11).read_bytes()[:60])
    images = TrainingPanoptic(source, TRANSFORM, 12, seed=0, unreadable_limit=3)
    batch = next(images.batches(0, workers))
    taken = {source.name(3): source.name(5), source.name(4): source.name(5), source.name(11): source.name(0)}
    undamaged = [source.name(n) for n in range(12)]
    assert sorted(batch.cases) == sorted(taken.get(name, name) for name in undamaged)
    assert {skipped.name for skipped in batch.skipped} == set(taken)
    assert any("no such file, expected the PNG" in skipped.reason for skipped in batch.skipped)
    assert same(batch, images.batch(0))
    with pytest.raises(InputError, match="3 images cannot be decoded, expected at most 2"):
        next(replace(images, unreadable_limit=2).batches(0, workers))


def test_a_set_without_a_usable_image_ends(source: PanopticImages) -> None:
    for n in range(12):
        label(source, n).unlink()
    with pytest.raises(InputError, match="12 images cannot be decoded, expected at most 11"):
        TrainingPanoptic(source, TRANSFORM, 3, seed=0).batch(0)


def test_dropping_the_iterator_stops_its_threads(source: PanopticImages) -> None:
    before = threading.active_count()
    batches: Iterator[PanopticBatch] = TrainingPanoptic(source, TRANSFORM, 3, seed=0).batches(0, 2)
    next(batches)
    assert threading.active_count() == before + 2
    del batches
    assert threading.active_count() == before


def test_the_source_may_be_anything_with_names_and_pictures(source: PanopticImages) -> None:
    class Void:
        @property
        def categories(self) -> Categories:
            return source.categories

        def __len__(self) -> int:
            return 2

        def name(self, index: int) -> str:
            return f"void {index}"

        def read(self, index: int) -> Picture:
            picture = source.read(index)
            return picture._replace(ids=np.zeros_like(picture.ids), segments=())

    batch = TrainingPanoptic(Void(), TRANSFORM, 2, seed=0).batch(0)
    assert sorted(batch.cases) == ["void 0", "void 1"]
    assert (batch.targets.semantic == IGNORED).all()
    assert not any(target.any() for target in batch.targets[2:])


def test_a_batch_moves_whole(source: PanopticImages) -> None:
    batch = TrainingPanoptic(source, TRANSFORM, 2, seed=0).batch(0)
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.image, *moved.targets)} == {"meta"}
    assert same(batch, batch.to(torch.device("cpu")))


@pytest.mark.gpu
def test_page_locked_batches(source: PanopticImages) -> None:
    images = TrainingPanoptic(source, TRANSFORM, 4, seed=0)
    batch = next(images.batches(0, 2, pin_memory=True))
    assert all(tensor.is_pinned() for tensor in (batch.image, *batch.targets))
    assert same(batch.to(torch.device("cuda")).to(torch.device("cpu")), images.batch(0))


@pytest.mark.shared
def test_real_images_give_a_batch(mini: Path) -> None:
    images = TrainingPanoptic(
        panoptic_images("coco", mini, "train"), PanopticTransform(129, longest=129), 8, seed=0
    )
    batch = next(images.batches(0, 2))
    assert batch.image.shape == (8, 3, 129, 129)
    assert batch.skipped == ()
    assert batch.targets.centre.amax((1, 2, 3)).max() == 1
    assert 0.3 < float((batch.targets.semantic != IGNORED).float().mean()) <= 1
