"""The subcommands. What a handler needs is imported when it runs, so that `medattn --help` stays instant."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

from medattn.errors import InputError
from medattn_pipelines import arguments, reproduction, training


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
    from medattn_pipelines import checking

    return checking.check(args)


def predict(args: Namespace) -> int:
    """Segment volumes, classify images or segment them: what the model does."""
    from medattn.training.distributed import joined
    from medattn_pipelines.runs import choose_device

    with joined(choose_device(args.device)):  # torchrun's processes, of which one prints
        return _predict_by_task(args)


def _predict_by_task(args: Namespace) -> int:
    from medattn.modelfolder import CLASSIFICATION, PANOPTIC, model_task

    task = model_task(args.model)
    if task == CLASSIFICATION:
        from medattn_pipelines.image_prediction import predict as predict_images

        print(f"predictions: {predict_images(args.model, args.inputs, args.output, device=args.device)}")
        return 0
    if task == PANOPTIC:
        from medattn_pipelines.panoptic_prediction import predict as predict_panoptic

        print(f"predictions: {predict_panoptic(args.model, args.inputs, args.output, device=args.device)}")
        return 0
    from medattn_pipelines.prediction import predict as predict_volumes

    predict_volumes(args.model, args.inputs, args.output, export=args.export, device=args.device)
    print(f"segmentations: {args.output}")
    return 0


def evaluate(args: Namespace) -> int:
    """Score predictions, print the means and write the report."""
    for name, task in arguments.TASK_OPTIONS.items():
        if getattr(args, name) is not None and args.task != task:
            raise InputError(
                f"--{name.replace('_', '-')}: found with --task {args.task}, expected with --task {task} "
                "alone; leave it out or give that task"
            )
    if args.task == "classification":
        return _evaluate_images(args)
    if args.task == "panoptic":
        from medattn_pipelines.panoptic_evaluation import evaluate_command

        return evaluate_command(args)
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
    """List networks with their families and parameter counts."""
    from medattn_pipelines import listing

    return listing.networks(args)


def track(args: Namespace) -> int:
    """Bring MLflow's copies of runs up to what their folders hold."""
    from medattn_pipelines import tracksync

    return tracksync.track(args)


def convert(args: Namespace) -> int:
    """Write a model folder from published weights and say what it holds."""
    from medattn_pipelines.convert import convert as convert_weights

    flags = ("organs", "spacing_mm", "window_hu", "labels")
    options = {name: value for name in flags if (value := getattr(args, name)) is not None}
    rows = convert_weights(args.source, args.checkpoint, args.out, options, args.overrides)
    for heading, text in rows.items():
        print(f"{heading + ':':<9} {text}")
    return 0


def tune(args: Namespace) -> int:
    """Search for the best config."""
    from medattn_pipelines.tuning.command import tune as tune_config

    return tune_config(args)


def _tune_notes() -> str:
    from medattn_pipelines.tuning.command import notes

    return notes()


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
        "Examine a folder of cases or panoptic files: every finding with its cause and its repair.",
        (
            "medattn check data/hn_ct",
            "medattn check data/hn_ct --repair",
            "medattn check coco/annotations/panoptic_val2017.json --images coco/val2017",
        ),
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
        training.train,
        training.notes,
    ),
    "predict": Command(
        "Segment volumes with a trained model, on their own grids.",
        (
            "medattn predict runs/hn_ct/model scan.nii.gz --output out",
            "medattn predict runs/hn_ct/model data/hn_ct --output out --export seg.nrrd",
        ),
        arguments.predict,
        predict,
        lambda: arguments.PREDICT_NOTES,
    ),
    "evaluate": Command(
        "Compare predictions with references: overlap and distances of organs, accuracy of classes, panoptic "
        "quality, report.",
        (
            "medattn evaluate --prediction out --reference data/hn_ct --output report",
            "medattn evaluate --prediction out --reference data/hn_ct --output report --baseline other",
            "medattn evaluate --task classification --prediction out --reference images/val --output report",
            "medattn evaluate --task panoptic --prediction out/panoptic.json --reference "
            "coco/annotations/panoptic_val2017.json --images coco/val2017 --output report",
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
    "track": Command(
        "Bring MLflow's copies of runs up to date, and how to look at them.",
        arguments.TRACK_EXAMPLES,
        arguments.track,
        track,
        lambda: arguments.TRACK_NOTES,
    ),
    "tune": Command(
        "Search for the best config: a study of trainings, by any number of workers.",
        arguments.TUNE_EXAMPLES,
        arguments.tune,
        tune,
        _tune_notes,
    ),
    "reproduce": Command(*reproduction.COMMAND),
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
