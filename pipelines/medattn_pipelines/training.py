"""`medattn train`: the processes that train together, whether a run goes on, and what is said at the end."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import TYPE_CHECKING

from medattn.errors import InputError

if TYPE_CHECKING:
    from medattn_pipelines.config import Config
    from medattn_pipelines.imageconfig import ImageConfig
    from medattn_pipelines.panopticconfig import PanopticConfig

TERMINATED = 128 + 15  # as a shell tells it of a process that SIGTERM ended


def train(args: Namespace) -> int:
    """Train; 0 also when SIGTERM ended it, which is how a scheduler asks, and 2 when Ctrl-C did.

    Of several processes all end with TERMINATED after a SIGTERM: a torchrun that had none itself starts its
    own again, and waits for the machine that went away.
    """
    from medattn_pipelines.configfile import load_any

    try:
        config = load_any(args.config, args.overrides)  # before torch is imported: a typo shows at once
    except InputError:
        # torchrun's variable, asked without torch, whose import takes longer than finding a typo
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(2) from None  # another process of this machine says the same
        raise
    from medattn.training.distributed import joined
    from medattn_pipelines.runs import choose_device, resumes

    with joined(choose_device(config.training.device)) as processes:  # torchrun's, of which one prints
        resume = resumes(config.run_dir, args.resume, processes)
        overwrite = args.overwrite and not resume
        if config.task == "classification":
            code = _train_classifier(config, resume, overwrite)
        elif config.task == "panoptic":
            code = _train_panoptic(config, resume, overwrite)
        else:
            code = _train_volumes(config, resume, overwrite)
        if code == TERMINATED:
            return code if processes.world > 1 else 0
        return code if processes.main else 0


def _train_volumes(config: Config, resume: bool, overwrite: bool) -> int:
    from medattn_pipelines.progress import print_scores
    from medattn_pipelines.volumes import train as train_volumes

    done = train_volumes(config, resume=resume, overwrite=overwrite)
    if done.evaluation is None:
        return _stopped(done.reason, done.step)
    print_scores("Validation cases", done.evaluation.summary)
    print(f"segmentations: {done.run / 'predictions'} (.nii.gz, and .seg.nrrd for 3D Slicer)")
    print(f"model:         {done.run / 'model'}")
    print(f"report:        {done.run / 'report' / 'report.html'}")
    return 0


def _train_classifier(config: ImageConfig, resume: bool, overwrite: bool) -> int:
    from medattn_pipelines.classification import train as train_classifier
    from medattn_pipelines.image_evaluation import print_summary, print_unreadable

    done = train_classifier(config, resume=resume, overwrite=overwrite)
    print_unreadable("training images that cannot be decoded and were replaced", done.skipped)
    if done.evaluation is None:
        return _stopped(done.reason, done.step)
    print_summary("Validation images", done.evaluation)
    print(f"predictions: {done.run / 'predictions' / 'predictions.csv'}")
    print(f"model:       {done.run / 'model'}")
    print(f"report:      {done.run / 'report' / 'report.html'}")
    return 0


def _train_panoptic(config: PanopticConfig, resume: bool, overwrite: bool) -> int:
    from medattn_pipelines.image_evaluation import print_unreadable
    from medattn_pipelines.panoptic import train as train_panoptic
    from medattn_pipelines.panoptic_evaluation import print_summary

    done = train_panoptic(config, resume=resume, overwrite=overwrite)
    print_unreadable("training images that cannot be used and were replaced", done.skipped)
    if done.evaluation is None:
        return _stopped(done.reason, done.step)
    print_summary("Validation images", done.evaluation)
    print(f"predictions: {done.run / 'predictions' / 'predictions.json'} (pictures in overlays/ beside it)")
    print(f"model:       {done.run / 'model'}")
    print(f"report:      {done.run / 'report' / 'report.html'}")
    return 0


def _stopped(reason: str, step: int) -> int:
    print(f"stopped by {reason} at step {step}; the same command with --resume continues it")
    return TERMINATED if reason == "SIGTERM" else 2


def notes() -> str:
    """What the help says below the examples."""
    from medattn_pipelines.configfile import explain

    return (
        "Ctrl-C or SIGTERM saves a checkpoint and stops; --resume continues from it.\n\n"
        "Many GPUs: torchrun --nproc-per-node 4 $(which medattn) train CONFIG ...\n"
        "The processes share the batch of the config, so that a run means the same with any number of\n"
        "them, and --resume may take another number. torchrun's own options are for many machines; with\n"
        "its --max-restarts 3 a run goes on from its last checkpoint when a process dies, by itself.\n\n"
        f"fields of a config, with their defaults:\n{explain()}"
    )
