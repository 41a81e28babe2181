"""What trainings on volumes and on images share: checkpoints, the record of a run, and its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from medattn.modelfolder import write_weights
from medattn.training.checkpoint import load_checkpoint, save_checkpoint
from medattn.training.loop import Batch, Limits, Schedule, State, fit
from medattn.training.tracking import Tracker
from medattn_pipelines.configfile import AnyConfig, flatten
from medattn_pipelines.progress import training_progress
from medattn_pipelines.record import Record

BEST, LAST = "checkpoints/best.safetensors", "checkpoints/last"  # in the run folder

BatchT = TypeVar("BatchT", bound=Batch)
Evaluation = TypeVar("Evaluation")


@dataclass
class Learner:
    """What a training changes and a checkpoint holds."""

    network: nn.Module
    averaged: AveragedModel
    optimizer: torch.optim.Optimizer
    state: State = field(default_factory=State)

    def save(self, run: Path) -> None:
        """Write the checkpoint that a run resumes from."""
        save_checkpoint(run / LAST, self.network, self.averaged, self.optimizer, self.state)

    def load(self, run: Path) -> None:
        """Go on where `save` was called."""
        load_checkpoint(run / LAST, self.network, self.averaged, self.optimizer, self.state)


def fit_run(
    config: AnyConfig,
    run: Path,
    learner: Learner,
    batches: Iterator[BatchT],
    loss_of: Callable[[nn.Module, BatchT], Tensor],
    schedule: Schedule,
    limits: Limits,
    *,
    score: str,
    validate: Callable[[], tuple[float, Mapping[str, float]]],
    finish: Callable[[], Evaluation],
    started: float,
    reserve_seconds: float,
    resume: bool,
    model: nn.Module | None = None,
    accumulate: int = 1,
) -> tuple[str, Evaluation | None]:
    """Train with a record of it in the run folder; returns why it ended, and what `finish` gives.

    score: what `validate` measures; it returns that and what to log. finish: writes model/ and report/ from
    the best weights; not called, and None, where a signal ended the training. model: what computes the loss,
    the learner's network if None. The others as in `fit`.
    """
    state, averaged = learner.state, learner.averaged
    with (
        Tracker(
            run,
            name=run.name,
            parameters=flatten(config),
            mirror=config.run.tracking,
            resume_step=state.step if resume else None,
        ) as tracker,
        training_progress(limits.steps) as show,
    ):
        record = Record(tracker, show, state, config.training.log_every, score)
        reason = fit(
            learner.network if model is None else model,
            batches,
            loss_of,
            learner.optimizer,
            schedule,
            averaged=averaged,
            state=state,
            limits=limits,
            clip=config.training.gradient_clip,
            on_step=record.step,
            validate=lambda: record.validation(*validate()),
            keep_best=lambda: write_weights(run / BEST, averaged.module.state_dict()),
            save=lambda: learner.save(run),
            started=started,
            reserve_seconds=reserve_seconds,
            accumulate=accumulate,
        )
        if reason.startswith("SIG"):
            tracker.close("killed")
            return reason, None
        evaluation = finish()
        tracker.artifact(run / "report")
        tracker.artifact(run / "model")
    return reason, evaluation
