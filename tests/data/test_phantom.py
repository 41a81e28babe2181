"""Practice cases: true sides, true tissues, the four states of an organ, and the same bytes every time."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from medattn.data.cases import CaseFolder, State, read_cases
from medattn.data.phantom import ORGANS, Phantom, phantom, write_phantoms
from medattn.data.phantom.acquisition import noise, store, store_geometry
from medattn.data.phantom.anatomy import Anatomy, Pose
from medattn.data.phantom.canvas import NUMBER, Canvas
from medattn.data.phantom.render import CODES
from medattn.data.phantom.shapes import capsule, ellipsoid, rounded_box
from medattn.errors import InputError
from medattn.geometry import Array, Geometry
from medattn.io import read_volume

VALUE = {name: value for value, name in ORGANS.items()}
PAIRS = (("Parotid_L", "Parotid_R"), ("Glnd_Submand_L", "Glnd_Submand_R"))
ALL_CODES = [
    "".join(letters)
    for order in itertools.permutations(("RL", "AP", "IS"))
    for letters in itertools.product(*order)
]
SOME_CODES = (*dict.fromkeys(CODES), "RPS", "SAL", "IRP", "AIL")


@pytest.fixture(scope="module")
def scans() -> list[Phantom]:
    """Six patients at the default size."""
    return [phantom(seed, 96) for seed in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> CaseFolder:
    """A small set on disk, with as many cases as the default."""
    return write_phantoms(tmp_path_factory.mktemp("phantom") / "set", size=32)


def _digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _centre_lps_mm(scan: Phantom, organ: str) -> Array:
    return scan.geometry.to_lps(np.argwhere(scan.label == VALUE[organ])).mean(axis=0)


def test_the_same_arguments_write_the_same_bytes_into_the_same_or_another_folder(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "a", cases=3, size=32, seed=5)
    first = _digests(tmp_path / "a")
    write_phantoms(tmp_path / "a", cases=3, size=32, seed=5)
    write_phantoms(tmp_path / "b", cases=3, size=32, seed=5)
    assert first == _digests(tmp_path / "a") == _digests(tmp_path / "b")


def test_another_seed_draws_other_patients(tmp_path: Path) -> None:
    assert not np.array_equal(phantom(1, 32, codes="LPS").image, phantom(2, 32, codes="LPS").image)
    write_phantoms(tmp_path / "a", cases=2, size=32, seed=0)
    write_phantoms(tmp_path / "b", cases=2, size=32, seed=1)
    assert not set(_digests(tmp_path / "a").values()) & {
        digest for name, digest in _digests(tmp_path / "b").items() if name.endswith("image.nii.gz")
    }


def test_left_organs_lie_on_the_patients_left_in_every_storage_order() -> None:
    seen = set()
    for codes in SOME_CODES:
        scan = phantom(3, 32, codes=codes)
        seen.add(scan.geometry.axis_codes())
        for left, right in PAIRS:
            assert _centre_lps_mm(scan, left)[0] > _centre_lps_mm(scan, right)[0] + 30
        assert _centre_lps_mm(scan, "Bone_Mandible")[1] < _centre_lps_mm(scan, "SpinalCord")[1] - 30
        assert _centre_lps_mm(scan, "Brainstem")[2] > _centre_lps_mm(scan, "SpinalCord")[2] + 30
    assert seen == set(SOME_CODES)


def test_storage_order_moves_no_voxel_in_the_patient() -> None:
    plain = phantom(4, 32, codes="LPS")
    rng = np.random.default_rng(0)
    for codes in dict.fromkeys(CODES):
        other = phantom(4, 32, codes=codes)
        index = rng.integers(0, plain.geometry.size, (200, 3))
        affine = other.geometry.affine
        there = np.linalg.solve(affine[:3, :3], (plain.geometry.to_lps(index) - affine[:3, 3]).T).T
        np.testing.assert_allclose(there, np.rint(there), atol=1e-6)
        place = tuple(np.rint(there).astype(int).T)
        np.testing.assert_array_equal(other.image[place], plain.image[tuple(index.T)])
        np.testing.assert_array_equal(other.label[place], plain.label[tuple(index.T)])


def test_storing_agrees_with_the_way_back_to_canonical() -> None:
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    affine = np.diag([1.5, 2.0, 3.0, 1.0])
    affine[:3, 3] = (10, -20, 30)
    for codes in ALL_CODES:
        geometry = store_geometry(Geometry((2, 3, 4), affine), codes)
        canonical, turn = geometry.canonical()
        assert canonical.difference(Geometry((2, 3, 4), affine)) is None
        np.testing.assert_array_equal(turn.apply(store(array, codes)), array)


@pytest.mark.parametrize(
    ("organ", "low_ml", "high_ml"),
    [
        # 10th to 90th percentile of real contours, for single patients widened by a third: OpenKBP,
        # 83 scans (Babier et al., Med. Phys. 48, 2021); glands: Nikolov et al., arXiv:1809.04430, 35 scans
        ("Brainstem", 12.3, 33.2),
        ("SpinalCord", 10.1, 36.4),
        ("Bone_Mandible", 42.0, 80.9),
        ("Parotid_L", 18.0, 39.8),
        ("Parotid_R", 18.6, 41.6),
        ("Glnd_Submand_L", 6.5, 12.5),
        ("Glnd_Submand_R", 6.5, 12.5),
    ],
)
def test_volumes_are_those_of_real_organs(
    scans: list[Phantom], organ: str, low_ml: float, high_ml: float
) -> None:
    volumes = [
        np.count_nonzero(scan.label == VALUE[organ]) * scan.geometry.voxel_volume_ml() for scan in scans
    ]
    assert low_ml <= np.median(volumes) <= high_ml
    assert min(volumes) >= low_ml / 1.33
    assert max(volumes) <= high_ml * 1.33


def _inner_hu(scans: list[Phantom], material: str) -> Array:
    """HU of voxels whose six neighbours are of the same material."""
    return np.concatenate(
        [scan.image[binary_erosion(scan.material == NUMBER[material])].astype(float) for scan in scans]
    )


@pytest.mark.parametrize(
    ("material", "low_hu", "high_hu"),
    [
        # customary CT numbers: Bushberg et al., The Essential Physics of Medical Imaging; Radiopaedia
        # "Hounsfield unit"; glands include patients with contrast medium
        ("air", -1010, -990),
        ("fat", -120, -80),
        ("muscle", 40, 75),
        ("grey matter", 30, 45),
        ("white matter", 20, 36),
        ("brainstem", 25, 45),
        ("cord", 20, 45),
        ("vitreous", -5, 25),
        ("parotid", -25, 35),
        ("submandibular", 25, 80),
        ("spongy bone", 200, 600),
        ("bone", 600, 1600),
    ],
)
def test_tissues_have_the_hu_of_ct(
    scans: list[Phantom], material: str, low_hu: float, high_hu: float
) -> None:
    inner = _inner_hu(scans, material)
    assert inner.size > 50
    assert low_hu <= np.median(inner) <= high_hu


def test_teeth_and_metal_stand_out(scans: list[Phantom]) -> None:
    assert max(scan.image.max() for scan in scans) > 2000
    for scan in scans:
        assert scan.image.dtype == np.int16
        assert scan.image.min() >= -1024
        assert scan.image.max() <= 3071


def test_ventricles_are_darker_than_the_brain_around_them(scans: list[Phantom]) -> None:
    fluid = _inner_hu(scans, "csf")
    assert np.percentile(fluid, 10) < 15
    assert np.median(_inner_hu(scans, "grey matter")) - np.percentile(fluid, 25) > 10


def test_left_and_right_glands_look_alike(scans: list[Phantom]) -> None:
    for pair in PAIRS:
        differences = []
        for scan in scans:
            left, right = (
                scan.image[binary_erosion(scan.label == VALUE[name])].astype(float) for name in pair
            )
            differences.append(left.mean() - right.mean())
            assert 0.6 < left.std() / right.std() < 1.7
        # no side is brighter: the mean over patients lies within three standard errors of 0
        error = np.std(differences, ddof=1) / np.sqrt(len(differences))
        assert abs(np.mean(differences)) < 3 * error
        assert np.abs(differences).max() < 12


def test_glands_differ_little_from_their_surroundings(scans: list[Phantom]) -> None:
    muscle, fat = np.median(_inner_hu(scans, "muscle")), np.median(_inner_hu(scans, "fat"))
    assert fat < np.median(_inner_hu(scans, "parotid")) < muscle
    assert abs(np.median(_inner_hu(scans, "submandibular")) - muscle) < 25


def test_two_scans_of_a_patient_share_the_anatomy_and_nothing_else() -> None:
    first, second = phantom(6, 64, scan=0, codes="LPS"), phantom(6, 64, scan=1, codes="LPS")
    assert first.anatomy.scale == second.anatomy.scale
    assert not np.allclose(first.pose.rotation, second.pose.rotation)
    for value, organ in ORGANS.items():
        volumes = [np.count_nonzero(s.label == value) * s.geometry.voxel_volume_ml() for s in (first, second)]
        # the cord ends with the scan, whose lowest slice moves with the pose
        assert volumes[0] == pytest.approx(volumes[1], rel=0.25 if organ == "SpinalCord" else 0.08)


def test_size_changes_the_voxels_and_not_the_patient() -> None:
    coarse, fine = phantom(7, 64, codes="LPS"), phantom(7, 96, codes="LPS")
    assert coarse.label.shape[:2] == (64, 64)
    assert coarse.geometry.spacing_mm()[0] == pytest.approx(1.5 * fine.geometry.spacing_mm()[0])
    for organ in ORGANS.values():
        np.testing.assert_allclose(_centre_lps_mm(coarse, organ), _centre_lps_mm(fine, organ), atol=2.0)


def test_a_removed_gland_leaves_fat_and_the_others_stay() -> None:
    whole = phantom(8, 64, codes="LPS")
    operated = phantom(8, 64, codes="LPS", removed=frozenset({"Parotid_L"}))
    gone = whole.label == VALUE["Parotid_L"]
    assert not (operated.label == VALUE["Parotid_L"]).any()
    np.testing.assert_array_equal(operated.label[~gone], whole.label[~gone])
    assert np.median(operated.image[binary_erosion(gone)]) < np.median(whole.image[binary_erosion(gone)]) - 50


def test_the_set_reads_back_with_three_states_of_an_organ(folder: CaseFolder) -> None:
    again = read_cases(folder.root)
    assert again == folder
    assert json.loads((folder.root / "labels.json").read_text()) == {str(v): n for v, n in ORGANS.items()}
    states = {split: [State.PRESENT][:0] for split in ("train", "validation")}
    for case in again.cases:
        label = read_volume(case.label)
        assert label.geometry.difference(read_volume(case.image).geometry) is None
        counts = np.bincount(label.array.ravel(), minlength=8)
        assert set(np.flatnonzero(counts)) <= {0} | {VALUE[organ] for organ in case.contoured}
        assert case.split is not None
        states[case.split] += [again.state(case, organ, int(counts[VALUE[organ]])) for organ in VALUE]
    assert {*states["train"]} == {State.PRESENT, State.EMPTY, State.NOT_CONTOURED}
    assert {*states["validation"]} == {State.PRESENT}
    undrawn = states["train"].count(State.NOT_CONTOURED) / len(states["train"])
    assert 0.08 < undrawn < 0.22
    assert again.state(again.cases[0], "Cochlea_L", 0) is State.NOT_IN_LABELS


def test_three_quarters_train_and_no_patient_is_in_two_splits(folder: CaseFolder) -> None:
    train, validation = folder.split("train"), folder.split("validation")
    assert (len(train), len(validation)) == (18, 6)
    assert not {case.group for case in train} & {case.group for case in validation}
    assert len({case.group for case in folder.cases}) == 20


def test_the_set_mixes_storage_orders_and_spacings(folder: CaseFolder) -> None:
    grids = [read_volume(case.image).geometry for case in folder.cases]
    assert len({grid.axis_codes() for grid in grids}) >= 3
    assert len({round(max(grid.spacing_mm()), 3) for grid in grids}) >= 3


@pytest.mark.parametrize("cases", [2, 3, 5])
def test_tiny_sets_have_both_splits_and_every_organ_drawn_somewhere(tmp_path: Path, cases: int) -> None:
    folder = write_phantoms(tmp_path / "set", cases=cases, size=32)
    drawn = {organ for case in folder.split("train") for organ in case.contoured}
    assert drawn == set(VALUE)
    assert folder.split("validation")


def test_progress_is_told_after_every_case(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_phantoms(tmp_path / "set", cases=2, size=32, on_case=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


def test_files_of_the_user_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files that are no practice cases"):
        write_phantoms(tmp_path, cases=2, size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="is a file"):
        write_phantoms(tmp_path / "thesis.txt", cases=2, size=32)


def test_a_smaller_set_leaves_no_case_of_the_larger_one(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "set", cases=3, size=32)
    (tmp_path / "set" / "phantom_003" / "mine.txt").write_text("kept")
    write_phantoms(tmp_path / "set", cases=2, size=32)
    assert {path.name for path in (tmp_path / "set").glob("phantom_*")} == {
        "phantom_001",
        "phantom_002",
        "phantom_003",
    }
    assert [path.name for path in (tmp_path / "set" / "phantom_003").iterdir()] == ["mine.txt"]


def test_impossible_arguments_are_all_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        write_phantoms(tmp_path / "set", cases=1, size=8, seed=-1)
    assert [problem.split()[0] for problem in caught.value.problems] == ["cases", "size", "seed"]
    assert not (tmp_path / "set").exists()


def test_painting_on_a_part_equals_painting_on_the_whole() -> None:
    grid = np.meshgrid(*[np.linspace(-50, 50, 21, dtype=np.float32)] * 3, indexing="ij")
    whole = Canvas.empty((grid[0], grid[1], grid[2]), 5.0, {})
    part = Canvas.empty((grid[0], grid[1], grid[2]), 5.0, {})
    view = part.near((-5, -35, 0), (45, 15, 40))
    for canvas in (whole, view):
        distance = ellipsoid(canvas.points, (20, -10, 20), (15, 15, 12))
        canvas.paint(distance, "muscle")
        canvas.mark(distance, 3)
    assert view.hu.size < whole.hu.size / 4
    np.testing.assert_array_equal(part.hu, whole.hu)
    np.testing.assert_array_equal(part.material, whole.material)
    np.testing.assert_array_equal(part.label, whole.label)


def test_shapes_have_the_volumes_of_the_textbook() -> None:
    grid = np.meshgrid(*[np.arange(-30, 30, 1.0) + 0.37] * 3, indexing="ij")
    points = (grid[0], grid[1], grid[2])
    inside = [
        np.count_nonzero(distance < 0)
        for distance in (
            ellipsoid(points, (1, 2, 3), (12, 18, 22)),
            capsule(points, (0, 0, -10), (0, 0, 10), (8, 8)),
            rounded_box(points, (10, 15, 20), 1e-3),
        )
    ]
    expected = [4 / 3 * np.pi * 12 * 18 * 22, np.pi * 64 * 20 + 4 / 3 * np.pi * 512, 20 * 30 * 40]
    np.testing.assert_allclose(inside, expected, rtol=0.02)


def test_noise_has_unit_spread_and_no_power_at_low_frequency() -> None:
    field = noise(np.random.default_rng(0), (128, 128, 8), (1.0, 1.0, 3.0))
    assert field.std() == pytest.approx(1, abs=1e-3)
    power = (np.abs(np.fft.fft2(field, axes=(0, 1))) ** 2).mean(axis=2)
    assert power[:4, :4].mean() < 0.15 * power[14:22, 14:22].mean()
    neighbours = np.corrcoef(field[..., 0].ravel(), field[..., 1].ravel())[0, 1]
    assert abs(neighbours) < 0.05


def test_pose_is_a_rotation_and_its_two_directions_agree() -> None:
    pose = Pose.draw(np.random.default_rng(3))
    np.testing.assert_allclose(pose.rotation @ pose.rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(pose.rotation) == pytest.approx(1)
    here = np.random.default_rng(0).normal(0, 50, (20, 3))
    x, y, z = pose.to_scanner(here).T
    np.testing.assert_allclose(np.stack(pose.to_patient((x, y, z)), axis=1), here, atol=1e-9)


def test_glands_vary_between_sides_and_patients() -> None:
    patients = [Anatomy.draw(np.random.default_rng(seed), frozenset()) for seed in range(30)]
    left, right = (np.array([p.gland_scale[name] for p in patients]).prod(axis=1) for name in PAIRS[0])
    assert np.std(left) > 0.1
    assert 0.02 < np.std(left / right) < 0.25
    assert np.mean(left / right) == pytest.approx(1, abs=0.05)
