"""The subcommands. What a handler needs is imported when it runs, so that `medattn --help` stays instant."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medattn.errors import InputError
from medattn_pipelines import arguments

if TYPE_CHECKING:
    from medattn.data.check import Checkup
    from medattn_pipelines.imageconfig import ImageConfig


@dataclass(frozen=True)
class Command:
    """A subcommand. run: returns the exit code. purpose, examples and notes make its help."""

    purpose: str
    examples: tuple[str, ...]
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    notes: Callable[[], str] = str


def phantom(args: Namespace) -> int:
    """Write practice cases."""
    from medattn.data.phantom import write_phantoms
    from medattn_pipelines.progress import case_progress

    with case_progress("Practice cases", args.cases) as tick:
        write_phantoms(
            args.out, cases=args.cases, size=args.size, seed=args.seed, on_case=lambda done, total: tick()
        )
    print(f"{args.cases} practice cases in {args.out}")
    return 0


def import_(args: Namespace) -> int:
    """Import cases and say what came of it."""
    from medattn.labels import LabelSet
    from medattn_pipelines.importers import import_cases
    from medattn_pipelines.progress import case_progress

    with case_progress("Importing") as tick:
        summary = import_cases(
            args.kind,
            args.source,
            args.out,
            label_set=LabelSet.load(args.labels),
            validation=args.validation,
            seed=args.seed,
            contoured=args.contoured,
            drop_unknown=args.drop_unknown,
            on_case=tick,
        )
    print(summary)
    return 0


def check(args: Namespace) -> int:
    """Print a table of findings; 1 if there is an error among them."""
    from medattn.data.cases import load_cases
    from medattn.data.check import check_folder
    from medattn.data.repair import complete_contoured
    from medattn.labels import LabelSet
    from medattn_pipelines.progress import case_progress, print_table

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


def train(args: Namespace) -> int:
    """Train; 0 also when SIGTERM ended it, which is how a scheduler asks, and 2 when Ctrl-C did."""
    from medattn_pipelines.configfile import load_any

    config = load_any(args.config, args.overrides)  # before torch is imported: a typo shows at once
    if config.task == "classification":
        return _train_images(config, args)
    from medattn_pipelines.progress import print_scores
    from medattn_pipelines.volumes import train as train_volumes

    done = train_volumes(config, resume=args.resume, overwrite=args.overwrite)
    if done.evaluation is None:
        return _stopped(done.reason, done.step)
    print_scores("Validation cases", done.evaluation.summary)
    print(f"segmentations: {done.run / 'predictions'} (.nii.gz, and .seg.nrrd for 3D Slicer)")
    print(f"model:         {done.run / 'model'}")
    print(f"report:        {done.run / 'report' / 'report.html'}")
    return 0


def _train_images(config: ImageConfig, args: Namespace) -> int:
    from medattn_pipelines.classification import train as train_images
    from medattn_pipelines.image_evaluation import print_summary, print_unreadable

    done = train_images(config, resume=args.resume, overwrite=args.overwrite)
    print_unreadable("training images that cannot be decoded and were replaced", done.skipped)
    if done.evaluation is None:
        return _stopped(done.reason, done.step)
    print_summary("Validation images", done.evaluation)
    print(f"predictions: {done.run / 'predictions' / 'predictions.csv'}")
    print(f"model:       {done.run / 'model'}")
    print(f"report:      {done.run / 'report' / 'report.html'}")
    return 0


def _stopped(reason: str, step: int) -> int:
    print(f"stopped by {reason} at step {step}; the same command with --resume continues it")
    return 0 if reason == "SIGTERM" else 2


def predict(args: Namespace) -> int:
    """Segment volumes, or classify images: what the model does."""
    from medattn.modelfolder import CLASSIFICATION, model_task

    if model_task(args.model) == CLASSIFICATION:
        from medattn_pipelines.image_prediction import predict as predict_images

        print(f"predictions: {predict_images(args.model, args.inputs, args.output, device=args.device)}")
        return 0
    from medattn_pipelines.prediction import predict as predict_volumes

    predict_volumes(args.model, args.inputs, args.output, export=args.export, device=args.device)
    print(f"segmentations: {args.output}")
    return 0


def evaluate(args: Namespace) -> int:
    """Score predictions, print the means and write the report."""
    if args.task == "classification":
        return _evaluate_images(args)
    if given := [name for name in ("real", "ground_truth") if getattr(args, name) is not None]:
        raise InputError(
            f"--{given[0].replace('_', '-')}: found with --task {args.task}, expected with --task "
            "classification alone; leave it out or give that task"
        )
    from medattn_pipelines.evaluation import evaluate as evaluate_folders
    from medattn_pipelines.progress import case_progress, print_scores

    with case_progress("Measuring") as tick:
        evaluation = evaluate_folders(
            args.prediction,
            args.reference,
            args.output,
            label_set=args.labels,
            baseline=args.baseline,
            workers=args.workers,
            on_case=tick,
        )
    print_scores(f"{args.prediction} against {args.reference}", evaluation.summary)
    print(f"report: {args.output / 'report.html'}")
    return 0


def _evaluate_images(args: Namespace) -> int:
    from medattn_pipelines.image_evaluation import evaluate as evaluate_images
    from medattn_pipelines.image_evaluation import print_summary

    if args.baseline is not None:
        raise InputError(
            "--baseline: found with --task classification, expected with --task volumes alone; leave it out"
        )
    evaluation = evaluate_images(
        args.prediction, args.reference, args.output, real=args.real, ground_truth=args.ground_truth
    )
    print_summary(f"{args.prediction} against {args.reference}", evaluation)
    print(f"report: {args.output / 'report.html'}")
    return 0


def export(args: Namespace) -> int:
    """Write a label map in another format."""
    from medattn.data.cases import read_labels
    from medattn.export.slicer import write_seg_nrrd
    from medattn.io import read_volume
    from medattn.labels import LabelSet

    volume, label_set = read_volume(args.segmentation), LabelSet.load(args.labels)
    names = read_labels(args.segmentation.parent / "labels.json")
    organs = {value: label_set.describe(name) for value, name in names.items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_seg_nrrd(args.output, volume.array, volume.geometry, organs)
    print(args.output)
    return 0


def networks(args: Namespace) -> int:
    """List networks with their families and parameter counts; nothing is allocated."""
    from medattn.networks import names
    from medattn.networks.registry import family, task_of
    from medattn_pipelines.progress import print_table

    rows = [(name, family(name), task_of(name), *_counts(name)) for name in names(args.pattern)]
    if args.json:
        keys = ("name", "family", "task", "parameters_2d", "parameters")
        # of networks for images alone, which have no count in 3D, that in 2D
        found = [dict(zip(keys, (*row[:4], row[4] or row[3]), strict=True)) for row in rows]
        print(json.dumps(found, indent=1))
    else:
        header = ("name", "family", "task", "parameters in 2D", "in 3D")
        print_table("", header, rows)
        print("parameters: of segmentation with 1 channel in and 8 out, of classification with 1000 classes")
    return 0


def _counts(name: str) -> tuple[int | None, int | None]:
    """Parameters in 2D and in 3D; None where a network is not made for so many axes."""
    from medattn.networks.registry import task_of

    if task_of(name) == "classification":
        return _parameters(name), None
    options = {"in_channels": 1, "out_channels": 8}
    return _parameters(name, spatial_dims=2, **options), _parameters(name, spatial_dims=3, **options)


def _parameters(name: str, **options: int) -> int | None:
    """How many a network has; None if it is not made with these options."""
    import torch

    from medattn.errors import InputError
    from medattn.networks import create

    try:
        with torch.device("meta"):
            network = create(name, **options)
    except InputError:
        return None
    return sum(weight.numel() for weight in network.parameters())


def convert(args: Namespace) -> int:
    """Write a model folder from published weights and say what it holds."""
    from medattn_pipelines.convert import convert as convert_weights

    flags = ("organs", "spacing_mm", "window_hu", "labels")
    options = {name: value for name in flags if (value := getattr(args, name)) is not None}
    rows = convert_weights(args.source, args.checkpoint, args.out, options, args.overrides)
    for heading, text in rows.items():
        print(f"{heading + ':':<9} {text}")
    return 0


def _train_notes() -> str:
    from medattn_pipelines.configfile import explain

    return (
        "Ctrl-C or SIGTERM saves a checkpoint and stops; --resume continues from it.\n\n"
        f"fields of a config, with their defaults:\n{explain()}"
    )


IMPORT_KINDS = """\
kinds:
  nifti    a folder per patient: image.nii.gz with label.nii.gz, or with one mask file per organ
  nnunet   nnU-Net's raw layout: dataset.json, imagesTr/, labelsTr/
  openkbp  the public OpenKBP layout: a folder per patient with ct.csv, voxel_dimensions.csv, <organ>.csv"""

CHECK_CODES = """\
exit code: 0 without errors (warnings and notes may remain), 1 with errors, 2 if the folder cannot be read"""

COMMANDS = {
    "phantom": Command(
        "Write practice cases: synthetic head-and-neck CT with contours.",
        ("medattn phantom data/hn_ct", "medattn phantom data/tiny --cases 4 --size 48 --seed 7"),
        arguments.phantom,
        phantom,
    ),
    "import": Command(
        "Bring cases from another layout into medattn's.",
        (
            "medattn import nifti ~/patients data/ours",
            "medattn import nnunet ~/nnUNet_raw/Dataset001_HN data/hn",
            "medattn import openkbp ~/open-kbp/provided-data/train-pats data/hn_ct",
        ),
        arguments.import_,
        import_,
        lambda: IMPORT_KINDS,
    ),
    "check": Command(
        "Examine a folder of cases: every finding with its cause and its repair.",
        ("medattn check data/hn_ct", "medattn check data/hn_ct --repair"),
        arguments.check,
        check,
        lambda: CHECK_CODES,
    ),
    "train": Command(
        "Train a network by a config file; writes a run folder with model and report.",
        (
            "medattn train configs/hn_ct.yaml",
            "medattn train configs/hn_ct.yaml network.name=unet_axial run.dir=runs/axial",
            "medattn train configs/hn_ct.yaml training.max_minutes=10 --overwrite",
            "medattn train configs/hn_ct.yaml --resume",
        ),
        arguments.train,
        train,
        _train_notes,
    ),
    "predict": Command(
        "Segment volumes with a trained model, on their own grids.",
        (
            "medattn predict runs/hn_ct/model scan.nii.gz --output out",
            "medattn predict runs/hn_ct/model data/hn_ct --output out --export seg.nrrd",
        ),
        arguments.predict,
        predict,
    ),
    "evaluate": Command(
        "Compare predictions with references: overlap and distances of organs, accuracy of classes, report.",
        (
            "medattn evaluate --prediction out --reference data/hn_ct --output report",
            "medattn evaluate --prediction out --reference data/hn_ct --output report --baseline other",
            "medattn evaluate --task classification --prediction out --reference images/val --output report",
        ),
        arguments.evaluate,
        evaluate,
    ),
    "export": Command(
        "Write a segmentation for other programs, with names, colours and codes.",
        ("medattn export out/case_1.nii.gz --as seg.nrrd --output case_1.seg.nrrd",),
        arguments.export,
        export,
    ),
    "networks": Command(
        "List the networks: names, families, parameter counts.",
        ("medattn networks", "medattn networks 'unet_*'", "medattn networks --json"),
        arguments.networks,
        networks,
    ),
    "convert": Command(
        "Make a model for `predict` from weights that others published.",
        (
            "medattn convert cerr-block-unet latest_net_Seg_A.pth models/block_unet",
            "medattn convert cerr-block-unet six.pth models/six placement=last --organs Parotid_L Parotid_R "
            "Glnd_Submand_L Glnd_Submand_R Bone_Mandible Brainstem",
            "medattn predict models/block_unet scan.nii.gz --output out",
            "medattn convert timm halonet26t.pth models/halonet26t network=halonet26t classes=classes.json",
            "medattn convert lambda-d-li14 lambda.pth models/lambda network=lambda_resnet50 "
            "options='{depth: 4}'",
            "medattn predict models/halonet26t photo.jpg --output out",
        ),
        arguments.convert,
        convert,
        lambda: arguments.CONVERT_SOURCES,
    ),
}
