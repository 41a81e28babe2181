"""Evaluate panoptic predictions of any tool in COCO's format against a reference in it."""

from __future__ import annotations

import importlib.metadata
import platform
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import medattn
from medattn.atomic import write_text
from medattn.data.panoptic.check import examine, listing_findings, sentences, unreadable
from medattn.data.panoptic.layouts import photo_path
from medattn.data.panoptic.source import read_image
from medattn.errors import InputError
from medattn.io.panoptic import PanopticFile, read_ids, read_panoptic
from medattn.metrics.instance_precision import ImageInstances, average_precision, instances
from medattn.metrics.panoptic_quality import ClassCounts, count
from medattn.panoptic import Annotation, Categories
from medattn.report.panoptic import PanopticEvaluation, to_csv, to_json
from medattn_pipelines.progress import case_progress, print_table

SHOWN = 24  # images of the report
LISTED = 5  # images that a sentence names
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class _Compared:
    """One image of both files. Without counts there are problems; notes are sentences about the image."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    counts: ClassCounts | None = None
    things: ImageInstances | None = None
    unscored: int = 0


def evaluate(
    prediction: Path,
    reference: Path,
    output: Path,
    *,
    images: Path | None = None,
    workers: int = 2,
    on_image: Callable[[str, int], None] | None = None,
) -> PanopticEvaluation:
    """Score a JSON file with its PNGs and write metrics.csv, metrics.json and report.html into `output`.

    Every annotated image of the reference needs a prediction; predictions of other images are named and left
    out. images: the folder of the photos, for the report's pictures. workers: threads; the result does not
    depend on them. on_image: gets the name of each image that is done and the number of all.

    Raises InputError with every problem of both files, file by file, before anything is written.
    """
    found, expected = _read_both(prediction, reference)
    return evaluate_files(found, expected, output, images=images, workers=workers, on_image=on_image)


def evaluate_files(
    found: PanopticFile,
    expected: PanopticFile,
    output: Path,
    *,
    images: Path | None = None,
    workers: int = 2,
    on_image: Callable[[str, int], None] | None = None,
) -> PanopticEvaluation:
    """As `evaluate`, of JSON files that were read already."""
    categories = expected.categories
    if categories is None:
        raise InputError(
            f"{expected.path}: no `categories`, expected those of the data set with `isthing`; give a whole "
            "reference"
        )
    problems = [*sentences(list(listing_findings(expected))), *_unmatched(found, expected)]
    problems += sentences(list(listing_findings(found)))
    compared = []
    for name, result in _compare_all(found, expected, categories, images, workers):
        compared.append(result)
        problems += result.problems
        if on_image is not None:
            on_image(name, len(expected.annotations))
    if problems:
        raise InputError(*problems)
    counts = [result.counts for result in compared if result.counts is not None]
    things = [result.things for result in compared if result.things is not None]
    evaluation = PanopticEvaluation(
        prediction=str(found.path),
        reference=str(expected.path),
        categories=categories,
        images=[(annotation.image_id, annotation.file_name) for annotation in expected.annotations],
        counts=counts,
        precision=average_precision(things, categories),
        instances=sum(len(image.predicted) for image in things),
        unscored=sum(result.unscored for result in compared),
        versions=_versions(),
        notes=[*_notes(found, expected), *(note for result in compared for note in result.notes)],
    )
    _write(output, evaluation, found, expected, images)
    return evaluation


def evaluate_command(args: Namespace) -> int:
    """`medattn evaluate --task panoptic`: evaluate with a progress line and print the means."""
    with case_progress("Measuring") as tick:
        evaluation = evaluate(
            *(args.prediction, args.reference, args.output),
            images=args.images,
            workers=args.workers,
            on_image=tick,
        )
    print_summary(f"{args.prediction} against {args.reference}", evaluation)
    print(f"report: {args.output / 'report.html'}")
    return 0


def print_summary(title: str, evaluation: PanopticEvaluation) -> None:
    """Print PQ, SQ and RQ, mean IoU and AP, and the notes."""
    rows = [
        (name, quality.pq, quality.sq, quality.rq, quality.n)
        for name, quality in (
            ("all", evaluation.all),
            ("things", evaluation.things),
            ("stuff", evaluation.stuff),
        )
    ]
    print_table(title, ("classes", "PQ", "SQ", "RQ", "N"), rows)
    precision = evaluation.precision
    others = (len(evaluation.images), evaluation.miou, precision.ap, precision.ap50, precision.ap75)
    print_table("", ("images", "mIoU", "AP", "AP50", "AP75"), [others])
    for note in evaluation.notes[:LISTED]:
        print(f"note: {note}")
    if len(evaluation.notes) > LISTED:
        print(f"note: and {len(evaluation.notes) - LISTED} more, all in metrics.json")


def _read_both(prediction: Path, reference: Path) -> tuple[PanopticFile, PanopticFile]:
    files, problems = list[PanopticFile](), list[str]()
    for path in (prediction, reference):
        try:
            file = read_panoptic(path)
        except InputError as error:
            problems += error.problems
            continue
        files.append(file)
        if not file.folder.is_dir():
            problems.append(
                f"{file.folder}: no such folder, expected the PNGs of {path}; put them into a folder of the "
                "same name beside the JSON"
            )
    if problems:
        raise InputError(*problems)
    return files[0], files[1]


def _unmatched(found: PanopticFile, expected: PanopticFile) -> Iterator[str]:
    if not expected.annotations:
        yield f"{expected.path}: no annotation, expected at least one; give the file with segments"
    missing = [a.image_id for a in expected.annotations if a.image_id not in found.annotation]
    if missing:
        yield (
            f"{found.path}: no prediction of {len(missing)} of the {len(expected.annotations)} images of "
            f"{expected.path} (ids {', '.join(map(repr, missing))}), expected one of each; predict these "
            "too, or give a reference of the images that you mean"
        )


def _compare_all(
    found: PanopticFile,
    expected: PanopticFile,
    categories: Categories,
    images: Path | None,
    workers: int,
) -> Iterator[tuple[str, _Compared]]:
    """Image by image in the reference's order; without prediction, the reference alone is examined."""

    def compare(annotation: Annotation) -> _Compared:
        return _compare(
            found, found.annotation.get(annotation.image_id), expected, annotation, categories, images
        )

    with ThreadPoolExecutor(workers) as pool:
        try:
            results = pool.map(compare, expected.annotations)
            for annotation, result in zip(expected.annotations, results, strict=True):
                yield annotation.file_name, result
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _compare(
    found: PanopticFile,
    predicted: Annotation | None,
    expected: PanopticFile,
    annotation: Annotation,
    categories: Categories,
    images: Path | None,
) -> _Compared:
    problems, notes, maps = list[str](), list[str](), list[Ids]()
    for file, side, photos in ((expected, annotation, images), (found, predicted, None)):
        if side is None:
            continue
        try:
            ids = read_ids(file.png(side))
        except InputError as error:
            problems += sentences(unreadable(side, error))
            continue
        maps.append(ids)
        findings = examine(file, side, ids, categories, images=photos)
        problems += sentences(findings)
        notes += [finding.cause for finding in findings if finding.severity != "error"]
    if predicted is None or len(maps) < 2:
        return _Compared(tuple(problems))
    true, said = maps
    if true.shape != said.shape:
        problems.append(
            f"{found.png(predicted)}: {said.shape[1]} x {said.shape[0]} pixels, expected {true.shape[1]} x "
            f"{true.shape[0]} as {expected.png(annotation)} has; predict on the image's own grid"
        )
    if problems:
        return _Compared(tuple(problems))
    things = [s for s in predicted.segments if categories[categories.index[s.category]].thing]
    return _Compared(
        notes=tuple(notes),
        counts=count(said, predicted.segments, true, annotation.segments, categories),
        things=ImageInstances(
            (true.shape[0], true.shape[1]),
            instances(said, predicted.segments, categories),
            instances(true, annotation.segments, categories),
        ),
        unscored=sum(segment.score is None for segment in things),
    )


