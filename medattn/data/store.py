"""Prepared volumes on disk: resampled once, chunked, compressed, and named by what they were made from.

The folder's name is a hash of the files' bytes and of the plan, so a changed case or plan is a new entry, and
many runs share one store. An entry appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import blosc2
import numpy as np
import torch

from medattn.atomic import claimed_folder, remove_abandoned
from medattn.data.cases import Case
from medattn.data.plan import Plan
from medattn.data.prepare import AIR, prepare_image, prepare_labels
from medattn.geometry import Array, Size
from medattn.io import read_volume

FORMAT = 1  # raise it when the contents of an entry change
CHUNK = 32  # voxels: a patch touches few chunks, and each decompresses in the caches
ANCHORS = 2000  # voxels kept per organ to centre patches on


@dataclass(frozen=True)
class Prepared:
    """One case ready to be cut into patches.

    image, label: compressed [i, j, k] arrays. anchors: per organ, [n, 3] voxels inside it (n may be 0).
    drawn: [K] bool, organ contoured in this case.
    """

    case: Case
    image: blosc2.NDArray
    label: blosc2.NDArray
    anchors: tuple[Array, ...]
    drawn: Array

    def patch(self, start: Sequence[int], size: Size) -> tuple[Array, Array]:
        """Image float32 and labels uint8 of `size` at `start`; outside the volume air and background."""
        inside = [
            slice(max(0, s), min(s + n, edge))
            for s, n, edge in zip(start, size, self.image.shape, strict=True)
        ]
        image, label = np.full(size, AIR, dtype=np.float32), np.zeros(size, dtype=np.uint8)
        if all(cut.start < cut.stop for cut in inside):
            target = tuple(slice(cut.start - s, cut.stop - s) for cut, s in zip(inside, start, strict=True))
            image[target] = self.image[tuple(inside)]
            label[target] = self.label[tuple(inside)]
        return image, label


def prepare_cases(
    cases: Sequence[Case],
    labels: Mapping[int, str],
    plan: Plan,
    store: Path,
    *,
    workers: int = 2,
    on_case: Callable[[], None] | None = None,
) -> list[Prepared]:
    """Bring every case to the plan's grid, or find it in the store, in the order of `cases`."""
    store.mkdir(parents=True, exist_ok=True)
    remove_abandoned(store, ".writing-*")  # of processes that were killed
    prepare = partial(_prepare, labels=labels, plan=plan, store=store)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        prepared = []
        for ready in pool.map(prepare, cases):
            prepared.append(ready)
            if on_case:
                on_case()
    return prepared


def _prepare(case: Case, labels: Mapping[int, str], plan: Plan, store: Path) -> Prepared:
    entry = store / _key(case, labels, plan)
    if not entry.is_dir():
        _write(entry, case, labels, plan)
    anchors = np.load(entry / "anchors.npz")
    return Prepared(
        case=case,
        image=blosc2.open(str(entry / "image.b2nd"), mode="r"),
        label=blosc2.open(str(entry / "label.b2nd"), mode="r"),
        anchors=tuple(anchors[f"organ_{number}"] for number in range(len(plan.organs))),
        drawn=np.array([organ in case.contoured for organ in plan.organs]),
    )


def _write(entry: Path, case: Case, labels: Mapping[int, str], plan: Plan) -> None:
    image = prepare_image(read_volume(case.image), plan)
    label = prepare_labels(read_volume(case.label), plan, labels).numpy()
    # half floats resolve the window to 1/1000 at half the traffic
    arrays = {"image": image.to(torch.float16).numpy(), "label": label}
    # the number keeps apart processes of one machine, and the machine's name those of several
    building = entry.with_name(f".writing-{entry.name}-{os.uname().nodename}-{os.getpid()}")
    with claimed_folder(building):
        try:
            for name, array in arrays.items():
                chunks = tuple(min(CHUNK, n) for n in array.shape)
                place = str(building / f"{name}.b2nd")
                blosc2.asarray(np.ascontiguousarray(array), urlpath=place, chunks=chunks)
            np.savez(building / "anchors.npz", **_anchors(label, len(plan.organs)))  # type: ignore[arg-type]
            building.rename(entry)
        except OSError:
            shutil.rmtree(building, ignore_errors=True)
            if not entry.is_dir():  # another process may have finished the same entry first
                raise


def _anchors(label: Array, organs: int) -> dict[str, Array]:
    """Up to ANCHORS voxels of each organ, evenly through its raster order: no chance is involved."""
    found = {}
    for number in range(organs):
        voxels = np.flatnonzero(label == number + 1)
        chosen = voxels[np.linspace(0, len(voxels) - 1, min(ANCHORS, len(voxels))).astype(np.int64)]
        found[f"organ_{number}"] = np.stack(np.unravel_index(chosen, label.shape), 1).astype(np.int16)
    return found


def _key(case: Case, labels: Mapping[int, str], plan: Plan) -> str:
    """Hash of everything that an entry depends on."""
    made_from = [FORMAT, sorted(labels.items()), plan.organs, plan.spacing_mm, plan.window_hu]
    digest = hashlib.sha256(json.dumps(made_from).encode())
    for path in (case.image, case.label):
        digest.update(path.read_bytes())
    return f"{case.name}-{digest.hexdigest()[:16]}"
