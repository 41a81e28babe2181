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
from medattn.segmenter import ModelCard, Segmenter, load_model
from medattn.training.distributed import ALONE, Processes, joined
from medattn_pipelines.progress import case_progress
from medattn_pipelines.runs import choose_device, choose_precision


def predict(
    model: Path, inputs: Sequence[Path], output: Path, *, export: Sequence[str] = (), device: str = "auto"
) -> None:
    """Segment volumes on their own grids: `<case>.nii.gz` each, `labels.json` and a manifest `report.json`.

    inputs: volume files, case folders, or folders of either. export: formats written beside each label map.
    Under torchrun the processes share the volumes. Raises InputError for inputs that cannot be read or that
    would get the same name.
    """
    with joined(choose_device(device)) as processes:
        volumes = find_volumes(inputs)
        card, network = load_model(model)
        precision = choose_precision("auto", processes.device)
        segmenter = Segmenter(card, network, processes.device, precision)
        segment_all(segmenter, volumes, output, export=export, processes=processes)


def segment_all(
    segmenter: Segmenter,
    volumes: Mapping[str, Path],
    output: Path,
    *,
    export: Sequence[str] = (),
    processes: Processes = ALONE,
) -> None:
    """Segment named volumes into a folder, with `labels.json` and a manifest `report.json`.

    The processes share the volumes. One that cannot be read does not stop the others; all such problems raise
    one InputError at the end, in every process.
    """
    sources = {path.resolve() for path in volumes.values()}
    if lost := [name for name in volumes if (output / f"{name}.nii.gz").resolve() in sources]:
        raise InputError(
            f"{output}: the result for {', '.join(lost)} would replace its own scan; choose another --output"
        )
    output.mkdir(parents=True, exist_ok=True)
    if processes.main:
        write_labels(output / "labels.json", _names(segmenter.card))
    rows, problems = dict[str, dict[str, Any]](), dict[str, list[str]]()
    mine = list(volumes)[processes.rank :: processes.world]
    with case_progress("Segmenting", len(mine), processes=processes.world) as on_case:
        for name in mine:
            path = volumes[name]
            begun = time.perf_counter()
            try:
                volume = read_volume(path)
                labels = segmenter.segment(volume)
            except InputError as error:
                problems[name] = [p if str(path) in p else f"{path}: {p}" for p in error.problems]
                continue
            _write(Volume(labels, volume.geometry), output / name, segmenter.card, export)
            rows[name] = {
                "case": name,
                "source": str(path),
                "size": volume.geometry.size,
                "spacing_mm": volume.geometry.spacing_mm(),
                "seconds": round(time.perf_counter() - begun, 2),
            }
            on_case(name)
    _write_manifest(segmenter, output, processes.collected(rows, volumes), processes)
    if failed := processes.collected(problems, volumes):
        raise InputError(*(problem for of_case in failed for problem in of_case))


def _write(labels: Volume, path: Path, card: ModelCard, export: Sequence[str]) -> None:
    """A label map, and its exports beside it. path: without suffix."""
    write_volume(path.with_name(f"{path.name}.nii.gz"), labels)
    if "seg.nrrd" in export:
        organs = {value: card.organs[organ] for value, organ in _names(card).items()}
        write_seg_nrrd(path.with_name(f"{path.name}.seg.nrrd"), labels.array, labels.geometry, organs)


def _names(card: ModelCard) -> dict[int, str]:
    return {value: name for value, name in card.labels.items() if name in card.organs}


def _write_manifest(
    segmenter: Segmenter, output: Path, cases: Sequence[Mapping[str, Any]], processes: Processes
) -> None:
    content: dict[str, Any] = {
        "medattn": __version__,
        "torch": torch.__version__,
        "device": segmenter.device.type,
        "precision": str(segmenter.precision).removeprefix("torch."),
        "network": segmenter.card.network,
        "cases": cases,
    }
    if segmenter.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(segmenter.device)
        content["gpu_peak_bytes"] = max(processes.gathered(peak))
    if processes.main:
        write_text(output / "report.json", json.dumps(content, indent=1) + "\n")


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
