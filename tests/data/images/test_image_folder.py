"""Which files belong to which class, in every layout, and what is said when they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import io

from medattn.data.images import Classes, image_folder, read_classes, read_real_labels, validation_images
from medattn.errors import InputError

WNIDS = ("n00000001", "n00000002", "n00000003")
Tree = Callable[..., Path]


def test_class_indices_follow_sorted_wnids_whatever_the_order_on_disk(tree: Tree) -> None:
    source = image_folder(tree(wnids=WNIDS[::-1]))
    assert source.classes.wnids == WNIDS
    assert source.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [Path(source.name(n)).parent.name for n in (0, 4, 11)] == list(WNIDS)
    assert source.read(5) == Path(source.name(5)).read_bytes()


def test_files_equal_those_of_torchvision(tree: Tree, torchvision: ModuleType) -> None:
    folder = tree()
    from torchvision.datasets import ImageFolder

    peer = ImageFolder(str(folder))
    source = image_folder(folder)
    assert [(source.name(n), int(t)) for n, t in enumerate(source.targets)] == peer.samples


def test_other_files_hidden_files_and_hidden_folders_are_no_images(tree: Tree) -> None:
    folder = tree()
    (folder / WNIDS[0] / "notes.txt").touch()
    (folder / WNIDS[0] / "._n00000001_0.png").touch()
    (folder / ".cache").mkdir()
    below = folder / WNIDS[0] / "images"
    below.mkdir()
    (folder / WNIDS[0] / f"{WNIDS[0]}_0.png").rename(below / "a.JPEG")
    assert len(image_folder(folder)) == 12


def test_a_model_of_more_classes_keeps_its_indices(tree: Tree) -> None:
    classes = Classes.of(["n00000000", *WNIDS, "n00000009"])
    with pytest.raises(InputError, match=r"no image of 2 of 5 classes \(n00000000, n00000009\)"):
        image_folder(tree(), classes)
    source = image_folder(tree("again"), classes, partial=True)
    assert np.unique(source.targets).tolist() == [1, 2, 3]


def test_validation_folders_must_have_the_classes_of_training(tree: Tree) -> None:
    train = image_folder(tree())
    with pytest.raises(InputError, match=r"val: no image of 1 of 3 classes \(n00000003\)"):
        validation_images(tree("val", WNIDS[:2], 1), train.classes)
    with pytest.raises(InputError, match=r"more: 1 wnids that are not among the 3 classes \(n00000004\)"):
        validation_images(tree("more", (*WNIDS, "n00000004"), 1), train.classes)
    assert validation_images(tree("good", WNIDS, 2), train.classes).targets.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_network_of_another_number_of_classes_is_named() -> None:
    with pytest.raises(InputError, match="data: 3 classes, expected 1000; set the network's"):
        Classes.of(WNIDS).require_count(1000, "data")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda folder: None, "no such folder", id="missing"),
        pytest.param(lambda folder: folder.mkdir(), "no folders in it", id="flat"),
        pytest.param(
            lambda folder: (folder / WNIDS[0]).mkdir(parents=True), "no image in 1 class", id="empty"
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "train")
    with pytest.raises(InputError, match=message) as raised:
        image_folder(tmp_path / "train")
    assert len(raised.value.problems) == 1
    assert "expected" in str(raised.value)


def flat(folder: Path, count: int) -> Path:
    folder.mkdir()
    for n in range(1, count + 1):
        (folder / f"ILSVRC2012_val_{n:08d}.JPEG").touch()
    return folder


def devkit(folder: Path, ids: list[int]) -> Path:
    """As the official one: ids in another order than wnids, inner nodes of the tree after the classes."""
    folder.mkdir()
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
    rows = [
        (2, WNIDS[0], "a, b", "", 0),
        (1, WNIDS[1], "c", "", 0),
        (3, WNIDS[2], "d", "", 0),
        (4, "n9", "e", "", 2),
    ]
    synsets = np.array(rows, dtype=[(name, object) for name in fields])
    io.savemat(folder / "meta.mat", {"synsets": synsets[:, None]})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{n}\n" for n in ids))
    return folder


def test_devkit_ids_mean_what_its_synsets_say(tmp_path: Path) -> None:
    images, kit = flat(tmp_path / "val", 4), devkit(tmp_path / "data", [1, 2, 3, 1])
    source = validation_images(images, Classes.of(WNIDS), labels=kit)
    assert source.targets.tolist() == [1, 0, 2, 1]
    assert source.name(3).endswith("val/ILSVRC2012_val_00000004.JPEG")


def test_devkit_must_fit_the_images(tmp_path: Path) -> None:
    images, classes = flat(tmp_path / "val", 4), Classes.of(WNIDS)
    with pytest.raises(InputError, match="4 images, expected 3, one per line"):
        validation_images(images, classes, labels=devkit(tmp_path / "a", [1, 2, 3]))
    with pytest.raises(InputError, match=r"ids without a wnid in .* \(7\)"):
        validation_images(images, classes, labels=devkit(tmp_path / "b", [1, 2, 3, 7]))
    (tmp_path / "b/meta.mat").write_bytes(b"no MATLAB")
    with pytest.raises(InputError, match="the devkit's synsets cannot be read"):
        validation_images(images, classes, labels=tmp_path / "b")


def test_a_list_of_files_and_wnids(tmp_path: Path) -> None:
    images, listing = flat(tmp_path / "val", 3), tmp_path / "val.txt"
    name = "ILSVRC2012_val_{:08d}.JPEG {}\n"
    listing.write_text(name.format(3, WNIDS[0]) + name.format(1, WNIDS[2]) + name.format(2, WNIDS[1]))
    source = validation_images(images, Classes.of(WNIDS), labels=listing)
    assert source.targets.tolist() == [2, 1, 0]
    listing.write_text(name.format(9, WNIDS[0]))
    with pytest.raises(InputError, match="1 of 1 files are not in"):
        validation_images(images, Classes.of(WNIDS), labels=listing)


def test_class_numbers_in_a_list_are_refused_because_nobody_knows_whose(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 65\n")
    with pytest.raises(InputError, match=r"val.txt line 1: .* expected `file wnid`"):
        validation_images(flat(tmp_path / "val", 1), Classes.of(WNIDS), labels=tmp_path / "val.txt")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("LOC_synset_mapping.txt", "n2 goldfish, carp\nn1 tench\n", id="text"),
        pytest.param("classes.json", '{"n2": "goldfish, carp", "n1": "tench"}', id="json"),
    ],
)
def test_class_lists(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    classes = read_classes(tmp_path / name)
    assert classes == Classes(("n1", "n2"), ("tench", "goldfish, carp"))
    assert classes.index == {"n1": 0, "n2": 1}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        pytest.param("a.txt", "", "empty file", id="empty"),
        pytest.param("a.txt", "n1 x\nn1 y\n", r"wnids listed twice \(n1\)", id="twice"),
        pytest.param("a.json", "[1]", "no object of strings", id="list"),
        pytest.param("a.json", "{", "no class list", id="damaged"),
    ],
)
def test_class_lists_that_are_none(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_classes(tmp_path / name)


def test_real_labels_belong_to_the_number_in_the_name(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("[[1, 2], [], [0]]")
    cases = ["/val/n01/ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000002.JPEG"]
    assert read_real_labels(tmp_path / "real.json", cases) == [(0,), ()]
    for case in ("ILSVRC2012_val_00000004.JPEG", "dog.jpg"):
        with pytest.raises(InputError, match="not one of the 3 images"):
            read_real_labels(tmp_path / "real.json", [case])
    (tmp_path / "real.json").write_text("{}")
    with pytest.raises(InputError, match="no ReaL labels"):
        read_real_labels(tmp_path / "real.json", cases)
