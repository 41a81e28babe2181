"""Training on images, end to end: images of classes in; model, predictions and report out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from medattn import __version__
from medattn.classifier import ImageCard, load_classifier, save_classifier
from medattn.data.images.classes import Classes
from medattn.data.images.sampling import EvaluationImages, ImageBatch, TrainingImages
from medattn.errors import InputError
from medattn.networks.registry import task_of
from medattn.report.classification import ImageEvaluation
from medattn.training.determinism import deterministic
from medattn.training.distributed import Processes, joined
from medattn.training.loop import RESERVE, Limits, Schedule, State
from medattn.training.sharding import whole
from medattn.training.synced_batch_norm import synchronise_batch_norms
from medattn_pipelines.fitting import BEST, Trained, make_learner
from medattn_pipelines.image_evaluation import evaluate_source
from medattn_pipelines.image_fitting import fit_images, make_image_optimizer, start_from
from medattn_pipelines.image_inputs import evaluation_transform, memory_format, read_images, training_batches
from medattn_pipelines.image_prediction import Classifier
from medattn_pipelines.imageconfig import ImageConfig
from medattn_pipelines.prediction_table import write_predictions
from medattn_pipelines.runs import choose_device, choose_precision, open_run

LossOf = Callable[[nn.Module, ImageBatch], Tensor]
HEAD = "head"  # what depends on the classes


def train(config: ImageConfig, *, resume: bool = False, overwrite: bool = False) -> Trained[ImageEvaluation]:
    """Train a classifier and report on the validation images.

    The run folder gets config.yaml, metrics.jsonl, checkpoints/ and, unless a signal ended the training,
    model/, predictions/ and report/. Under torchrun all processes train together and share the predictions,
    and the main one writes the rest.

    Raises InputError for unusable data, for a run folder that exists (unless resume or overwrite) and when
    training diverges.
    """
    started = time.monotonic()
    with (
        deterministic(config.training.deterministic),
        joined(choose_device(config.training.device)) as processes,
    ):
        return _train(config, processes, started, resume=resume, overwrite=overwrite)


def _train(
    config: ImageConfig, processes: Processes, started: float, *, resume: bool, overwrite: bool
) -> Trained[ImageEvaluation]:
    run = open_run(config, resume=resume, overwrite=overwrite, processes=processes)
    device = processes.device
    precision = choose_precision(config.training.precision, device)
    with processes.main_first():  # it makes the index of shards that the others find
        images, validation = read_images(config)
    images = replace(images, rank=processes.rank, world=processes.world)
    card = describe_model(config, images.source.classes)
    torch.manual_seed(config.seed)
    network = card.build()
    if config.network.weights is not None:
        _, source = load_classifier(config.network.weights)
        start_from(network, source, config.network.weights, HEAD)
    if config.training.sync_batch_norm and processes.world > 1:
        synchronise_batch_norms(network)
    network = to_device(network, device, config)
    learner = make_learner(
        config, run, network, partial(make_image_optimizer, config), processes, resume=resume
    )
    begun = time.monotonic()
    with whole(learner.averaged):
        look = Classifier(card, learner.averaged.module, device, precision, config.data.workers)
        look.top1(validation, most=1, processes=processes)  # shows now, not in an hour, that memory suffices
    batches = -(-len(validation.source) // (validation.batch_size * processes.world))
    reserve_seconds = RESERVE * batches * (time.monotonic() - begun)
    return fit_images(
        config,
        run,
        learner,
        training_batches(config, images, device, learner.state.step),
        loss_function(config, card, device, precision),
        make_schedule(config, images),
        make_limits(config, images),
        score="top-1",
        measure=lambda: look.top1(validation, processes=processes),
        finish=lambda: finish(config, run, card, learner.state, validation, look, processes),
        started=started,
        reserve_seconds=reserve_seconds,
        resume=resume,
        processes=processes,
    )


def describe_model(config: ImageConfig, classes: Classes) -> ImageCard:
    """All of a model but its weights. Raises InputError for a network that does not classify images."""
    name = config.network.name
    if task_of(name) != "classification":
        raise InputError(
            f"network.name: {name!r} segments volumes and does not classify images; "
            "`medattn networks` lists what each network is made for"
        )
    options = {"image_size": config.image_size} | config.network.options
    card = ImageCard(name, options, classes, evaluation_transform(config))
    with torch.device("meta"):
        card.build()  # a wrong option shows now
    return card


def to_device(network: nn.Module, device: torch.device, config: ImageConfig) -> nn.Module:
    """The network on the device, its channels innermost if the config says so."""
    return network.to(device=device, memory_format=memory_format(config))  # type: ignore[call-overload, no-any-return]


def make_limits(config: ImageConfig, images: TrainingImages) -> Limits:
    """When the loop stops and what it does in between; epochs in steps."""
    training, epoch = config.training, _steps_per_epoch(config, images)
    return Limits(
        steps=training.steps or max(1, round(training.epochs * epoch)),
        max_seconds=None if training.max_minutes is None else 60 * training.max_minutes,
        patience=training.patience,
        validate_every=training.validate_every or max(1, round(epoch)),
        save_every=training.save_every or max(1, round(epoch)),
    )


def make_schedule(config: ImageConfig, images: TrainingImages) -> Schedule:
    """The learning rate."""
    training = config.training
    warmup = round(training.warmup_epochs * _steps_per_epoch(config, images))
    return Schedule(training.learning_rate, warmup, training.schedule, training.floor)


def _steps_per_epoch(config: ImageConfig, images: TrainingImages) -> float:
    return images.steps_per_epoch / config.training.accumulate


def loss_function(
    config: ImageConfig, card: ImageCard, device: torch.device, precision: torch.dtype
) -> LossOf:
    """Cross entropy with soft targets, and with a teacher's answers where there is one; in float32."""
    settings = config.distillation
    teacher = None
    if settings.teacher is not None:
        teacher_card, loaded = load_classifier(settings.teacher)
        if teacher_card.classes.wnids != card.classes.wnids:
            raise InputError(
                f"{settings.teacher}: the teacher was trained on other classes than data.root has"
            )
        teacher = to_device(loaded, device, config).eval().requires_grad_(False)

    def loss_of(network: nn.Module, batch: ImageBatch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            logits = network(batch.image)
            with torch.no_grad():
                taught = None if teacher is None else teacher(batch.image).float()
        loss = F.cross_entropy(logits.float(), batch.target)
        if taught is None:
            return loss
        second = distillation_loss(logits.float(), taught, settings.kind, settings.temperature)
        return (1 - settings.weight) * loss + settings.weight * second

    return loss_of


def distillation_loss(logits: Tensor, taught: Tensor, kind: str, temperature: float) -> Tensor:
    """Against a teacher's logits: cross entropy with its best class ("hard", Touvron et al. 2021), or the
    divergence from its softened probabilities times temperature^2 ("soft", Hinton et al. 2015)."""
    if kind == "hard":
        return F.cross_entropy(logits, taught.argmax(1))
    log_p, log_q = (x.div(temperature).log_softmax(1) for x in (logits, taught))
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def finish(
    config: ImageConfig,
    run: Path,
    card: ImageCard,
    state: State,
    validation: EvaluationImages,
    look: Classifier,
    processes: Processes,
) -> ImageEvaluation | None:
    """Write model/ from the best weights, classify the validation images with it and report.

    The processes share the images; the main one does the rest, and alone has the evaluation.
    """
    provenance = {
        "medattn": __version__,
        "steps": state.step,
        "best_step": state.best_step,
        "validation_top1": state.best,
        "seconds": round(state.seconds),
        "validation_images": len(validation.source),
    }
    if processes.main:
        save_classifier(run / "model", replace(card, provenance=provenance), load_file(run / BEST))
    processes.wait()
    card, network = load_classifier(run / "model")
    final = Classifier(card, network, look.device, look.precision, config.data.workers)
    predictions, root = final.predictions(validation, processes), config.data.root
    if not processes.main:
        return None
    rows = [(os.path.relpath(case, root), best) for case, best in predictions]
    write_predictions(run / "predictions", rows, card.classes)
    return evaluate_source(run / "predictions", validation.source, root, run / "report")
