"""The data under a run: whether they are still those that it began with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from medattn.data.cases import read_cases
from medattn.data.images.shards import expand
from medattn.data.panoptic.layouts import places
from medattn.errors import InputError
from medattn.training.runrecord import FILE, DataSet, digest_of, read_record
from medattn_pipelines.config import Config
from medattn_pipelines.configfile import AnyConfig
from medattn_pipelines.imageconfig import ImageConfig
from medattn_pipelines.panopticconfig import PanopticConfig

Stamp = tuple[int, int, int]  # size, time of change and number: a cheap sign that a file may be another
BIG = (".tar",)  # shards: told apart by size, as images are
CONTENTS, STARTING = "contents", "starting_weights"  # names of digests in run.json
UNREADABLE = "unreadable"
ADVICE = "put the old data back, then --resume, or start again with --overwrite"


@dataclass
class DataWatch:
    """Knows the parts of the data by their digests.

    A volume or a list is a part by its bytes; a folder of images by the names and sizes of the files directly
    in it, because millions of images are not read twice. find: the parts that there are now.
    """

    root: Path
    find: Callable[[], Iterable[Path]]
    starting: Mapping[str, str] = field(default_factory=dict)
    stamps: dict[Path, Stamp] = field(init=False)
    digests: dict[Path, str] = field(init=False)

    def __post_init__(self) -> None:
        self.stamps = {part: _stamp(part) for part in self.find()}
        with ThreadPoolExecutor(4) as pool:
            self.digests = dict(zip(self.stamps, pool.map(_digest, self.stamps), strict=True))

    @property
    def data_sets(self) -> list[DataSet]:
        """What run.json is to keep: a digest of all parts, wherever they lie, and of starting weights."""
        found = hashlib.blake2b(digest_size=16)
        for part, digest in sorted(self.digests.items()):
            found.update(f"{os.path.relpath(part, self.root)}\0{digest}\n".encode(errors="surrogateescape"))
        sets = [DataSet(CONTENTS, found.hexdigest(), str(self.root.resolve()))]
        return sets + [DataSet(f"{STARTING}.{name}", digest, name) for name, digest in self.starting.items()]

    def check(self, *, thorough: bool = False) -> None:
        """Raise InputError with a part that is another now.

        thorough: also look into folders that seem untouched, for images that were written over.
        """
        now = set(self.find())
        lost, new = sorted(self.stamps.keys() - now), sorted(now - self.stamps.keys())
        if lost or new:
            part, what = (lost[0], "is gone") if lost else (new[0], "is new")
            raise InputError(
                f"{part}: {what} since the training began; the last checkpoint is intact: {ADVICE}"
            )
        for part, before in self.stamps.items():
            if (stamp := _stamp(part)) == before and not (thorough and part.is_dir()):
                continue
            if _digest(part) != self.digests[part]:
                raise InputError(
                    f"{part}: changed since the training began; the last checkpoint is intact: {ADVICE}"
                )
            self.stamps[part] = stamp  # touched, or copied over itself


def watch_data(config: AnyConfig, run: Path, *, resume: bool) -> DataWatch:
    """The data of a config. Raises InputError where a run that resumes began with others."""
    models = {
        "network.weights": getattr(config.network, "weights", None),
        "network.backbone": getattr(config.network, "backbone", None),
        "distillation.teacher": config.distillation.teacher if isinstance(config, ImageConfig) else None,
    }
    starting = {name: digest_of(path) for name, path in models.items() if path is not None}
    watch = DataWatch(config.data.root, partial(_parts, config), starting)
    if resume and (run / FILE).is_file():
        before = {one.name: one.digest for one in read_record(run).data}
        problems = [
            f"{config.data.root if one.name == CONTENTS else one.source}: not what the run in {run} began "
            f"with (found {one.digest[:8]}, expected {before[one.name][:8]}{_latest(watch, one)}); {ADVICE}"
            for one in watch.data_sets
            if before.get(one.name, one.digest) != one.digest
        ]
        if problems:
            raise InputError(*problems)
    return watch


def _latest(watch: DataWatch, one: DataSet) -> str:
    """The part that changed last, which is often the one."""
    if one.name != CONTENTS or not watch.stamps:
        return ""
    part = max(watch.stamps, key=lambda path: watch.stamps[path][1])
    return f", changed last: {os.path.relpath(part, watch.root)}"


def _parts(config: AnyConfig) -> Iterator[Path]:
    root = config.data.root
    if isinstance(config, Config):
        yield from (path for path in (root / "cases.json", root / "labels.json") if path.exists())
        for case in read_cases(root).cases:
            if case.split != "test":
                yield from (path for path in (case.image, case.label) if path.exists())
    elif isinstance(config, PanopticConfig):
        for split in sorted({config.data.train, config.data.validation}):
            found = places(config.data.layout, root, split)
            yield found.json
            yield from {path for top in (found.images, found.labels) for path in _folders(top)}
    else:
        for top in sorted({config.data.train, config.data.validation}):
            yield from expand(str(root / top)) if top.endswith(".tar") else _folders(root / top)
        yield from (path for path in (config.data.classes, config.data.ground_truth) if path is not None)


def _folders(top: Path) -> Iterator[Path]:
    """A folder and all below it, but for hidden ones."""
    for folder, names, _ in os.walk(top, followlinks=True):
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield Path(folder)


def _stamp(part: Path) -> Stamp:
    try:
        found = part.stat()
    except OSError:
        return (-1, 0, 0)
    return (found.st_size, found.st_mtime_ns, found.st_ino)


def _digest(part: Path) -> str:
    if part.suffix in BIG:
        return str(_stamp(part)[0])
    if part.is_dir():
        try:
            with os.scandir(part) as entries:
                files = [e for e in entries if not e.name.startswith(".") and not e.is_dir()]
                listing = sorted(f"{entry.name}\0{entry.stat().st_size}\n" for entry in files)
        except OSError:
            return UNREADABLE
        return hashlib.blake2b("".join(listing).encode(errors="surrogateescape"), digest_size=16).hexdigest()
    return _contents(part, _stamp(part))


@lru_cache(maxsize=100_000)
def _contents(path: Path, stamp: Stamp) -> str:
    """Of the bytes of a file, read again if its stamp is another; the trials of a search share their data."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return UNREADABLE
