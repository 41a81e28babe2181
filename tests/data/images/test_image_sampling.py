"""Batches are a function of seed and step: resumed, sliced over processes, read by any number of threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medattn.data.images import (
    EvaluationImages,
    EvaluationTransform,
    ImageBatch,
    Mixing,
    RandAugment,
    RandomErasing,
    TrainingImages,
    TrainingTransform,
    image_folder,
)
from medattn.data.images.folder import ImageFolder
from medattn.data.images.sampling import epoch_order
from medattn.errors import InputError

TRANSFORM = TrainingTransform(16, randaugment=RandAugment(), erasing=RandomErasing(), interpolation="random")


def same(one: ImageBatch, other: ImageBatch) -> bool:
    equal = torch.equal(one.image, other.image) and torch.equal(one.target, other.target)
    return equal and one.cases == other.cases and one.skipped == other.skipped


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_step_is_the_same_from_wherever_it_is_reached(source: ImageFolder, workers: int) -> None:
    images = TrainingImages(source, TRANSFORM, 5, seed=7)
    walked = list(islice(images.batches(0, workers), 8))
    started = list(islice(images.batches(5, workers), 3))
    assert all(same(*pair) for pair in zip(walked[5:], started, strict=True))
    assert same(walked[6], images.batch(6))
    assert not torch.equal(walked[0].image, walked[2].image)
    assert not torch.equal(walked[0].image, replace(images, seed=8).batch(0).image)


def test_targets_and_cases_belong_to_the_images(source: ImageFolder) -> None:
    batch = TrainingImages(source, TRANSFORM, 12, seed=0).batch(0)
    assert batch.image.shape == (12, 3, 16, 16)
    assert (batch.image.dtype, batch.target.dtype) == (torch.float32, torch.int64)
    named = [source.classes.index[Path(case).parent.name] for case in batch.cases]
    assert batch.target.tolist() == named
    assert sorted(batch.cases) == [source.name(n) for n in range(12)]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_one_global_batch(source: ImageFolder, world: int) -> None:
    alone = TrainingImages(source, TRANSFORM, 12, seed=1, repeats=3)
    ranks = [replace(alone, rank=rank, world=world) for rank in range(world)]
    assert sorted(place for rank in ranks for place in rank.places) == list(range(12))
    for step in (0, 3):
        whole = alone.batch(step)
        for rank in ranks:
            part, places = rank.batch(step), list(rank.places)
            assert torch.equal(part.image, whole.image[places])
            assert part.cases == tuple(whole.cases[place] for place in places)


def test_mixing_does_not_depend_on_the_number_of_processes(source: ImageFolder) -> None:
    alone, mixing = TrainingImages(source, TRANSFORM, 12, seed=1), Mixing(3)
    for step in range(4):
        whole = mixing(alone.batch(step), seed=1, step=step)
        for rank in range(3):
            mine = replace(alone, rank=rank, world=3)
            part = mixing(mine.batch(step), seed=1, step=step)
            assert torch.equal(part.image, whole.image[list(mine.places)])
            assert torch.equal(part.target, whole.target[list(mine.places)])


@given(st.integers(1, 300), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_is_a_permutation(images: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(images, seed, epoch).tolist()) == list(range(images))


@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 3))
def test_repeats_stand_together_in_an_epoch_of_the_same_length(images: int, repeats: int, epoch: int) -> None:
    order = epoch_order(images, 0, epoch, repeats).tolist()
    assert len(order) == images
    counts = list(Counter(order).values())
    assert all(count == repeats for count in counts[:-1])
    assert all(len(set(order[n : n + repeats])) == 1 for n in range(0, images, repeats))


def test_repeats_equal_timms_sampler_given_the_same_shuffle(
    timm: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes take turns in one list; our global batches are consecutive parts of the same list."""
    from timm.data.distributed_sampler import RepeatAugSampler

    count, world, batch = 1000, 4, 64
    shuffled = torch.from_numpy(epoch_order(count, 3, 2)[:].copy())
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: shuffled)
    parts = [list(RepeatAugSampler(range(count), world, rank, selected_round=0)) for rank in range(world)]
    ours = epoch_order(count, 3, 2, repeats=3)
    for step in range(count // batch):
        each = slice(step * batch // world, (step + 1) * batch // world)
        peer = sorted(n for part in parts for n in part[each])
        assert sorted(ours[step * batch : (step + 1) * batch].tolist()) == peer


def test_repeats_are_changed_differently(source: ImageFolder) -> None:
    batch = TrainingImages(source, TRANSFORM, 12, seed=0, repeats=3).batch(0)
    assert len(set(batch.cases)) == 4
    assert batch.cases[0] == batch.cases[1]
    assert not torch.equal(batch.image[0], batch.image[1])


def test_the_last_partial_batch_is_dropped(source: ImageFolder) -> None:
    images = TrainingImages(source, TRANSFORM, 5, seed=0)
    assert images.steps_per_epoch == 2
    first = [case for step in (0, 1) for case in images.batch(step).cases]
    assert len(set(first)) == 10
    order = epoch_order(12, 0, 1)
    assert images.batch(2).cases == tuple(source.name(n) for n in order[:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 13}, "batch of 13 from 12 images"),
        ({"batch_size": 0}, "batch of 0 from 12 images"),
        ({"batch_size": 6, "world": 2}, "expected a multiple of 4"),
        ({"batch_size": 8, "world": 2, "rank": 2}, "process 2 of 2"),
        ({"batch_size": 8, "repeats": 0}, "0 repeats"),
    ],
)
def test_batches_that_do_not_fit_are_refused(
    source: ImageFolder, options: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TrainingImages(source, TRANSFORM, **{"seed": 0, **options})  # type: ignore[arg-type]


def damage(source: ImageFolder, *indices: int) -> None:
    for index in indices:
        Path(source.name(index)).write_bytes(Path(source.name(index)).read_bytes()[:40])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_takes_the_place_of_a_damaged_one(source: ImageFolder, workers: int) -> None:
    damage(source, 3, 4, 11)
    images = TrainingImages(source, TRANSFORM, 12, seed=0, unreadable_limit=3)
    batch = next(images.batches(0, workers))
    order = epoch_order(12, 0, 0)
    taken = {3: 5, 4: 5, 11: 0}
    assert batch.cases == tuple(source.name(taken.get(n, n)) for n in order.tolist())
    assert {skipped.name for skipped in batch.skipped} == {source.name(n) for n in (3, 4, 11)}
    assert all(skipped.reason for skipped in batch.skipped)
    assert same(batch, images.batch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_images_end_the_run_with_the_first_five(source: ImageFolder, workers: int) -> None:
    damage(source, *range(6))
    images = TrainingImages(source, TRANSFORM, 3, seed=0, unreadable_limit=5)
    with pytest.raises(InputError, match=r"6 images cannot be decoded, expected at most 5") as raised:
        list(islice(images.batches(0, workers), 50))
    assert len(raised.value.problems) == 1
    assert str(raised.value).count(".png: ") == 5


def test_a_folder_without_a_good_image_ends(source: ImageFolder) -> None:
    damage(source, *range(12))
    with pytest.raises(InputError, match="12 images cannot be decoded"):
        TrainingImages(source, TRANSFORM, 3, seed=0).batch(0)


def test_files_that_vanish_count_as_unreadable(source: ImageFolder) -> None:
    Path(source.name(2)).unlink()
    batch = TrainingImages(source, TRANSFORM, 12, seed=0).batch(0)
    assert [skipped.name for skipped in batch.skipped] == [source.name(2)]
    assert "No such file" in batch.skipped[0].reason


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_sees_every_image_once(source: ImageFolder, workers: int, world: int) -> None:
    """In the batches of one process, which several take in turn."""
    ranks = [EvaluationImages(source, EvaluationTransform(16), 5, rank, world) for rank in range(world)]
    turns = zip_longest(*(rank.batches(workers) for rank in ranks))
    batches = [batch for turn in turns for batch in turn if batch is not None]
    assert [len(batch.cases) for batch in batches] == [5, 5, 2]
    assert [case for batch in batches for case in batch.cases] == [source.name(n) for n in range(12)]
    assert torch.cat([batch.target for batch in batches]).tolist() == source.targets.tolist()


def test_evaluation_leaves_damaged_images_out_if_it_may(source: ImageFolder) -> None:
    damage(source, 1, 5, 6, 7, 8, 9)
    images = EvaluationImages(source, EvaluationTransform(16), 5, unreadable_limit=6)
    batches = list(images.batches(2))
    assert [len(batch.cases) for batch in batches] == [4, 0, 2]
    assert batches[1].image.shape == (0, 3, 16, 16)
    assert sum(len(batch.skipped) for batch in batches) == 6
    assert torch.cat([batch.target for batch in batches]).tolist() == [0, 0, 0, 1, 2, 2]
    with pytest.raises(InputError, match="expected at most 0"):
        list(replace(images, unreadable_limit=0).batches(2))


def test_dropping_the_iterator_stops_its_threads(source: ImageFolder) -> None:
    before = threading.active_count()
    batches: Iterator[ImageBatch] = TrainingImages(source, TRANSFORM, 3, seed=0).batches(0, 2)
    next(batches)
    assert threading.active_count() == before + 2
    del batches
    assert threading.active_count() == before


def test_orders_are_not_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(5, 0, 0)[0] = 1


def test_real_images_from_a_folder_give_a_batch(shared_data: Path) -> None:
    source = image_folder(shared_data / "imagenet_mini/tiny64/train")
    assert (len(source), len(source.classes)) == (5000, 20)
    batch = next(TrainingImages(source, TrainingTransform(64), 64, seed=0).batches(0, 2))
    assert batch.image.shape == (64, 3, 64, 64)
    assert batch.skipped == ()
    assert abs(float(batch.image.mean())) < 1


@pytest.mark.gpu
def test_page_locked_batches(source: ImageFolder) -> None:
    images = TrainingImages(source, TRANSFORM, 4, seed=0)
    batch = next(images.batches(0, 2, pin_memory=True))
    assert batch.image.is_pinned()
    assert same(batch.to(torch.device("cuda")).to(torch.device("cpu")), images.batch(0))


def test_the_source_may_be_anything_with_names_and_bytes(
    source: ImageFolder, tree: Callable[..., Path]
) -> None:
    class Reversed:
        classes = source.classes
        targets = source.targets[::-1].copy()

        def __len__(self) -> int:
            return len(source)

        def name(self, index: int) -> str:
            return source.name(len(source) - 1 - index)

        def read(self, index: int) -> bytes:
            return source.read(len(source) - 1 - index)

    batch = TrainingImages(Reversed(), TRANSFORM, 12, seed=0).batch(0)
    named = [source.classes.index[Path(case).parent.name] for case in batch.cases]
    assert np.array_equal(batch.target, named)
