"""Plan, preparation, store, sampling and augmentation: geometry, sides, balance, and chance from the seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from medattn.data.augment import Augmentation
from medattn.data.cases import Case
from medattn.data.fingerprint import Fingerprint
from medattn.data.plan import Plan, make_plan
from medattn.data.prepare import channel_map, prepare_image, prepare_labels, prepared_geometry
from medattn.data.sampling import Batch, PatchSampler
from medattn.data.store import Prepared, prepare_cases
from medattn.errors import InputError
from medattn.geometry import Geometry
from medattn.io import Volume, write_volume

ORGANS = ("Parotid_L", "Parotid_R", "Brainstem")
LABELS = {4: "Parotid_L", 9: "Parotid_R", 2: "Brainstem"}
PLAN = Plan(ORGANS, (2.0, 2.0, 3.0), (8, 8, 8), (-200.0, 400.0), ((2, 2, 2),))


def print_of(size: tuple[int, int, int], spacing: tuple[float, float, float]) -> Fingerprint:
    return Fingerprint("c", size, spacing, (-150.0, 900.0), {"Brainstem": 10})


def test_published_window_maps_to_minus_one_zero_and_one() -> None:
    """HU -85, 90 and 265 of Jiang et al. 2019 become -1, 0 and 1; beyond, they are clipped."""
    plan = Plan(ORGANS, (1.0, 1.0, 1.0), (8, 8, 8), (-85.0, 265.0), ((2, 2, 2),))
    hu = np.array([-1000, -85, 90, 265, 3000], np.int16).reshape(5, 1, 1)
    prepared = prepare_image(Volume(hu, Geometry((5, 1, 1), np.eye(4))), plan)
    assert prepared.flatten().tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0]


def test_plan_takes_medians_and_what_the_caller_fixes() -> None:
    prints = [print_of((128, 128, 90), (4.0, 4.0, 3.0)), print_of((100, 100, 60), (5.0, 5.0, 2.0)),
              print_of((128, 128, 128), (4.5, 4.5, 3.0))]  # fmt: skip
    plan = make_plan(prints, ORGANS)
    assert plan.spacing_mm == (4.5, 4.5, 3.0)
    assert plan.window_hu == (-150.0, 900.0)
    assert np.prod(plan.patch_size) <= 1.5 * 64**3
    strides = np.prod(np.array(plan.strides), 0)
    assert all(n % s == 0 and n // s >= 4 for n, s in zip(plan.patch_size, strides, strict=True))
    fixed = make_plan(
        prints, ORGANS, spacing_mm=(1.0, 1.0, 1.0), patch_size=(32, 32, 16), window_hu=(0.0, 80.0)
    )
    assert (fixed.spacing_mm, fixed.patch_size, fixed.window_hu) == ((1.0,) * 3, (32, 32, 16), (0.0, 80.0))


def test_thick_slices_are_halved_last() -> None:
    plan = make_plan([print_of((256, 256, 40), (1.0, 1.0, 5.0))], ORGANS, patch_size=(128, 128, 16))
    assert plan.strides[:2] == ((2, 2, 1), (2, 2, 1))
    assert plan.strides[2][2] == 2


def test_nothing_to_learn_from_is_said() -> None:
    with pytest.raises(InputError, match="no case has a labelled voxel"):
        make_plan([], ORGANS)
    with pytest.raises(InputError, match="multiples of 16"):
        make_plan([print_of((9, 9, 9), (1.0, 1.0, 1.0))], ORGANS, patch_size=(7, 7, 7))


def test_prepared_axes_run_left_posterior_superior_over_the_same_field_of_view() -> None:
    affine = np.array([[0, -1.0, 0, 40], [0, 0, 2.5, -7], [-0.5, 0, 0, 9], [0, 0, 0, 1]])
    geometry = Geometry((60, 32, 20), affine)
    grid, _ = prepared_geometry(geometry, (2.0, 2.0, 3.0))
    assert grid.axis_codes() == "LPS"
    assert grid.size == (16, 25, 10)
    outer = lambda g: np.sort([g.to_lps(c) for c in ([-0.5] * 3, np.array(g.size) - 0.5)], 0)  # noqa: E731
    np.testing.assert_allclose(outer(grid), outer(geometry), atol=1e-9)


def test_labels_become_channels_in_the_order_of_the_plan() -> None:
    label = np.array([0, 4, 9, 2, 4], np.uint8).reshape(5, 1, 1)
    assert channel_map(label, LABELS, ORGANS).ravel().tolist() == [0, 1, 2, 3, 1]
    assert channel_map(label, LABELS, ("Brainstem",)).ravel().tolist() == [0, 0, 0, 1, 0]
    volume = Volume(label, Geometry((5, 1, 1), np.diag([2.0, 2.0, 3.0, 1.0])))
    assert prepare_labels(volume, PLAN, LABELS).flatten().tolist() == [0, 1, 2, 3, 1]


@pytest.fixture
def cases(tmp_path: Path) -> list[Prepared]:
    """Two cases; the second has no left parotid, and nobody drew its brainstem."""
    rng = np.random.default_rng(0)
    made = []
    for name, values, contoured in (("a", (4, 9, 2), ORGANS), ("b", (9,), ORGANS[:2])):
        folder = tmp_path / name
        folder.mkdir()
        label = np.zeros((20, 18, 14), np.uint8)
        for n, value in enumerate(values):
            label[3 + 5 * n : 6 + 5 * n, 4:9, 5:9] = value
        geometry = Geometry(label.shape, np.diag([2.0, 2.0, 3.0, 1.0]))
        write_volume(
            folder / "image.nii.gz", Volume(rng.integers(-300, 500, label.shape).astype(np.int16), geometry)
        )
        write_volume(folder / "label.nii.gz", Volume(label, geometry))
        made.append(Case(name, folder, name, "train", tuple(contoured)))
    return prepare_cases(made, LABELS, PLAN, tmp_path / "store")


def test_store_gives_back_what_was_prepared_and_is_found_again(cases: list[Prepared], tmp_path: Path) -> None:
    entries = sorted((tmp_path / "store").iterdir())
    stamps = [entry.stat().st_mtime_ns for entry in entries]
    again = prepare_cases([case.case for case in cases], LABELS, PLAN, tmp_path / "store")
    assert [entry.stat().st_mtime_ns for entry in entries] == stamps
    assert np.array_equal(again[0].image[:], cases[0].image[:])
    assert [len(a) for a in cases[0].anchors] == [60, 60, 60]
    assert [len(a) for a in cases[1].anchors] == [0, 60, 0]
    assert cases[1].drawn.tolist() == [True, True, False]


def test_a_changed_file_is_prepared_anew(cases: list[Prepared], tmp_path: Path) -> None:
    case = cases[0].case
    geometry = Geometry((20, 18, 14), np.diag([2.0, 2.0, 3.0, 1.0]))
    write_volume(case.label, Volume(np.zeros((20, 18, 14), np.uint8), geometry))
    changed = prepare_cases([case], LABELS, PLAN, tmp_path / "store")[0]
    assert int(changed.label[:].sum()) == 0
    assert len(list((tmp_path / "store").iterdir())) == 3


def test_a_patch_outside_the_volume_is_air_and_background(cases: list[Prepared]) -> None:
    image, label = cases[0].patch((-3, 15, 0), (8, 8, 8))
    whole, labels = cases[0].image[:], cases[0].label[:]
    assert np.array_equal(image[3:, :3], whole[:5, 15:, :8])
    assert np.array_equal(label[3:, :3], labels[:5, 15:, :8])
    assert np.unique(image[:3]).tolist() == [-1.0]
    assert cases[0].patch((90, 0, 0), (4, 4, 4))[1].sum() == 0


def test_a_batch_is_a_function_of_seed_and_step(cases: list[Prepared]) -> None:
    sampler = PatchSampler(cases, (8, 8, 8), 3, 0.5, seed=5)
    direct = [sampler.batch(step) for step in range(6)]
    for workers in (0, 1, 3):
        stream = sampler.batches(2, workers)
        for expected in direct[2:]:
            got = next(stream)
            assert torch.equal(got.image, expected.image)
            assert torch.equal(got.label, expected.label)
            assert got.cases == expected.cases
    assert not torch.equal(PatchSampler(cases, (8, 8, 8), 3, 0.5, seed=6).batch(0).image, direct[0].image)


def test_organs_are_looked_at_equally_often_however_rare(cases: list[Prepared]) -> None:
    """Left parotid and brainstem exist in one case of two, yet each gets a third of the centred patches."""
    sampler = PatchSampler(cases, (8, 8, 8), 1, 1.0, seed=0)
    seen = Counter(batch.cases[0] for batch in (sampler.batch(step) for step in range(300)))
    assert seen["a"] / 300 == pytest.approx(1 / 3 + 1 / 6 + 1 / 3, abs=0.08)
    present = sum(int(sampler.batch(step).label.max() > 0) for step in range(100))
    assert present == 100


def augmentation(**changes: object) -> Augmentation:
    nothing = {
        "spacing_mm": (2.0, 2.0, 3.0), "mirror": (1, 0, 2), "flip_probability": 0.0,
        "affine_probability": 0.0, "rotate_degrees": 15.0, "scale_range": (0.8, 1.25), "translate_mm": 5.0,
        "intensity_probability": 0.0, "contrast_range": (0.75, 1.25), "brightness": 0.2,
        "gamma_range": (0.7, 1.5), "noise": 0.1, "blur_mm": 2.0,
    }  # fmt: skip
    return Augmentation(**(nothing | changes))  # type: ignore[arg-type]


def batch() -> Batch:
    image = torch.rand(2, 1, 12, 10, 8, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(2, 12, 10, 8, dtype=torch.uint8)
    label[:, 1:4, 3:6, 2:5], label[:, 8:11, 3:6, 2:5], label[:, 5:7, 4:6, 2:4] = 1, 2, 3
    return Batch(image, label, torch.tensor([[True, False, True], [True, True, True]]), ("a", "b"))


def test_a_flip_swaps_paired_labels_and_who_was_drawn() -> None:
    before = batch()
    after = augmentation(flip_probability=1.0)(before, seed=0, step=0)
    assert torch.equal(after.image, before.image.flip(2))
    flipped = before.label.flip(1)
    expected = torch.where(flipped == 1, 2, torch.where(flipped == 2, 1, flipped))
    assert torch.equal(after.label, expected.to(torch.uint8))
    assert after.drawn.tolist() == [[False, True, True], [True, True, True]]
    twice = augmentation(flip_probability=1.0)(after, seed=0, step=1)
    assert torch.equal(twice.label, before.label)
    assert torch.equal(
        augmentation(flip_probability=1.0, mirror=None)(before, seed=0, step=0).image, before.image
    )


def test_the_affine_map_moves_image_and_labels_together_and_turns_without_shearing() -> None:
    before = batch()
    image = (before.label == 1).float()[:, None]
    moved = augmentation(
        affine_probability=1.0, rotate_degrees=0.0, scale_range=(1.0, 1.0), translate_mm=6.0
    )(Batch(image, before.label, before.drawn, before.cases), seed=3, step=1)
    assert not torch.equal(moved.label, before.label)
    agree = ((moved.image[:, 0] > 0.5) == (moved.label == 1)).float().mean()
    assert float(agree) > 0.97

    change = augmentation(scale_range=(1.0, 1.0), translate_mm=0.0, rotate_degrees=30.0)
    size = torch.tensor([12.0, 10.0, 8.0])
    matrix = change._matrix(size, torch.Generator().manual_seed(1))[:, :3].flip(0).flip(1)
    half_mm = size * torch.tensor([2.0, 2.0, 3.0]) / 2
    in_mm = matrix * half_mm[:, None] / half_mm
    torch.testing.assert_close(in_mm @ in_mm.T, torch.eye(3), atol=1e-5, rtol=1e-5)
    assert float(torch.linalg.det(in_mm)) == pytest.approx(1, abs=1e-5)


def test_zoom_two_shows_the_middle_half() -> None:
    ramp = torch.linspace(-1, 1, 16).reshape(1, 1, 16, 1, 1).expand(1, 1, 16, 4, 4).contiguous()
    one = Batch(ramp, torch.zeros(1, 16, 4, 4, dtype=torch.uint8), torch.ones(1, 3, dtype=torch.bool), ("a",))
    change = augmentation(
        affine_probability=1.0, rotate_degrees=0.0, translate_mm=0.0, scale_range=(2.0, 2.0)
    )
    zoomed = change(one, seed=0, step=0).image
    torch.testing.assert_close(zoomed, ramp / 2, atol=1e-5, rtol=1e-5)


def test_intensity_changes_leave_labels_alone_and_repeat_with_the_seed() -> None:
    before = batch()
    change = augmentation(intensity_probability=1.0, affine_probability=1.0, flip_probability=0.5)
    first, second = change(before, seed=1, step=7), change(before, seed=1, step=7)
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.label, second.label)
    assert not torch.equal(first.image, change(before, seed=1, step=8).image)
    assert torch.equal(before.image, batch().image)
    only = augmentation(intensity_probability=1.0)(before, seed=0, step=0)
    assert torch.equal(only.label, before.label)
    assert bool(only.image.isfinite().all())


def test_blur_keeps_the_mean_and_spreads_by_its_deviation_in_mm() -> None:
    from medattn.data.augment import _blur

    image = torch.zeros(1, 1, 41, 41, 41)
    image[0, 0, 20, 20, 20] = 1
    smooth = _blur(image, torch.tensor([4.0]), (2.0, 2.0, 4.0))[0, 0]
    assert float(smooth.sum()) == pytest.approx(1, abs=1e-4)
    for axis, step in enumerate((2.0, 2.0, 4.0)):
        profile = smooth.sum([a for a in range(3) if a != axis])
        offsets = (torch.arange(41) - 20) * step
        assert float((profile * offsets**2).sum()) == pytest.approx(16, rel=0.05)
