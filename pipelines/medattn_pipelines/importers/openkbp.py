"""OpenKBP's public layout: provided-data/{train,valid,test}-pats/pt_N/*.csv, sparse `index,value` rows.

Format: github.com/ababier/open-kbp, provided_code/utils.py and data_loader.py: C order on a grid of 128^3;
a mask holds indices alone; voxel_dimensions.csv has three lengths in mm. Axis 0 runs anterior to posterior,
axis 1 patient right to left, axis 2 superior to inferior. data_cards/openkbp.md tells how the axes, the
offset of the CT numbers and the limits below were established.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

from medattn.errors import InputError
from medattn.geometry import Array, Geometry
from medattn.io import Volume
from medattn_pipelines.importers.inventory import (
    Inventory,
    Options,
    Pending,
    Scan,
    add_organ,
    known_names,
)

GRID = 128
ORGANS = ("Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Esophagus", "Larynx", "Mandible")
SPLITS = {"train-pats": "train", "valid-pats": "validation", "test-pats": "test"}
SAME_PATIENT = {"pt_36": "pt_293"}  # training case -> the test case that holds the same scan and plan

NEEDED = ("Brainstem", "SpinalCord", "RightParotid", "LeftParotid")
KEPT_WHOLE = ("Brainstem", "RightParotid", "LeftParotid", "Mandible")
LEAST_KEPT = 0.95
WHOLE_SECTION_CM2 = (
    70.0  # least body section of a slice; what the source leaves around cord and brainstem is less
)
LEAST_BRAINSTEM_ML = 9.0
MOST_CORD_ML = 80.0


def find_openkbp(source: Path, options: Options) -> Inventory:
    """Find the patients of a copy of the repository, or of its folder provided-data, with their splits."""
    root = source / "provided-data" if (source / "provided-data").is_dir() else source
    known, dropped = known_names(ORGANS, options)
    labels = {value: name for value, name in enumerate(ORGANS, start=1) if name in known}
    cases, left_out = [], {}
    for folder_name, split in SPLITS.items():
        folders = [p for p in (root / folder_name).glob("pt_*") if p.is_dir()]
        for folder in sorted(folders, key=lambda p: (len(p.name), p.name)):
            name = f"openkbp_{folder.name}"
            if folder.name in SAME_PATIENT:
                left_out[name] = f"the same scan and plan as {SAME_PATIENT[folder.name]}, a test case"
            elif not (folder / "ct.csv").exists():
                left_out[name] = "has no ct.csv"
            else:
                load = partial(load_patient, folder, labels)
                cases.append(Pending(name, folder.name, split, f"OpenKBP {folder.name}", load))
    if not cases:
        raise InputError(
            f"{source}: no patient found, expected provided-data/train-pats/pt_N/ct.csv and others"
        )
    return Inventory(labels, tuple(cases), dropped, left_out)


def load_patient(folder: Path, labels: dict[int, str]) -> Scan | str:
    """Convert one patient, cropped in z to whole body sections where need be, or say why it is left out.

    CT numbers: HU = clip(value, 0, 4095) - 1000; voxels that are not stored lie outside the body: -1000.
    Raises InputError for files that are not in the format.
    """
    spacing_mm = _spacing_mm(folder / "voxel_dimensions.csv")
    indices, values = _rows(folder / "ct.csv", with_values=True)
    hu = _from_source(indices, np.clip(np.rint(values), 0, 4095) - 1000, fill=-1000).astype(np.int16)
    masks = {
        organ: _from_source(_rows(folder / f"{organ}.csv")[0], True, fill=False)
        for organ in ORGANS
        if (folder / f"{organ}.csv").exists()
    }
    if missing := [organ for organ in NEEDED if organ not in masks or not masks[organ].any()]:
        return f"{', '.join(missing)} not drawn"
    section_cm2 = (hu > -1000).sum(axis=(0, 1)) * spacing_mm[0] * spacing_mm[1] / 100
    start, stop = _whole_slices(section_cm2 >= WHOLE_SECTION_CM2, masks)
    for organ in KEPT_WHOLE:
        voxels = np.count_nonzero(masks[organ]) if organ in masks else 0
        if voxels and np.count_nonzero(masks[organ][:, :, start:stop]) < LEAST_KEPT * voxels:
            return f"{organ} lies in slices that the source has blanked"
    return _scan(hu, masks, labels, spacing_mm, (start, stop))


def _scan(
    hu: Array, masks: dict[str, Array], labels: dict[int, str], spacing_mm: Array, view: tuple[int, int]
) -> Scan | str:
    start, stop = view
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    masks = {organ: mask[:, :, start:stop] for organ, mask in masks.items()}
    if (ml := np.count_nonzero(masks["Brainstem"]) * voxel_ml) < LEAST_BRAINSTEM_ML:
        return f"brainstem of {ml:.1f} ml in view, expected at least {LEAST_BRAINSTEM_ML:g}"
    if (ml := np.count_nonzero(masks["SpinalCord"]) * voxel_ml) > MOST_CORD_ML:
        return f"spinal cord of {ml:.1f} ml, expected at most {MOST_CORD_ML:g}"
    label = np.zeros((GRID, GRID, stop - start), dtype=np.uint8)
    drawn = {value: organ for value, organ in labels.items() if organ in masks and masks[organ].any()}
    overlap_voxels = sum(add_organ(label, masks[organ], value) for value, organ in drawn.items())
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = -(GRID - 1) / 2 * spacing_mm  # the scanner's origin is not in the source: centre the grid
    affine[2, 3] += start * spacing_mm[2]
    image = Volume(np.ascontiguousarray(hu[:, :, start:stop]), Geometry(label.shape, affine))
    extra = {"z_cropped": (start, stop) != (0, GRID), "z_range_in_128": [start, stop]}
    return Scan(image, label, tuple(drawn.values()), overlap_voxels, extra)


def _whole_slices(whole: Array, masks: dict[str, Array]) -> tuple[int, int]:
    """All slices where every labelled one shows a whole section, else the run of whole ones with most labels.

    Outside the treated slices the source keeps a tube of CT around cord and brainstem, whose outline would
    give the label away.
    """
    labelled = np.sum([mask.sum(axis=(0, 1)) for mask in masks.values()], axis=0)
    if whole[labelled > 0].all():
        return 0, GRID
    runs, number = ndimage.label(whole)
    if not number:
        return 0, 0
    best = 1 + int(np.argmax(ndimage.sum(labelled, runs, range(1, number + 1))))
    kept = np.flatnonzero(runs == best)
    return int(kept[0]), int(kept[-1]) + 1


def _from_source(indices: Array, values: Array | bool, *, fill: int | bool) -> Array:
    """Sparse rows -> [x, y, z] with axes L, P, S."""
    dense = np.full(GRID**3, fill, dtype=np.asarray(values).dtype)
    dense[indices] = values
    return dense.reshape(GRID, GRID, GRID).transpose(1, 0, 2)[:, :, ::-1]


def _rows(path: Path, *, with_values: bool = False) -> tuple[Array, Array]:
    """The indices of a sparse file and, where asked for, its values (else none)."""
    columns = (0, 1) if with_values else (0,)
    try:
        with path.open(encoding="utf-8") as file:
            file.readline()
            start = file.tell()
            if not file.readline():
                return np.zeros(0, dtype=np.int64), np.zeros(0)
            file.seek(start)
            rows = np.loadtxt(file, delimiter=",", usecols=columns, ndmin=2)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: {error}, expected rows of index,value below one header row") from None
    indices = rows[:, 0].astype(np.int64)
    if (indices != rows[:, 0]).any() or indices.min() < 0 or indices.max() >= GRID**3:
        raise InputError(
            f"{path}: indices from {rows[:, 0].min():g} to {rows[:, 0].max():g}, expected whole numbers from "
            f"0 to {GRID**3 - 1}"
        )
    values = rows[:, 1] if with_values else np.zeros(0)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: a value is no finite number, expected CT numbers")
    return indices, values


def _spacing_mm(path: Path) -> Array:
    """Voxel size along x, y, z; the file has it in the source's axis order y, x, z."""
    try:
        lengths = np.loadtxt(path, ndmin=1)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: {error}, expected three lengths in mm") from None
    if lengths.shape != (3,) or not np.isfinite(lengths).all() or lengths.min() <= 0:
        raise InputError(f"{path}: {lengths.tolist()}, expected three lengths in mm above 0")
    return lengths[[1, 0, 2]]
