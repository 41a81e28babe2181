"""Evaluate a folder of predicted segmentations against a folder of references."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy

import medattn
from medattn.atomic import write_text
from medattn.errors import InputError
from medattn.io import read_geometry, read_volume
from medattn.labels import LabelSet
from medattn.metrics.scores import METRICS, Score, score_case, summarise
from medattn.metrics.statistics import compare
from medattn.report.tables import Comparison, Evaluation, SideFinding, to_csv, to_json, worst_scores
from medattn.sides import side_errors
from medattn_pipelines.segmentations import Segmentations, read_label_map, read_segmentations

if TYPE_CHECKING:
    from medattn.report.figures import Overlay

OVERLAYS = 12


@dataclass(frozen=True)
class CaseResult:
    """What a worker sends back."""

    scores: list[Score]
    side_findings: list[SideFinding]


def evaluate(
    prediction: Path,
    reference: Path,
    output: Path,
    *,
    label_set: str = "hn_oar",
    baseline: Path | None = None,
    workers: int = 2,
    on_case: Callable[[str], object] | None = None,
) -> Evaluation:
    """Score every predicted case and write metrics.csv, metrics.json and report.html into `output`.

    prediction, baseline: `<case>.nii.gz` with labels.json. reference: case folders with label.nii.gz and
    labels.json (cases.json says who contoured what; without it every organ counts as contoured), or flat
    files as in a prediction. Cases match by name, organs through the label set. Reference cases that nobody
    predicted are listed, not scored. on_case(case) is called after each.

    Raises InputError with every problem: missing or unreadable files, predictions without a reference, grids
    that differ, voxel values without a name, no organ in common.
    """
    labels = LabelSet.load(label_set)
    truth, predicted = read_segmentations(reference, labels), read_segmentations(prediction, labels)
    before = None if baseline is None else read_segmentations(baseline, labels)
    check(predicted, truth)
    if before is not None:
        before = before.only(predicted.files)
        check(before, truth)
    results = score_all(predicted, truth, workers, on_case)
    earlier = [] if before is None else score_all(before, truth, workers, on_case)
    evaluation = _evaluation(predicted, truth, labels, results, before, earlier)
    _write(output, evaluation, predicted, truth)
    return evaluation


def check(predicted: Segmentations, truth: Segmentations) -> None:
    """Raises InputError with every case that cannot be scored, from names and headers alone."""
    if not predicted.files:
        raise InputError(f"{predicted.root}: holds none of the cases to compare")
    problems = [
        f"{path}: no reference case {case!r} in {truth.root}; evaluate it apart or remove it"
        for case, path in predicted.files.items()
        if case not in truth.files
    ]
    if not predicted.names & truth.names:
        problems.append(
            f"{predicted.root} and {truth.root} have no organ in common: {sorted(predicted.names)} and "
            f"{sorted(truth.names)}; add aliases to a label-set YAML and pass it with --labels"
        )
    for case in predicted.files.keys() & truth.files.keys():
        try:
            theirs = read_geometry(predicted.files[case])
            if (image := truth.images.get(case)) is not None and (
                difference := read_geometry(image).difference(read_geometry(truth.files[case]))
            ):
                problems.append(
                    f"{truth.files[case]}: its grid is not that of {image}: {difference}; "
                    f"run `medattn check {truth.root}`"
                )
            if difference := theirs.difference(read_geometry(truth.files[case])):
                problems.append(
                    f"{predicted.files[case]}: its grid is not that of {truth.files[case]}: {difference}; "
                    "predict on the reference's image or resample the prediction to it"
                )
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*sorted(problems))


def score_all(
    predicted: Segmentations,
    truth: Segmentations,
    workers: int,
    on_case: Callable[[str], object] | None = None,
) -> list[CaseResult]:
    """Score the predicted cases side by side; a worker holds the label maps of one case at a time."""
    jobs = [(case, predicted, truth) for case in sorted(predicted.files)]
    results, problems = dict[str, CaseResult](), list[str]()
    with _pool(min(workers, len(jobs))) as pool:
        running = {pool.submit(score_files, *job): job[0] for job in jobs}
        for done in as_completed(running):
            try:
                results[running[done]] = done.result()
            except InputError as error:
                problems += error.problems
            if on_case is not None:
                on_case(running[done])
    if problems:
        raise InputError(*sorted(problems))
    return [results[case] for case in sorted(results)]


def score_files(case: str, predicted: Segmentations, truth: Segmentations) -> CaseResult:
    """Read both label maps of a case, score every common organ and check sides."""
    volumes = {
        source: read_label_map(segmentations.files[case], segmentations.organs)
        for source, segmentations in (("prediction", predicted), ("reference", truth))
    }
    scores = score_case(
        case,
        volumes["prediction"].array,
        volumes["reference"].array,
        volumes["reference"].geometry.spacing_mm(),
        prediction_organs=predicted.organs,
        reference_organs=truth.organs,
        contoured=None if truth.contoured is None else truth.contoured[case],
    )
    findings = [
        SideFinding(case, source, sentence)
        for source, organs in (("prediction", predicted.organs), ("reference", truth.organs))
        for sentence in side_errors(volumes[source].array, volumes[source].geometry, organs)
    ]
    return CaseResult(scores, findings)


def _evaluation(
    predicted: Segmentations,
    truth: Segmentations,
    labels: LabelSet,
    results: list[CaseResult],
    before: Segmentations | None,
    earlier: list[CaseResult],
) -> Evaluation:
    scores = [score for result in results for score in result.scores]
    comparison = None
    if before is not None:
        baseline = [score for result in earlier for score in result.scores]
        metrics = {metric: compare(scores, baseline, metric) for metric in METRICS}
        comparison = Comparison(str(before.root), metrics)
    left_out: dict[str, list[str]] = {}
    for case in sorted(truth.files.keys() - predicted.files.keys()):
        left_out.setdefault(truth.splits[case], []).append(case)
    return Evaluation(
        prediction=str(predicted.root),
        reference=str(truth.root),
        label_set=labels.name,
        scores=scores,
        summary=summarise(scores),
        organs={organ.name: organ for organ in truth.organs.values() if organ.name in predicted.names},
        side_findings=[finding for result in results for finding in result.side_findings],
        without_prediction=left_out,
        only_reference=sorted(truth.names - predicted.names),
        only_prediction=sorted(predicted.names - truth.names),
        versions={
            "medattn": medattn.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        comparison=comparison,
        notes=[] if truth.contoured else ["no cases.json: every organ counts as contoured in every case"],
    )


def _write(output: Path, evaluation: Evaluation, predicted: Segmentations, truth: Segmentations) -> None:
    from medattn.report.page import render  # matplotlib and jinja2, which only this last step needs

    files = {
        "metrics.csv": to_csv(evaluation),
        "metrics.json": to_json(evaluation),
        "report.html": render(evaluation, _overlays(evaluation, predicted, truth)),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text(output / name, text)


def _overlays(evaluation: Evaluation, predicted: Segmentations, truth: Segmentations) -> list[Overlay]:
    """The worst case of each organ, worst organs first, one pair of label maps in memory at a time."""
    from medattn.report.figures import overlay

    worst = [score for score in worst_scores(evaluation) if score.dice is not None and score.dice < 1]
    overlays = []
    for score in worst[:OVERLAYS]:
        drawn = read_label_map(truth.files[score.case], truth.organs)
        found = read_label_map(predicted.files[score.case], predicted.organs)
        image = truth.images.get(score.case)
        overlays.append(
            overlay(
                score,
                found.array == predicted.value(score.organ),
                drawn.array == truth.value(score.organ),
                drawn.geometry,
                others=drawn.array > 0,
                hu=None if image is None else read_volume(image).array,
            )
        )
    return overlays


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    """Fresh processes, or a thread for a single worker; on an error the waiting cases are dropped."""
    pool = (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        if workers > 1
        else ThreadPoolExecutor(1)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
