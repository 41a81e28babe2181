"""What trainings on images share, whether a class or segments come out: start, skipped images, end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from medattn.data.images.reading import Skipped
from medattn.errors import InputError
from medattn.training.distributed import Processes
from medattn.training.loop import Batch, Limits, Schedule
from medattn.training.optimizers import make_optimizer
from medattn_pipelines.fitting import Evaluation, Learner, Trained, fit_run
from medattn_pipelines.imageconfig import ImageConfig
from medattn_pipelines.panopticconfig import PanopticConfig

AnyImageConfig = ImageConfig | PanopticConfig


class ReadBatch(Batch, Protocol):
    """A batch that knows which images could not be used while it was read."""

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Those images and why."""


BatchT = TypeVar("BatchT", bound=ReadBatch)


def start_from(network: nn.Module, source: nn.Module, folder: Path, head: str) -> None:
    """Load the weights of another model, those of its head aside where the classes are others.

    source: the model of `folder`. head: how the names of what depends on the classes begin. Raises InputError
    where anything else does not fit.
    """
    weights, expected = source.state_dict(), network.state_dict()
    apart = [name for name in expected if name not in weights or weights[name].shape != expected[name].shape]
    if wrong := [name for name in apart if not name.startswith(head)]:
        raise InputError(
            f"{folder}: {len(wrong)} weights do not fit network.name ({', '.join(wrong[:5])}); "
            "give a model of the same network and options"
        )
    network.load_state_dict({n: w for n, w in weights.items() if n not in apart}, strict=False)


def make_image_optimizer(config: AnyImageConfig, network: nn.Module) -> torch.optim.Optimizer:
    """The one that the config names; which parameters decay is `parameter_groups`' choice."""
    training = config.training
    rate, decay = training.learning_rate, training.weight_decay
    return make_optimizer(training.optimizer, network, rate, decay, training.momentum)


def fit_images(
    config: AnyImageConfig,
    run: Path,
    learner: Learner,
    batches: Iterable[BatchT],
    loss_of: Callable[[nn.Module, BatchT], Tensor],
    schedule: Schedule,
    limits: Limits,
    *,
    score: str,
    measure: Callable[[], tuple[float, Mapping[str, float]]],
    finish: Callable[[], Evaluation | None],
    started: float,
    reserve_seconds: float,
    resume: bool,
    processes: Processes,
) -> Trained[Evaluation]:
    """`fit_run` that also keeps the images which could not be used, those of all processes.

    measure: the validation of `fit_run`. The others as there.
    """
    skipped: dict[str, Skipped] = {}

    def validate() -> tuple[float, Mapping[str, float]]:
        for found in processes.gathered(skipped):
            skipped.update(found)
        return measure()

    training = config.training
    reason, evaluation = fit_run(
        config,
        run,
        learner,
        _noted(batches, skipped),
        loss_of,
        schedule,
        limits,
        score=score,
        validate=validate,
        finish=finish,
        started=started,
        reserve_seconds=reserve_seconds,
        resume=resume,
        model=torch.compile(learner.network) if training.compile else None,  # type: ignore[arg-type]
        accumulate=training.accumulate,
        processes=processes,
    )
    return Trained(run, reason, learner.state.step, evaluation, list(skipped.values()))


def _noted(batches: Iterable[BatchT], skipped: dict[str, Skipped]) -> Iterator[BatchT]:
    """The batches; what could not be used for them is added to `skipped`."""
    for batch in batches:
        skipped.update((image.name, image) for image in batch.skipped)
        yield batch
