"""Tar shards: every sample by its number, an index that notices change, and damage that is named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medattn.data.images import Classes, Shards
from medattn.data.images.shards import expand
from medattn.errors import InputError

CLASSES = Classes.of(["n1", "n2", "n3"])
Members = list[tuple[str, bytes]]


def write(path: Path, members: Members, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, cls: int, size: int = 700) -> Members:
    image = np.random.default_rng(size + cls).bytes(size)
    return [(f"{key}.jpg", image), (f"{key}.cls", str(cls).encode()), (f"{key}.json", b"{}")]


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    """Three shards with three, one and two samples."""
    for shard, keys in enumerate((("a", "b", "c"), ("d",), ("e", "f"))):
        members = [part for n, key in enumerate(keys) for part in sample(key, n, 500 + 13 * shard)]
        write(tmp_path / f"t-{shard:03d}.tar", members)
    return str(tmp_path / "t-{000..002}.tar")


def test_samples_are_what_a_front_to_back_reading_finds(pattern: str) -> None:
    shards = Shards.open(pattern, CLASSES)
    assert len(shards) == 6
    assert shards.targets.tolist() == [0, 1, 2, 0, 0, 1]
    for index in np.random.default_rng(0).permutation(6):
        path, key = shards.name(index).rsplit(":", 1)
        with tarfile.open(path) as tar:
            assert shards.read(index) == tar.extractfile(f"{key}.jpg").read()  # type: ignore[union-attr]


def test_a_stored_index_is_used_until_the_shard_changes(pattern: str, tmp_path: Path) -> None:
    cache = tmp_path / "index"
    first = Shards.open(pattern, CLASSES, cache=cache)
    entries = sorted(cache.iterdir())
    assert len(entries) == 3
    again = Shards.open(pattern, CLASSES, cache=cache)
    assert sorted(cache.iterdir()) == entries
    assert [again.read(n) for n in range(6)] == [first.read(n) for n in range(6)]
    write(tmp_path / "t-001.tar", sample("d", 1, 900) + sample("z", 2, 30))
    changed = Shards.open(pattern, CLASSES, cache=cache)
    assert changed.targets.tolist() == [0, 1, 2, 1, 2, 0, 1]


def test_a_damaged_index_is_made_again(pattern: str, tmp_path: Path) -> None:
    Shards.open(pattern, CLASSES, cache=tmp_path / "index")
    for entry in (tmp_path / "index").iterdir():
        entry.write_bytes(entry.read_bytes()[:100])
    assert len(Shards.open(pattern, CLASSES, cache=tmp_path / "index")) == 6


def test_every_shard_is_looked_at_before_the_error(pattern: str, tmp_path: Path) -> None:
    write(tmp_path / "t-000.tar", [("a.jpg", b"x")])
    write(tmp_path / "t-002.tar", sample("e", 3))
    with pytest.raises(InputError) as raised:
        Shards.open(pattern, CLASSES)
    alone, beyond = raised.value.problems
    assert "t-000.tar: 1 keys without an image or without a .cls (a)" in alone
    assert "t-002.tar: class index 3, expected 0 to 2" in beyond


@pytest.mark.parametrize(
    ("members", "message"),
    [
        pytest.param([], "no samples", id="empty"),
        pytest.param([("a.cls", b"1")], "keys without an image", id="label alone"),
        pytest.param([("a.jpg", b""), ("a.cls", b"n1")], "1 labels that are no class index", id="wnid"),
        pytest.param([("a.jpg", b""), ("a.png", b""), ("a.cls", b"1")], "two images of key 'a'", id="two"),
    ],
)
def test_shards_of_another_form(tmp_path: Path, members: Members, message: str) -> None:
    path = write(tmp_path / "t.tar", members)
    with pytest.raises(InputError, match=message):
        Shards.open(str(path), CLASSES, partial=True)


def test_compressed_and_truncated_shards(tmp_path: Path) -> None:
    compressed = write(tmp_path / "t.tar", sample("a", 0), "w:gz")
    with pytest.raises(InputError, match="expected an uncompressed webdataset shard"):
        Shards.open(str(compressed), CLASSES, partial=True)
    whole = write(tmp_path / "u.tar", sample("a", 0, 5000) + sample("b", 1, 5000)).read_bytes()
    for length in (3000, 5700, 9000):
        (tmp_path / "u.tar").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"u\.tar: "):
            Shards.open(str(tmp_path / "u.tar"), CLASSES, partial=True)


def test_missing_classes_are_an_error_unless_allowed(pattern: str) -> None:
    more = Classes.of([*CLASSES.wnids, "n4"])
    with pytest.raises(InputError, match=r"no image of 1 of 4 classes \(n4\)"):
        Shards.open(pattern, more)
    assert len(Shards.open(pattern, more, partial=True)) == 6


def test_folders_and_hidden_members(tmp_path: Path) -> None:
    """Keys are paths up to the first dot of the name, as webdataset splits them."""
    path = write(tmp_path / "t.tar", [("._a.jpg", b"?"), *sample("v1.0/a", 1), *sample("v1.0/b", 0)])
    shards = Shards.open(str(path), CLASSES, partial=True)
    assert [key.decode() for key in shards.keys] == ["v1.0/a", "v1.0/b"]


def test_patterns(tmp_path: Path) -> None:
    names = [f"{split}-{n:02d}.tar" for split in (0, 1) for n in (8, 9, 10)]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in expand(str(tmp_path / "{0..1}-{08..10}.tar"))] == names
    assert [path.name for path in expand(str(tmp_path / "1-*.tar"))] == names[3:]
    with pytest.raises(InputError, match=r"1 of 2 shards do not exist \(.*1-11.tar\)"):
        expand(str(tmp_path / "1-{10..11}.tar"))
    with pytest.raises(InputError, match="names no file"):
        expand(str(tmp_path / "x*.tar"))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3000)), min_size=1, max_size=12))
def test_any_sizes_and_labels(tmp_path_factory: pytest.TempPathFactory, made: list[tuple[int, int]]) -> None:
    path = tmp_path_factory.mktemp("shards") / "t.tar"
    members = [part for n, (cls, size) in enumerate(made) for part in sample(f"k{n}", cls, size)]
    write(path, members)
    shards = Shards.open(str(path), CLASSES, partial=True)
    assert [(int(shards.targets[n]), len(shards.read(n))) for n in range(len(shards))] == made
