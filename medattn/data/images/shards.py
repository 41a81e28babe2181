"""Images in tar shards, as webdataset writes them, with random access: any sample by its number.

A shard is read once from front to back for the places of its members; the places are kept, so that sample i
costs one seek however many shards there are, and training shuffles over all of them, not within a buffer.
Python's tarfile reads the headers; the webdataset package streams and could not do this.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from medattn.data.images.classes import Classes, listed
from medattn.data.images.folder import SUFFIXES
from medattn.errors import InputError

LABEL = "cls"
LONGEST_LABEL = 20  # bytes: a class index and perhaps a line break
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
FORMAT = 1  # raise it when the contents of an index change


@dataclass(frozen=True, eq=False)
class Shards:
    """Samples in the order of shards and of the members in them.

    shard: [n] which of `paths`. offset, size: [n] bytes of the encoded image. keys: [n] names without suffix.
    targets: [n] int64.
    """

    paths: tuple[Path, ...]
    classes: Classes
    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    keys: npt.NDArray[np.bytes_]

    @classmethod
    def open(
        cls,
        pattern: str,
        classes: Classes,
        *,
        cache: str | Path | None = None,
        partial: bool = False,
        workers: int = 2,
        on_shard: Callable[[], None] | None = None,
    ) -> Shards:
        """All shards that `pattern` names: braces (`train-{0000..1023}.tar`), a glob, or one file.

        Members `key.jpg` (or another image suffix) and `key.cls`, a class index in sorted order of wnids.
        cache: folder for the places of members; None reads every shard anew. partial: accept that some of
        `classes` have no image. on_shard is called when one more is indexed.

        Raises InputError for shards that are missing, compressed, truncated or without such pairs, and for
        class indices beyond `classes`. All shards are looked at before it raises.
        """
        paths = expand(pattern)
        problems, indices = list[str](), list[dict[str, Any]]()
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for index in pool.map(_named_index(len(classes), cache), paths):
                if isinstance(index, str):
                    problems.append(index)
                else:
                    indices.append(index)
                if on_shard:
                    on_shard()
        if problems:
            raise InputError(*problems)
        columns = {name: np.concatenate([index[name] for index in indices]) for name in indices[0]}
        if not partial:
            classes.require_all(np.unique(columns["targets"]).tolist(), pattern)
        count = [len(index["targets"]) for index in indices]
        shard = np.repeat(np.arange(len(paths), dtype=np.int32), count)
        return cls(paths=tuple(paths), classes=classes, shard=shard, **columns)

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        """Shard and key, for messages."""
        return f"{self.paths[self.shard[index]]}:{self.keys[index].decode('utf-8', 'replace')}"

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError."""
        with self.paths[self.shard[index]].open("rb") as file:
            file.seek(int(self.offset[index]))
            encoded: bytes = file.read(int(self.size[index]))
            return encoded


def expand(pattern: str) -> list[Path]:
    """The files that braces or a glob name, in order. Raises InputError for those that do not exist."""
    parts = RANGE.split(pattern)
    literals, bounds = parts[::3], list(zip(parts[1::3], parts[2::3], strict=True))
    ranges = [[str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)] for low, high in bounds]
    names = [
        "".join(text for pair in zip(literals, (*values, ""), strict=True) for text in pair)
        for values in product(*ranges)
    ]
    if not bounds and not Path(pattern).exists():
        names = sorted(glob(pattern, recursive=True))  # noqa: PTH207, the pattern may be absolute
    if not names:
        raise InputError(f"{pattern}: names no file, expected tar shards; correct the pattern")
    if missing := [name for name in names if not Path(name).is_file()]:
        raise InputError(
            f"{pattern}: {len(missing)} of {len(names)} shards do not exist ({listed(missing)}), expected "
            "all; complete them or correct the range"
        )
    return [Path(name) for name in names]


def _named_index(classes: int, cache: str | Path | None) -> Callable[[Path], dict[str, Any] | str]:
    """Path -> index, or the sentence that says what is wrong with the shard."""

    def index(path: Path) -> dict[str, Any] | str:
        try:
            found = _cached(path, Path(cache)) if cache is not None else _scan(path)
            _require_classes(path, found, classes)
        except InputError as error:
            return str(error)
        return found

    return index


def _cached(path: Path, cache: Path) -> dict[str, Any]:
    """The index from the cache, or made and put there; a shard that changed has another entry."""
    state = path.stat()
    made_from = f"{FORMAT} {path.resolve()} {state.st_size} {state.st_mtime_ns}"
    entry = cache / f"{path.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.npz"
    try:
        with entry.open("rb") as file, np.load(file) as stored:
            return {name: stored[name] for name in ("offset", "size", "targets", "keys")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        found = _scan(path)  # absent or damaged: an index costs nothing but time
    cache.mkdir(parents=True, exist_ok=True)
    # a name of its own: the processes of a run index the same shards at the same time
    temporary = cache / f".writing-{uuid4().hex}"
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, **found)
        temporary.replace(entry)
    finally:
        temporary.unlink(missing_ok=True)
    return found


def _scan(path: Path) -> dict[str, Any]:
    """Places of the images and their labels, in the order in which keys first appear."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in _members(shard):
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not stem:
                    continue  # hidden: what archivers of other systems leave
                if suffix == LABEL:
                    stored = shard.extractfile(member)
                    labels[key] = (
                        "" if stored is None else stored.read(LONGEST_LABEL).decode("ascii", "replace")
                    )
                elif f".{suffix.lower()}" in SUFFIXES:
                    if key in images:
                        raise InputError(
                            f"{path}: two images of key {key!r}, expected one; rewrite the shard"
                        )
                    images[key] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise InputError(
            f"{path}: not a whole tar file ({error}), expected an uncompressed webdataset shard; write or "
            "copy it again, without compression"
        ) from error
    return _columns(path, images, labels)


def _members(shard: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Regular files that are not hidden; tarfile's own list is emptied, or it would grow with the shard."""
    while (member := shard.next()) is not None:
        shard.members = []  # type: ignore[attr-defined]
        if member.isreg() and not member.issparse():
            yield member


def _columns(path: Path, images: dict[str, tuple[int, int]], labels: dict[str, str]) -> dict[str, Any]:
    if alone := sorted(images.keys() ^ labels.keys()):
        raise InputError(
            f"{path}: {len(alone)} keys without an image or without a .{LABEL} ({listed(alone)}), expected "
            "both; rewrite the shard"
        )
    if wrong := [f"{key}: {label!r}" for key, label in labels.items() if not label.strip().isdecimal()]:
        raise InputError(
            f"{path}: {len(wrong)} labels that are no class index ({listed(wrong)}), expected a number; "
            "rewrite the shard"
        )
    if not images:
        raise InputError(
            f"{path}: no samples, expected members key.jpg and key.{LABEL}; write the shard again"
        )
    offset, size = np.array(list(images.values()), np.int64).T
    if (end := int((offset + size).max())) > (length := path.stat().st_size):
        raise InputError(f"{path}: ends after {length} bytes, expected at least {end}; copy the shard again")
    targets = np.array([int(labels[key]) for key in images], np.int64)
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in images], np.bytes_)
    return {"offset": offset, "size": size, "targets": targets, "keys": keys}


def _require_classes(path: Path, index: dict[str, npt.NDArray[Any]], classes: int) -> None:
    if (largest := int(index["targets"].max())) >= classes:
        raise InputError(
            f"{path}: class index {largest}, expected 0 to {classes - 1}; give the class list that the "
            "shards were written for"
        )
