"""The table of what a classifier said of images: predictions.csv, with classes.json beside it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medattn.atomic import atomic_path, write_text
from medattn.data.images.classes import LISTED, Classes
from medattn.errors import InputError

BEST = 5  # classes that a row names
TABLE, CLASSES = "predictions.csv", "classes.json"
TOLERANCE = 1e-6  # what rounding may add to a probability

Prediction = tuple[str, list[tuple[str, float]]]  # image; classes with probabilities, best first


@dataclass(frozen=True, eq=False)
class Table:
    """What `read_predictions` found. names: [N]; best: [N, K] class indices; probability: [N, K]."""

    names: Sequence[str]
    best: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]


def write_predictions(folder: Path, rows: Iterable[Prediction], classes: Classes) -> Path:
    """Write `predictions.csv` and the classes that it speaks of; returns the table's path."""
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(zip(classes.wnids, classes.names, strict=True))
    write_text(folder / CLASSES, json.dumps(names, indent=1) + "\n")
    with (
        atomic_path(folder / TABLE) as temporary,
        # a file's name need not be UTF-8; its bytes come back as they were
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns(len(classes)))
        for name, best in rows:
            writer.writerow([name, *(value for pair in best for value in pair)])
    return folder / TABLE


def columns(classes: int) -> list[str]:
    """The table's head where there are so many classes."""
    return [
        "image",
        *(
            f"{kind}_{place}"
            for place in range(1, min(BEST, classes) + 1)
            for kind in ("class", "probability")
        ),
    ]


def table_path(prediction: Path) -> Path:
    """The table in a folder of predictions, or the table itself. Raises InputError where neither is."""
    if not prediction.exists():
        raise InputError(
            f"{prediction}: no such folder, expected one with {TABLE} and {CLASSES}, as `medattn predict` "
            "writes it; correct the path"
        )
    return prediction / TABLE if prediction.is_dir() else prediction


def read_predictions(path: Path, classes: Classes) -> Table:
    """Read a table. Raises InputError with one sentence per kind of problem, each with the first lines."""
    expected = columns(len(classes))
    findings = _Findings(path)
    names, best, probability = [], [], []
    for line, values in _rows(path, expected):
        if not all(values):
            findings.add("without one value in each column", "write as many as the head has", line)
            continue
        try:
            chances = [float(value) for value in values[2::2]]
        except ValueError:
            findings.add("with a probability that is no number", "write numbers such as 0.25", line)
            continue
        _examine(findings, line, values[1::2], chances, classes)
        names.append(values[0])
        best.append([classes.index.get(wnid, 0) for wnid in values[1::2]])
        probability.append(chances)
    if findings.lines:
        raise InputError(*findings.sentences())
    if not names:
        raise InputError(
            f"{path}: no image in it, expected one row per image; predict the reference's images"
        )
    return Table(names, np.array(best, np.int64), np.array(probability, np.float64))


@dataclass
class _Findings:
    """Lines of a table by what is wrong with them."""

    path: Path
    lines: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, problem: str, remedy: str, line: int, found: str = "") -> None:
        self.lines.setdefault((problem, remedy), []).append(f"line {line}{found and ': '}{found}")

    def sentences(self) -> list[str]:
        return [
            f"{self.path}: {len(lines)} {'row' if len(lines) == 1 else 'rows'} {problem} "
            f"({'; '.join(lines[:LISTED])}{'; ...' if len(lines) > LISTED else ''}); {remedy}"
            for (problem, remedy), lines in self.lines.items()
        ]


def _examine(
    findings: _Findings, line: int, wnids: Sequence[str], chances: Sequence[float], classes: Classes
) -> None:
    """Add what is wrong with a row whose values can be read."""
    if unknown := [wnid for wnid in wnids if wnid not in classes.index]:
        findings.add(
            f"with classes that {CLASSES} beside it does not have", "use its wnids", line, ", ".join(unknown)
        )
    if len(set(wnids)) < len(wnids):
        findings.add("naming a class twice", "name each class once", line, ", ".join(wnids))
    shown = ", ".join(f"{p:g}" for p in chances)
    if not all(-TOLERANCE <= p <= 1 + TOLERANCE for p in chances):
        findings.add("with probabilities outside 0 to 1", "apply a softmax", line, shown)
    elif sum(chances) > 1 + 1e-3:  # half precision adds up to little more
        findings.add("whose probabilities sum to more than 1", "apply a softmax", line, shown)
    if any(after > before + TOLERANCE for before, after in pairwise(chances)):
        findings.add("whose probabilities do not fall", "put the most likely class first", line, shown)


def _rows(path: Path, expected: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number and values of each row, "" for those missing, [""] where there are too many.

    Raises InputError for what is no such table.
    """
    try:
        # -sig: spreadsheets put a mark before the first column
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, restval="")
            found = reader.fieldnames or []
            if missing := [column for column in expected if column not in found]:
                raise InputError(
                    f"{path}: no column {', '.join(missing)}, found {', '.join(found) or 'an empty file'}; "
                    f"expected {', '.join(expected)}"
                )
            for row in reader:
                yield reader.line_num, [""] if None in row else [row[column] for column in expected]
    except (OSError, csv.Error) as error:
        raise InputError(
            f"{path}: cannot be read ({error}), expected a table as `medattn predict` writes it; "
            f"give that file or its folder"
        ) from error