def _notes(found: PanopticFile, expected: PanopticFile) -> Iterator[str]:
    """What is no error and changes how the numbers are to be read."""
    if others := [a.image_id for a in found.annotations if a.image_id not in expected.annotation]:
        yield (
            f"{found.path}: predictions of {len(others)} images that {expected.path} does not annotate count "
            f"nowhere ({_some(others)})"
        )
    if idle := [image.id for image in expected.images if image.id not in expected.annotation]:
        yield f"{expected.path}: {len(idle)} images have no annotation and count nowhere ({_some(idle)})"
    if found.categories is not None and expected.categories is not None:
        names = {category.id: category.name for category in expected.categories}
        for category in found.categories:
            if names.get(category.id, category.name) != category.name:
                yield (
                    f"{found.path}: category {category.id} is {category.name!r}, in {expected.path} it is "
                    f"{names[category.id]!r}; ids count, names do not"
                )


def _some(ids: Sequence[object]) -> str:
    return ", ".join(map(repr, ids[:LISTED])) + (", ..." if len(ids) > LISTED else "")


def _versions() -> dict[str, str]:
    return {
        "medattn": medattn.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "faster-coco-eval": importlib.metadata.version("faster-coco-eval"),
    }


def _write(
    output: Path,
    evaluation: PanopticEvaluation,
    found: PanopticFile,
    expected: PanopticFile,
    images: Path | None,
) -> None:
    from medattn.report.panoptic_page import pictures, render  # matplotlib and jinja2, needed last

    shown = []
    for place in evaluation.worst[:SHOWN]:
        annotation = expected.annotations[place]
        predicted = found.annotation[annotation.image_id]
        photo = None
        if images is not None:
            photo = read_image(photo_path(images, expected.image[annotation.image_id]))
        true, said = (
            (read_ids(file.png(side)), side.segments)
            for file, side in ((expected, annotation), (found, predicted))
        )
        shown.append(pictures(evaluation.per_image[place], photo, true, said, evaluation.categories))
    files = {
        "metrics.csv": to_csv(evaluation),
        "metrics.json": to_json(evaluation),
        "report.html": render(evaluation, shown),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text(output / name, text)
