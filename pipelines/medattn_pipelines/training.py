"""`medattn train`: the processes that train together, whether a run goes on, and what is said at the end."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from medattn.errors import InputError

if TYPE_CHECKING:
    from medattn_pipelines.configfile import AnyConfig
    from medattn_pipelines.fitting import Trained

WRITTEN = {
    "volumes": ".nii.gz, and .seg.nrrd for 3D Slicer",
    "classification": "predictions.csv",
    "panoptic": "predictions.json, and pictures in overlays/",
}
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
        code = _tell(config, train_config(config, resume=resume, overwrite=overwrite))
        if code == TERMINATED:
            return code if processes.world > 1 else 0
        return code if processes.main else 0


def train_config(config: AnyConfig, *, resume: bool = False, overwrite: bool = False) -> Trained[Any]:
    """Train by a config of any task."""
    # one of them alone, as each takes seconds
    if config.task == "classification":
        from medattn_pipelines import classification

        return classification.train(config, resume=resume, overwrite=overwrite)
    if config.task == "panoptic":
        from medattn_pipelines import panoptic

        return panoptic.train(config, resume=resume, overwrite=overwrite)
    from medattn_pipelines import volumes

    return volumes.train(config, resume=resume, overwrite=overwrite)


def _tell(config: AnyConfig, done: Trained[Any]) -> int:
    """Print what a training left behind; returns the exit code."""
    from medattn_pipelines import image_evaluation, panoptic_evaluation
    from medattn_pipelines.progress import print_scores

    image_evaluation.print_unreadable("training images that cannot be used and were replaced", done.skipped)
    if done.evaluation is None:
        return _stopped(done.reason, done.step)
    if config.task == "classification":
        image_evaluation.print_summary("Validation images", done.evaluation)
    elif config.task == "panoptic":
        panoptic_evaluation.print_summary("Validation images", done.evaluation)
    else:
        print_scores("Validation cases", done.evaluation.summary)
    print(f"predictions: {done.run / 'predictions'} ({WRITTEN[config.task]})")
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
