"""`medattn check`: the tables of what is wrong with a folder of cases or with panoptic files."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from medattn.errors import InputError
from medattn_pipelines.progress import case_progress, print_table

if TYPE_CHECKING:
    from medattn.data.check import Checkup


def check(args: Namespace) -> int:
    """Print the findings of what DATA is; 1 if there is an error among them."""
    files = panoptic_files(args.data)
    return _check_panoptic(files, args) if files else _check_cases(args)


def panoptic_files(data: Path) -> dict[Path, Path | None]:
    """The JSON files that DATA means, and the folder of their photos where the layout tells it.

    A file is itself. A folder holds those with a folder of their name beside, or is the root of a data set in
    a published layout. None of a folder of cases, which has cases.json.
    """
    from medattn.data.panoptic.layouts import all_splits

    if data.suffix.lower() == ".json":
        return {data: None}
    if not data.is_dir() or (data / "cases.json").exists():
        return {}
    files = sorted(path for path in data.glob("*.json") if path.with_suffix("").is_dir())
    return dict.fromkeys(files) or {split.json: split.images for split in all_splits(data)}


def _check_cases(args: Namespace) -> int:
    from medattn.data.cases import load_cases
    from medattn.data.check import check_folder
    from medattn.data.repair import complete_contoured
    from medattn.labels import LabelSet

    if args.images is not None:
        raise InputError(
            "--images: found with a folder of cases, expected with panoptic files alone; leave it out"
        )
    label_set = LabelSet.load(args.labels)

    def examine() -> Checkup:
        with case_progress("Reading cases", len(load_cases(args.data)[0].cases)) as tick:
            return check_folder(args.data, label_set, workers=args.workers, on_case=tick)

    checkup = examine()
    if args.repair and (added := complete_contoured(args.data, checkup.fingerprints)):
        rows = [(case, ", ".join(organs)) for case, organs in added.items()]
        print_table(f"Added to contoured in {args.data}", ("case", "organs"), rows)
        checkup = examine()
    if findings := [(f.case, f.severity, f.cause, f.repair) for f in checkup.findings]:
        print_table(f"Findings in {args.data}", ("case", "severity", "cause", "repair"), findings)
    errors = sum(finding.severity == "error" for finding in checkup.findings)
    print(f"{args.data}: errors: {errors}, warnings and notes: {len(findings) - errors}")
    return 1 if errors else 0


def _check_panoptic(photos: Mapping[Path, Path | None], args: Namespace) -> int:
    from medattn.data.panoptic.check import check_panoptic
    from medattn.io.panoptic import read_panoptic

    if args.repair:
        raise InputError(
            "--repair: found with a panoptic file, expected with a folder of cases alone; leave it out"
        )
    files, problems = [], list[str]()
    for path in photos:
        try:
            files.append(read_panoptic(path))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    total = 0
    for file in files:
        with case_progress("Reading images", len(file.annotations)) as tick:
            images = args.images or photos[file.path]
            findings = check_panoptic(file, images=images, workers=args.workers, on_image=tick)
        if findings:
            rows = [(f.case, f.severity, f.cause, f.repair) for f in findings]
            print_table(f"Findings in {file.path}", ("file", "severity", "cause", "repair"), rows)
        errors = sum(finding.severity == "error" for finding in findings)
        print(f"{file.path}: errors: {errors}, warnings and notes: {len(findings) - errors}")
        total += errors
    return 1 if total else 0
