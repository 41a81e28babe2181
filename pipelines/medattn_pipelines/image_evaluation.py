"""Evaluate what a classifier said of images against their classes."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt
import torch

import medattn
from medattn.atomic import write_text
from medattn.data.images.classes import LISTED, Classes, listed, read_classes
from medattn.data.images.decode import ImageError, decode
from medattn.data.images.folder import validation_images
from medattn.data.images.reading import ImageSource, Skipped
from medattn.data.images.real import read_real_labels
from medattn.errors import InputError
from medattn.report.classification import ImageEvaluation, Real, to_csv, to_json
from medattn_pipelines.prediction_table import CLASSES, Table, read_predictions, table_path
from medattn_pipelines.progress import print_table

IMAGENET = 1000  # classes that ReaL labels count
SHOWN = 24  # mistakes that the report shows


def evaluate(
    prediction: Path,
    reference: Path,
    output: Path,
    *,
    real: Path | None = None,
    ground_truth: Path | None = None,
) -> ImageEvaluation:
    """Score a table of predictions and write metrics.csv, metrics.json and report.html into `output`.

    prediction: a folder with predictions.csv and classes.json, or that table. reference: class folders, or a
    flat folder with ground_truth (lines `file wnid`, or a devkit's data folder); a part of the classes will
    do. real: real.json, for ImageNet's validation images.

    Raises InputError with every problem of the files, and as `evaluate_source` does.
    """
    table = table_path(prediction)
    classes = read_classes(table.parent / CLASSES)
    try:
        source = validation_images(reference, classes, labels=ground_truth, partial=True)
    except InputError as error:
        raise InputError(*error.problems, *_problems(table, classes)) from error
    return evaluate_source(prediction, source, reference, output, real=real)


def evaluate_source(
    prediction: Path, source: ImageSource, root: Path, output: Path, *, real: Path | None = None
) -> ImageEvaluation:
    """As `evaluate`, of images whose names in the table are relative to `root`.

    Images that cannot be decoded need no prediction: they are named and count nowhere.

    Raises InputError for images on one side alone and images predicted twice, all at once.
    """
    path = table_path(prediction)
    table = read_predictions(path, source.classes)
    known = [os.path.relpath(source.name(number), root) for number in range(len(source))]
    places = match(table.names, known)
    problems = _check_names(path, root, table, known, places)
    missing = sorted(set(range(len(known))) - set(places))
    unreadable = _unreadable(source, missing, known)
    if unreadable is None:
        problems.append(
            f"{path}: no prediction of {len(missing)} of the {len(known)} images of {root} "
            f"({listed([known[number] for number in missing])}), expected one of each; predict these too"
        )
    if problems or unreadable is None:
        raise InputError(*problems)
    images = np.array(places, np.int64)
    order = images.argsort()  # that of the reference, so that the table's does not matter
    images = images[order]
    names = [known[number] for number in images]
    evaluation = ImageEvaluation(
        prediction=str(path),
        reference=str(root),
        classes=source.classes,
        names=names,
        target=source.targets[images],
        best=table.best[order],
        probability=table.probability[order],
        versions={
            "medattn": medattn.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        unreadable=unreadable,
        real=None if real is None else _real(real, names, table.best[order, 0], source.classes),
    )
    _write(output, evaluation, source, images)
    return evaluation


def print_summary(title: str, evaluation: ImageEvaluation) -> None:
    """Print the scores, and which images could not be decoded."""
    shown: dict[str, float | None] = {
        "images": evaluation.n,
        "classes": len(evaluation.per_class),
        "top-1": evaluation.top1,
        "top-5": evaluation.top5,
        "mean of classes": evaluation.mean_per_class,
        "calibration error": evaluation.ece,
    }
    if evaluation.real is not None:
        shown["ReaL top-1"] = evaluation.real.top1
    print_table(title, tuple(shown), [tuple(shown.values())])
    print_unreadable("images that cannot be decoded and count nowhere", evaluation.unreadable)


def print_unreadable(title: str, images: Sequence[Skipped]) -> None:
    """Print how many there are and the first with their reasons; nothing where there is none."""
    if images:
        first = "; ".join(f"{image.name}: {image.reason}" for image in images[:LISTED])
        print(f"{title}: {len(images)} ({first}{'; ...' if len(images) > LISTED else ''})")


def match(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Which of the known relative paths each name means; None for none.

    A name is that path, ends in it, or has its file name, where only one image is called so.

    >>> match(["val/cat/1.png", "2.png", "3.png"], ["cat/1.png", "dog/2.png"])
    [0, 1, None]
    """
    paths = {name: number for number, name in enumerate(known)}
    files: dict[str, int | None] = {}
    for number, name in enumerate(known):
        file = PurePath(name).name
        files[file] = None if file in files else number

    def place(name: str) -> int | None:
        parts = PurePath(name).parts
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((paths[end] for end in ends if end in paths), files.get(parts[-1] if parts else ""))

    return [place(name) for name in names]


def _problems(table: Path, classes: Classes) -> Sequence[str]:
    try:
        read_predictions(table, classes)
    except InputError as error:
        return error.problems
    return ()


def _check_names(
    path: Path, root: Path, table: Table, known: Sequence[str], places: Sequence[int | None]
) -> list[str]:
    """Problems of images that the reference lacks and of those predicted twice."""
    problems = []
    if strangers := [name for name, place in zip(table.names, places, strict=True) if place is None]:
        problems.append(
            f"{path}: images that are not in {root}, or whose file name several there have: {len(strangers)} "
            f"({listed(strangers)}), expected paths such as {known[0]}; correct or remove these rows"
        )
    counts = Counter(place for place in places if place is not None)
    if twice := [known[place] for place, count in sorted(counts.items()) if count > 1]:
        problems.append(
            f"{path}: images in several rows: {len(twice)} ({listed(twice)}), expected each once; "
            "remove the others"
        )
    return problems


def _unreadable(source: ImageSource, missing: Sequence[int], known: Sequence[str]) -> list[Skipped] | None:
    """Why nobody predicted these: they cannot be decoded. None where one can; the rest is not looked at."""
    found = []
    for number in missing:
        try:
            decode(source.read(number))
        except (OSError, ImageError) as error:
            found.append(Skipped(known[number], str(error)))
        else:
            return None
    return found


def _real(path: Path, names: Sequence[str], best: npt.NDArray[np.int64], classes: Classes) -> Real:
    if len(classes) != IMAGENET:
        raise InputError(
            f"{path}: ReaL labels count ImageNet's {IMAGENET} classes, found {len(classes)} in the "
            "predictions; evaluate a model of ImageNet, or leave --real out"
        )
    labels = read_real_labels(path, names)
    right = [int(found) in allowed for found, allowed in zip(best, labels, strict=True) if allowed]
    return Real(sum(right) / len(right) if right else None, len(right))


def _write(
    output: Path, evaluation: ImageEvaluation, source: ImageSource, images: npt.NDArray[np.int64]
) -> None:
    from medattn.report.classification_page import render, thumbnail  # matplotlib and jinja2, needed last

    pictures = {}
    for mistake in evaluation.mistakes[:SHOWN]:
        try:
            pictures[mistake] = thumbnail(decode(source.read(int(images[mistake]))))
        except (OSError, ImageError):
            continue  # someone predicted it elsewhere; the page names it without a picture
    files = {
        "metrics.csv": to_csv(evaluation),
        "metrics.json": to_json(evaluation),
        "report.html": render(evaluation, evaluation.mistakes[:SHOWN], pictures),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text(output / name, text)
