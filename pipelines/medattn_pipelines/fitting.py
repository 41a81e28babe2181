"""What trainings on volumes and on images share: checkpoints, the record of a run, and its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from medattn.atomic import write_text
from medattn.data.images.reading import Skipped
from medattn.errors import InputError
from medattn.modelfolder import write_weights
from medattn.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from medattn.training.distributed import ALONE, Processes
from medattn.training.loop import Batch, Limits, Schedule, State, averaged_model, fit
from medattn.training.recomputation import recompute_activations
from medattn.training.sharding import shard, whole
from medattn_pipelines.configfile import AnyConfig, dump
from medattn_pipelines.datawatch import DataWatch, watch_data
from medattn_pipelines.progress import training_progress
from medattn_pipelines.record import Record, drop_later_lines
from medattn_pipelines.runs import machine
from medattn_pipelines.trackrecord import open_tracker, plan_sets, track_results

BEST, LAST = "checkpoints/best.safetensors", "checkpoints/last"  # in the run folder

BatchT = TypeVar("BatchT", bound=Batch)
Evaluation = TypeVar("Evaluation")


@dataclass(frozen=True)
class Trained(Generic[Evaluation]):
    """What a training left behind.

    reason: why it ended: "steps", "time", "patience", "SIGTERM" or "SIGINT". evaluation: of the validation
    cases, None where a signal ended the training before it was complete, and in processes but the main one.
    skipped: training images that could not be used.
    """

    run: Path
    reason: str
    step: int
    evaluation: Evaluation | None
    skipped: Sequence[Skipped] = ()


@dataclass
class Learner:
    """What a training changes and a checkpoint holds."""

    network: nn.Module
    averaged: AveragedModel
    optimizer: torch.optim.Optimizer
    state: State = field(default_factory=State)

    def save(self, run: Path, processes: Processes = ALONE) -> None:
        """Write the checkpoint that a run resumes from; all processes call it."""
        save_checkpoint(run / LAST, self.network, self.averaged, self.optimizer, self.state, processes)

    def load(self, run: Path, processes: Processes = ALONE) -> None:
        """Go on where `save` was called, in as many processes as there are now; if never, at the start."""
        with processes.main_first():  # it may have to put the folder in order
            found = has_checkpoint(run / LAST)
        if len(set(processes.gathered(found))) > 1:
            raise InputError(
                f"{run / LAST}: only some of the processes see this checkpoint; all must see one file "
                "system: move the run there, then --resume"
            )
        if found:
            load_checkpoint(run / LAST, self.network, self.averaged, self.optimizer, self.state)

    def save_best(self, run: Path, processes: Processes) -> None:
        """Write the averaged weights, whole, as the best ones; all processes call it."""
        with whole(self.averaged):
            if processes.main:
                write_weights(run / BEST, self.averaged.module.state_dict())


def make_learner(
    config: AnyConfig,
    run: Path,
    network: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    processes: Processes,
    *,
    resume: bool,
) -> Learner:
    """The network with its average and optimizer, as the config spreads them, where the run stopped.

    Writes config.yaml.
    """
    training = config.training
    averaged = averaged_model(network, training.ema_decay)
    if training.checkpoint_activations:
        recompute_activations(network)
    if training.shard_weights and processes.world > 1:
        shard(network, averaged, processes.device)
    learner = Learner(network, averaged, make_optimizer(network))  # of the parameters that are there now
    if resume:
        learner.load(run, processes)
    if processes.main:
        write_text(run / "config.yaml", dump(config))
    return learner


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
    finish: Callable[[], Evaluation | None],
    started: float,
    reserve_seconds: float,
    resume: bool,
    model: nn.Module | None = None,
    accumulate: int = 1,
    processes: Processes = ALONE,
) -> tuple[str, Evaluation | None]:
    """Train with a record of it in the run folder; returns why it ended, and what `finish` gives.

    score: what `validate` measures; it returns that, the same in all processes, and what to log. finish:
    writes model/, predictions/ and report/ from the best weights, and gives None in processes but the main
    one; not called, and None, where a signal ended the training. model: what computes the loss, the learner's
    network if None. The others as in `fit`.
    """
    state, averaged = learner.state, learner.averaged

    watch = watch_data(config, run, resume=resume) if processes.main else None

    def score_of_all() -> float:
        if watch is not None:
            watch.check()
        processes.share_buffers(averaged.module)
        with whole(averaged):
            return record.validation(*validate())

    batches = _own_chance(batches, config.seed, state.step * accumulate, processes.rank)
    wrapped = processes.wrap(learner.network if model is None else model)
    with _recorded(config, run, state, limits, score, resume, processes, watch) as record:
        processes.wait()  # long, if the main one has much to read; steps wait for minutes only
        reason = fit(
            wrapped,
            batches,
            loss_of,
            learner.optimizer,
            schedule,
            averaged=averaged,
            state=state,
            limits=limits,
            clip=config.training.gradient_clip,
            on_step=record.step,
            validate=score_of_all,
            keep_best=lambda: learner.save_best(run, processes),
            save=lambda: learner.save(run, processes),
            started=started,
            reserve_seconds=reserve_seconds,
            accumulate=accumulate,
            processes=processes,
        )
        if reason.startswith("SIG"):
            if record.tracker is not None:
                record.tracker.close("killed")
            return reason, None
        if watch is not None:
            watch.check(thorough=True)
        evaluation = finish()
        if record.tracker is not None:
            track_results(record.tracker, config, run)
    return reason, evaluation


@contextmanager
def _recorded(
    config: AnyConfig,
    run: Path,
    state: State,
    limits: Limits,
    score: str,
    resume: bool,
    processes: Processes,
    watch: DataWatch | None,
) -> Iterator[Record]:
    """The record of a training, which only the main process keeps."""
    every = config.training.log_every
    if watch is None:
        yield Record(None, None, state, every, score)
        return
    if resume:
        drop_later_lines(run, state)
    with (
        open_tracker(
            config,
            run,
            state.step if resume else None,
            data=[*watch.data_sets, *plan_sets(run)],
            machine=machine(config, processes),
        ) as tracker,
        training_progress(limits.steps) as show,
    ):
        yield Record(tracker, show, state, every, score)


def _own_chance(batches: Iterator[BatchT], seed: int, start: int, rank: int) -> Iterator[BatchT]:
    """The batches from number `start` on; before each, what is random in a network is seeded by its number.

    So a step has the same chance whatever was drawn before it in this session, as loaders draw when a run
    resumes. And by the process: else dropout would hit the same units in all of them. A checkpoint then need
    not hold the random state of each, and only dropout depends on the number of processes.
    """
    for number, batch in enumerate(batches, start):
        torch.manual_seed(int(np.random.SeedSequence([seed, number, rank]).generate_state(1)[0]))
        yield batch
