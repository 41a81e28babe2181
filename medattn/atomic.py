"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medattn.errors import InputError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, of the same suffix, that takes its place when the block ends well.

    The data reach the disk before the name does. The temporary's name is fixed, so a killed process leaves at
    most one file, which the next attempt overwrites; on an error it is removed and `path` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".writing-{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write that fails does not say where
        raise


def require_new_folder(path: str | Path) -> None:
    """Raise InputError where `path` exists and is not an empty folder."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path}: exists and is not an empty folder; give another one or remove it")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and vanishes if not.

    Its name is fixed, so a killed process leaves at most one, which the next attempt replaces. Raises
    InputError, before the block begins, as `require_new_folder` does.
    """
    require_new_folder(path)
    target = Path(path).resolve()
    temporary = target.with_name(f".writing-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, whatever was there.

    Until then `path` is as it was; on an error it stays so. A kill may leave `path` absent for as long as two
    renames take, with what it was beside it: `restore_folder`, which this calls first, puts it back. The two
    names beside it are fixed, so that kills leave no more than these. Where the folder around `path` is gone,
    as when another process took the run over, it is not made again: FileNotFoundError.
    """
    target = Path(path).resolve()
    restore_folder(target)
    temporary, previous = _beside(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)
    if target.exists():
        target.rename(previous)
    temporary.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def restore_folder(path: str | Path) -> bool:
    """Put back what a kill inside `replaced_folder` moved aside; returns whether `path` exists then."""
    target = Path(path).resolve()
    _, previous = _beside(target)
    if not target.exists() and previous.exists():
        previous.rename(target)
    return target.exists()


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".writing-{target.name}"), target.with_name(f".previous-{target.name}")


@contextmanager
def claimed_folder(path: Path) -> Iterator[Path]:
    """A new folder `path` that `remove_abandoned` leaves alone until the block ends, in whichever way.

    The claim is a lock of the operating system's, which ends with the process. No clock is asked, which may
    jump, and no process number, which may be another's on another machine.
    """
    while True:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        with _locked(path) as locked:
            if locked is not False and path.exists():  # else one who cleans up came between the two calls
                yield path
                return


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove the subfolders that fit a pattern and that no living process has claimed."""
    for found in folder.glob(pattern):
        with _locked(found) as locked:
            if locked:
                shutil.rmtree(found, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Whether the folder's lock is this block's; None where it has none to give."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked: bool | None = True
    except OSError as error:  # a file system may be without locks
        locked = False if error.errno == errno.EWOULDBLOCK else None
    try:
        yield locked
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
