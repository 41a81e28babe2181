"""A file is there whole, or as it was before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from medattn.atomic import atomic_path, replaced_folder, write_text

FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from medattn.geometry import Geometry
from medattn.io import Volume, write_volume

path, limit = Path(sys.argv[1]), int(sys.argv[2])
voxels = np.random.default_rng(1).integers(0, 255, (40, 40, 40)).astype(np.uint8)
volume = Volume(voxels, Geometry((40, 40, 40), np.eye(4)))
if limit < 0:
    write_volume(path, volume)
    limit += path.stat().st_size
    path.write_text("old")
# the kernel refuses to let any file grow beyond the limit: a disk that fills up
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    write_volume(path, volume)
except OSError:
    sys.exit(3)
"""


def test_text_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    write_text(path, "grün")
    assert path.read_text(encoding="utf-8") == "grün"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half_written() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("new, but only ha")
            raise error

    with pytest.raises(error):
        half_written()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_appears_only_when_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    with atomic_path(path) as temporary:
        temporary.write_text("x")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename within one file system
        assert temporary.name.endswith(".nii.gz")  # writers choose the format by the suffix
    assert path.read_text() == "x"


def test_the_leftover_of_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("x")
        leftover = temporary
    leftover.write_text("of a killed process, longer than the next")
    write_text(path, "next")
    assert path.read_text() == "next"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        pass


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd"])
@pytest.mark.parametrize("limit", [100, 30_000, -1], ids=["at-once", "halfway", "last-byte"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, suffix: str, limit: int) -> None:
    path = tmp_path / f"scan{suffix}"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(limit)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_replaced_folder_does_not_bring_back_the_one_around_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replaced_folder(tmp_path / "moved/last"):
        pytest.fail("the run is another's by now")
    assert not (tmp_path / "moved").exists()
