"""Prediction: volumes in, label maps on their own grids out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medattn import __version__
from medattn.atomic import write_text
from medattn.data.cases import write_labels
from medattn.errors import InputError
from medattn.export.slicer import write_seg_nrrd
from medattn.io import Volume, read_volume, write_volume
from medattn.io.volume import SUFFIXES, volume_stem
from medattn.segmenter import Segmenter, load_model
from medattn_pipelines.progress import case_progress
from medattn_pipelines.runs import choose_device, choose_precision


def predict(
    model: Path, inputs: Sequence[Path], output: Path, *, export: Sequence[str] = (), device: str = "auto"
) -> None:
    """Segment volumes on their own grids: `<case>.nii.gz` each, `labels.json` and a manifest `report.json`.

    inputs: volume files, case folders, or folders of either. export: formats written beside each label map.
    Raises InputError for inputs that cannot be read or that would get the same name.
    """
    volumes = find_volumes(inputs)
    chosen = choose_device(device)
    card, network = load_model(model)
    segmenter = Segmenter(card, network, chosen, choose_precision("auto", chosen))
    segment_all(segmenter, volumes, output, export=export)


def segment_all(
    segmenter: Segmenter, volumes: Mapping[str, Path], output: Path, *, export: Sequence[str] = ()
) -> None:
    """Segment named volumes into a folder, with `labels.json` and a manifest `report.json`.

    A volume that cannot be read does not stop the others; all such problems raise one InputError at the end.
    """
    card = segmenter.card
    sources = {path.resolve() for path in volumes.values()}
    if lost := [name for name in volumes if (output / f"{name}.nii.gz").resolve() in sources]:
        raise InputError(
            f"{output}: the result for {', '.join(lost)} would replace its own scan; choose another --output"
        )
    names = {value: name for value, name in card.labels.items() if name in card.organs}
    output.mkdir(parents=True, exist_ok=True)
    write_labels(output / "labels.json", names)
    manifest: list[dict[str, Any]] = []
    problems: list[str] = []
    with case_progress("Segmenting", len(volumes)) as on_case:
        for name, path in volumes.items():
            begun = time.perf_counter()
            try:
                volume = read_volume(path)
                labels = segmenter.segment(volume)
            except InputError as error:
                problems += [p if str(path) in p else f"{path}: {p}" for p in error.problems]
                continue
            write_volume(output / f"{name}.nii.gz", Volume(labels, volume.geometry))
            if "seg.nrrd" in export:
                organs = {value: card.organs[organ] for value, organ in names.items()}
                write_seg_nrrd(output / f"{name}.seg.nrrd", labels, volume.geometry, organs)
            seconds = round(time.perf_counter() - begun, 2)
            size, spacing_mm = volume.geometry.size, volume.geometry.spacing_mm()
            manifest.append(
                {
                    "case": name,
                    "source": str(path),
                    "size": size,
                    "spacing_mm": spacing_mm,
                    "seconds": seconds,
                }
            )
            on_case(name)
    content: dict[str, Any] = {
        "medattn": __version__,
        "torch": torch.__version__,
        "device": str(segmenter.device),
        "precision": str(segmenter.precision).removeprefix("torch."),
        "network": card.network,
        "cases": manifest,
    }
    if segmenter.device.type == "cuda":
        content["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(segmenter.device)
    write_text(output / "report.json", json.dumps(content, indent=1) + "\n")
    if problems:
        raise InputError(*problems)


def find_volumes(inputs: Sequence[Path]) -> dict[str, Path]:
    """Case name -> volume file for files, case folders and folders of either, in order."""
    found: dict[str, Path] = {}
    problems = []
    for given in inputs:
        volumes = _volumes(given)
        if not volumes:
            problems.append(
                f"{given}: no volume here; expected {', '.join(SUFFIXES)} or case folders with image.nii.gz"
            )
        for path in volumes:
            stem = volume_stem(path)
            name = path.absolute().parent.name if stem == "image" else stem
            if found.setdefault(name, path) != path:
                problems.append(
                    f"{path}: would be called {name} like {found[name]}; rename one or run them apart"
                )
    if problems:
        raise InputError(*problems)
    return found


def _volumes(given: Path) -> list[Path]:
    if given.is_file():
        return [given]
    for suffix in SUFFIXES:
        if (given / f"image{suffix}").is_file():
            return [given / f"image{suffix}"]
    entries = sorted(given.iterdir()) if given.is_dir() else []
    files = [path for path in entries if path.name.endswith(SUFFIXES) and not path.name.startswith(".")]
    files = [path for path in files if volume_stem(path) != "label"]  # of a case folder without its image
    return files or [found for path in entries if path.is_dir() for found in _volumes(path)]
