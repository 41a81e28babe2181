"""Mixup, cutmix and smoothing: timm's arithmetic for the same share and box, and draws from seed and step."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medattn.data.images import ImageBatch, Mixing
from medattn.data.images.mixing import Mix, cut, mixed_images, mixed_targets, soft_targets
from medattn.errors import InputError


def batch(size: int = 6, seed: int = 0) -> ImageBatch:
    rng = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 3, 10, 14, generator=rng)
    return ImageBatch(image, torch.randint(0, 5, (size,), generator=rng), ("x",) * size)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_arithmetic_equals_timms(
    timm: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, smoothing: float
) -> None:
    from timm.data import Mixup, mixup

    alphas = (0.8, 0.0) if kind == "mixup" else (0.0, 1.0)
    for seed in range(25):
        rng = np.random.default_rng(seed)
        share, row, column = float(rng.beta(1, 1)), int(rng.integers(10)), int(rng.integers(14))
        places = iter((row, column))
        with monkeypatch.context() as patched:
            patched.setattr(mixup.np.random, "beta", lambda *_, share=share: share)
            patched.setattr(mixup.np.random, "randint", lambda *_, places=places, **__: next(places))
            peer = Mixup(*alphas, label_smoothing=smoothing, num_classes=5)
            image, target = peer(batch().image.clone(), batch().target)
        mix = Mix(share) if kind == "mixup" else cut(10, 14, share, row, column)
        assert torch.equal(mixed_images(batch().image, mix), image)
        assert torch.equal(mixed_targets(soft_targets(batch().target, 5, smoothing), mix), target)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.data())
def test_a_cut_box_has_the_share_that_is_said(
    height: int, width: int, share: float, data: st.DataObject
) -> None:
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mix = cut(height, width, share, row, column)
    ones, zeros = torch.ones(1, 3, height, width), torch.zeros(1, 3, height, width)
    mixed = mixed_images(torch.cat([ones, zeros]), mix)
    assert mixed[0, 0].double().mean().item() == pytest.approx(mix.share)
    assert mix.share >= share - 1e-9  # never more is cut than drawn


def test_targets_sum_to_one_and_images_follow_them() -> None:
    for step in range(40):
        mixed = Mixing(classes=5)(batch(), seed=1, step=step)
        assert mixed.target.shape == (6, 5)
        assert mixed.target.dtype == torch.float32
        assert torch.allclose(mixed.target.sum(1), torch.ones(6))
        assert mixed.cases == batch().cases


def test_the_batch_that_is_given_stays_as_it_was() -> None:
    given_batch = batch()
    for step in range(10):
        Mixing(classes=5)(given_batch, seed=1, step=step)
    assert torch.equal(given_batch.image, batch().image)


def test_chance_comes_from_seed_and_step() -> None:
    mixing = Mixing(classes=5)
    first, again = (mixing(batch(), seed=2, step=9) for _ in range(2))
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, mixing(batch(), seed=2, step=10).image)
    assert not torch.equal(first.image, mixing(batch(), seed=3, step=9).image)


def test_shares_of_mixup_cutmix_and_neither() -> None:
    mixing = Mixing(classes=5, probability=0.6, switch=0.25)
    drawn = [mixing.draw(32, 32, np.random.default_rng(seed)) for seed in range(4000)]
    neither = np.mean([mix.box is None and mix.share == 1 for mix in drawn])
    cutmix = np.mean([mix.box is not None for mix in drawn])
    assert abs(neither - 0.4) < 0.03
    assert abs(cutmix - 0.15) < 0.02
    only = [Mixing(5, mixup=0).draw(32, 32, np.random.default_rng(seed)) for seed in range(50)]
    assert all(mix.box is not None for mix in only)
    only = [Mixing(5, cutmix=0).draw(32, 32, np.random.default_rng(seed)) for seed in range(50)]
    assert all(mix.box is None and mix.share < 1 for mix in only)


def test_smoothing_alone() -> None:
    mixed = Mixing(classes=5, mixup=0, cutmix=0, smoothing=0.1)(batch(), seed=0, step=0)
    assert torch.equal(mixed.image, batch().image)
    assert torch.equal(mixed.target.argmax(1), batch().target)
    assert torch.allclose(mixed.target.max(1).values, torch.tensor(0.92))


@pytest.mark.parametrize("options", [{"mixup": -1.0}, {"smoothing": 1.5}, {"probability": -0.1}])
def test_impossible_mixing_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected"):
        Mixing(5, **options)  # type: ignore[arg-type]
