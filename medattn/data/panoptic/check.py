"""The doctor of panoptic files: everything in which a JSON file, its PNGs and the photos disagree.

`examine` looks at one annotation and its map, so that an evaluation finds the same in the pass that it makes
anyway; `check_panoptic` goes through a whole file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from medattn.data.examine import Finding, Severity
from medattn.data.panoptic.layouts import photo_path
from medattn.errors import InputError
from medattn.io.panoptic import DAMAGED, PanopticFile, read_ids
from medattn.panoptic import VOID, Annotation, Categories, ImageRecord, measure

LISTED = 5  # ids or images that one finding names
Ids = npt.NDArray[np.int32]


def check_panoptic(
    file: PanopticFile,
    *,
    categories: Categories | None = None,
    images: str | Path | None = None,
    workers: int = 2,
    on_image: Callable[[str], None] | None = None,
) -> tuple[Finding, ...]:
    """Read every PNG once and report what is wrong, in the order of the file.

    categories: those that segments may have, by default the file's own. images: the folder of the photos,
    which then must be there in the PNGs' sizes. workers: threads. on_image gets the name of each PNG, in the
    file's order, in the calling thread. Nothing that is found raises: see `sentences`.
    """
    known = categories or file.categories
    findings = [*_file_findings(file, known), *listing_findings(file)]

    def look(annotation: Annotation) -> tuple[Finding, ...]:
        try:
            ids = read_ids(file.png(annotation))
        except InputError as error:
            return unreadable(annotation, error)
        return examine(file, annotation, ids, known, images=images)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for annotation, found in zip(file.annotations, pool.map(look, file.annotations), strict=True):
                findings += found
                if on_image is not None:
                    on_image(annotation.file_name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return tuple(findings)


def unreadable(annotation: Annotation, error: InputError) -> tuple[Finding, ...]:
    """The findings of a PNG that `read_ids` refused."""
    found = []
    for problem in error.problems:
        cause, _, repair = problem.partition("; ")
        found.append(_finding(annotation, cause, repair or "give the PNG that belongs to the JSON"))
    return tuple(found)


def examine(
    file: PanopticFile,
    annotation: Annotation,
    ids: Ids,
    categories: Categories | None,
    *,
    images: str | Path | None = None,
) -> tuple[Finding, ...]:
    """What is wrong with one image: its segments against its map [h, w], its record and its photo."""
    found = [
        *_segment_findings(file, annotation, categories),
        *_pixel_findings(file, annotation, ids),
    ]
    record = file.image.get(annotation.image_id)
    if record is not None:
        found += _size_findings(file, annotation, record, ids.shape)
    if images is not None:
        photo = None if record is None else photo_path(Path(images), record)
        found += _photo_findings(file, annotation, photo, ids.shape)
    return tuple(found)


def listing_findings(file: PanopticFile) -> Iterator[Finding]:
    """Annotations without image, images without annotation, and PNGs that several annotations share."""
    if file.images:
        for annotation in file.annotations:
            if annotation.image_id not in file.image:
                cause = (
                    f"{file.path}: image {annotation.image_id!r} has segments and is not among `images`, "
                    "expected an entry with its file name and size"
                )
                yield _finding(annotation, cause, "add it to `images` or remove the annotation")
    for image in file.images if file.annotations else ():
        if image.id not in file.annotation:
            cause = f"{file.path}: image {image.id!r} has no annotation, so nothing uses it"
            yield Finding(image.file_name, "warning", cause, "add an annotation or remove the image")
    names = Counter(annotation.file_name for annotation in file.annotations)
    for name in (name for name, times in names.items() if times > 1):
        owners = [a.image_id for a in file.annotations if a.file_name == name]
        cause = f"{file.path}: one PNG for the images {_some(owners)}, expected one each"
        yield Finding(name, "error", cause, "correct `file_name`")


def _file_findings(file: PanopticFile, categories: Categories | None) -> Iterator[Finding]:
    if not file.annotations:
        yield Finding(
            file.path.name,
            "error",
            f"{file.path}: no annotation, expected at least one",
            "give the file with segments",
        )
    if categories is None:
        cause = f"{file.path}: no `categories`, so that those of segments are not checked"
        yield Finding(file.path.name, "note", cause, "give the file of the reference to check these as well")


def _segment_findings(
    file: PanopticFile, annotation: Annotation, categories: Categories | None
) -> Iterator[Finding]:
    """What the list of segments tells without its picture."""
    where, segments = f"{file.path}: image {annotation.image_id!r}", annotation.segments
    times = Counter(segment.id for segment in segments)
    if twice := [number for number, count in times.items() if count > 1]:
        yield _finding(
            annotation,
            f"{where}: several segments with the id {_some(twice)}, expected each id once",
            "number the segments of an image 1, 2, 3, ... in JSON and PNG",
        )
    if VOID in times:
        yield _finding(
            annotation,
            f"{where}: a segment with the id {VOID}, which is that of unlabelled pixels",
            "number the segments of an image 1, 2, 3, ... in JSON and PNG",
        )
    if categories is None:
        return
    if unknown := sorted({segment.category for segment in segments} - set(categories.index)):
        yield _finding(
            annotation,
            f"{where}: unknown categories {_some(unknown)}, expected ids of the {len(categories)} in "
            "`categories`",
            "write the data set's own ids, not class indices, or add the category",
        )
    stuff = [
        s.category
        for s in segments
        if s.category in categories.index and not categories[categories.index[s.category]].thing
    ]
    if repeated := [number for number, count in Counter(stuff).items() if count > 1]:
        yield _finding(
            annotation,
            f"{where}: several segments of the stuff categories {_some(repeated)}, expected one of each",
            "merge their pixels into one segment",
            "warning",
        )


def _pixel_findings(file: PanopticFile, annotation: Annotation, ids: Ids) -> Iterator[Finding]:
    """Where segments and map disagree: ids, areas, boxes; and what is legal and worth a look."""
    where, listed = file.png(annotation), {segment.id for segment in annotation.segments} - {VOID}
    measured = measure(ids)
    present = set(measured) - {VOID}
    if strangers := sorted(present - listed):
        yield _finding(
            annotation,
            f"{where}: ids {_some(strangers)} that no segment of image {annotation.image_id!r} has, expected "
            "those of segments_info",
            "add the segments to the JSON or paint their pixels 0",
        )
    if missing := sorted(listed - present):
        yield _finding(
            annotation,
            f"{where}: no pixel of the segments {_some(missing)} of image {annotation.image_id!r}, expected "
            "some of each",
            "remove them from the JSON or correct the PNG",
        )
    if not present:
        what = "of unlabelled pixels alone" if annotation.segments else "without segments"
        yield _finding(
            annotation, f"{where}: a picture {what}", "leave it as it is where that is meant", "warning"
        )
    shown = [(segment, *measured[segment.id]) for segment in annotation.segments if segment.id in present]
    areas = [(s.id, s.area, area) for s, area, _ in shown if s.area is not None and s.area != area]
    boxes = [(s.id, list(s.box), list(box)) for s, _, box in shown if s.box is not None and s.box != box]
    for field, wrong in (("area", areas), ("bbox", boxes)):
        if wrong:
            yield _disagreement(annotation, where, field, wrong)


def _disagreement(
    annotation: Annotation, where: Path, field: str, wrong: Sequence[tuple[int, object, object]]
) -> Finding:
    examples = ", ".join(f"segment {number}: {given} for {true}" for number, given, true in wrong[:LISTED])
    return _finding(
        annotation,
        f"{where}: `{field}` of {len(wrong)} segments in the JSON is not that of the picture ({examples}"
        f"{', ...' if len(wrong) > LISTED else ''})",
        f"correct `{field}` or leave it out, or copy the PNG that belongs to the JSON",
    )


def _size_findings(
    file: PanopticFile, annotation: Annotation, record: ImageRecord, shape: tuple[int, ...]
) -> Iterator[Finding]:
    given = (record.height, record.width)
    if any(side is not None and side != found for side, found in zip(given, shape, strict=True)):
        yield _finding(
            annotation,
            f"{file.png(annotation)}: {shape[1]} x {shape[0]} pixels, expected {record.width} x "
            f"{record.height} as `images` of {file.path} says",
            "write the PNG on the image's own grid, or correct the size",
        )


def _photo_findings(
    file: PanopticFile, annotation: Annotation, photo: Path | None, shape: tuple[int, ...]
) -> Iterator[Finding]:
    if photo is None:
        cause = f"{file.path}: `images` does not say which photo image {annotation.image_id!r} is"
        yield _finding(annotation, cause, "add it there with its file name")
        return
    try:
        with Image.open(photo) as picture:
            width, height = picture.size
    except FileNotFoundError:
        cause = f"{photo}: no such file, expected the photo of image {annotation.image_id!r}"
        yield _finding(annotation, cause, "give the folder that holds it")
    except DAMAGED as error:
        yield _finding(annotation, f"{photo}: not readable as a picture ({error})", "copy it again")
    else:
        if (height, width) != shape:
            yield _finding(
                annotation,
                f"{photo}: {width} x {height} pixels, its PNG {file.png(annotation)} has "
                f"{shape[1]} x {shape[0]}",
                "use the photo and the PNG of one image",
            )


def _finding(annotation: Annotation, cause: str, repair: str, severity: Severity = "error") -> Finding:
    return Finding(annotation.file_name, severity, cause, repair)


def _some(values: Sequence[object]) -> str:
    shown = ", ".join(repr(value) for value in values[:LISTED])
    return shown if len(values) <= LISTED else f"{shown} and {len(values) - LISTED} more"


def sentences(findings: Sequence[Finding]) -> tuple[str, ...]:
    """Errors among the findings as sentences for `InputError`."""
    return tuple(f"{f.cause}; {f.repair}" for f in findings if f.severity == "error")
