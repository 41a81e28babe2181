"""Panoptic training, end to end: images with segments in; model, predictions and report out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medattn import __version__
from medattn.classifier import load_classifier
from medattn.data.panoptic.check import check_panoptic, sentences
from medattn.data.panoptic.sampling import PanopticBatch
from medattn.data.panoptic.source import PanopticImages
from medattn.errors import InputError
from medattn.io.panoptic import read_panoptic
from medattn.networks.panoptic_deeplab import load_backbone
from medattn.networks.registry import task_of
from medattn.panoptic import Categories
from medattn.panoptic_losses import PanopticWeights, panoptic_loss
from medattn.panoptic_segmenter import PanopticCard, load_panoptic, save_panoptic
from medattn.report.panoptic import PanopticEvaluation
from medattn.training.determinism import deterministic
from medattn.training.distributed import Processes, joined
from medattn.training.loop import RESERVE, Limits, Schedule, State
from medattn.training.sharding import whole
from medattn.training.synced_batch_norm import synchronise_batch_norms
from medattn_pipelines.fitting import BEST, Trained, make_learner
from medattn_pipelines.image_fitting import fit_images, make_image_optimizer, start_from
from medattn_pipelines.panoptic_evaluation import evaluate_files
from medattn_pipelines.panoptic_inputs import (
    memory_format,
    panoptic_rules,
    panoptic_view,
    read_sources,
    training_batches,
    training_images,
)
from medattn_pipelines.panoptic_prediction import PanopticSegmenter, write_predictions
from medattn_pipelines.panopticconfig import PanopticConfig
from medattn_pipelines.progress import case_progress
from medattn_pipelines.runs import choose_device, choose_precision, open_run

LossOf = Callable[[nn.Module, PanopticBatch], Tensor]
HEAD = "semantic_head"  # what depends on the classes


def train(
    config: PanopticConfig, *, resume: bool = False, overwrite: bool = False
) -> Trained[PanopticEvaluation]:
    """Train a panoptic segmenter and report on the validation images.

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
    config: PanopticConfig, processes: Processes, started: float, *, resume: bool, overwrite: bool
) -> Trained[PanopticEvaluation]:
    run = open_run(config, resume=resume, overwrite=overwrite, processes=processes)
    device, training = processes.device, config.training
    precision = choose_precision(training.precision, device)
    source, validation = read_sources(config)
    require_sound(validation, config.data.workers, processes)
    images = training_images(config, source, processes)
    card = describe_model(config, source.categories)
    network = build(config, card, device, processes)
    learner = make_learner(
        config, run, network, partial(make_image_optimizer, config), processes, resume=resume
    )
    begun = time.monotonic()
    with whole(learner.averaged):
        look = PanopticSegmenter(card, learner.averaged.module, device, precision, config.data.workers)
        # shows now, not in an hour, that images and memory suffice
        look.quality(validation, most=processes.world, processes=processes)
    reserve_seconds = RESERVE * -(-len(validation) // processes.world) * (time.monotonic() - begun)
    return fit_images(
        config,
        run,
        learner,
        training_batches(config, images, device, learner.state.step),
        loss_function(config, device, precision),
        Schedule(training.learning_rate, training.warmup_steps, training.schedule, training.floor),
        Limits(
            steps=training.steps,
            max_seconds=None if training.max_minutes is None else 60 * training.max_minutes,
            patience=training.patience,
            validate_every=training.validate_every,
            save_every=training.save_every,
        ),
        score="PQ",
        measure=lambda: look.quality(validation, processes=processes),
        finish=lambda: finish(run, card, learner.state, validation, look, processes),
        started=started,
        reserve_seconds=reserve_seconds,
        resume=resume,
        processes=processes,
    )


def require_sound(images: PanopticImages, workers: int, processes: Processes) -> None:
    """Raise InputError for what the evaluation at the end would refuse; the processes share the images."""
    file = images.as_file()
    mine = replace(file, annotations=file.annotations[processes.rank :: processes.world])
    if not mine.annotations:  # fewer images than processes
        return
    with case_progress("Checking labels", len(mine.annotations)) as on_image:
        findings = check_panoptic(
            mine,
            images=images.images,
            workers=max(1, workers),
            on_image=on_image if processes.main else None,
        )
    if problems := sentences(findings):
        raise InputError(*problems)


def describe_model(config: PanopticConfig, categories: Categories) -> PanopticCard:
    """All of a model but its weights. Raises InputError for a network that is not panoptic."""
    name, view = config.network.name, config.inference
    if task_of(name) != "panoptic":
        raise InputError(
            f"network.name: {name!r} does {task_of(name)} and no panoptic segmentation; "
            "`medattn networks` lists what each network is made for"
        )
    options = {"image_size": config.crop_size} | config.network.options
    card = PanopticCard(
        name, options, categories, panoptic_view(config), panoptic_rules(config), view.scales, view.flip
    )
    with torch.device("meta"):
        card.build()  # a wrong option shows now
    return card


def build(
    config: PanopticConfig, card: PanopticCard, device: torch.device, processes: Processes
) -> nn.Module:
    """The network on the device, with the weights that it starts from."""
    torch.manual_seed(config.seed)
    network = card.build()
    if config.network.backbone is not None:
        _, classifier = load_classifier(config.network.backbone)
        load_backbone(network, classifier.state_dict(), path=config.network.backbone)
    if config.network.weights is not None:
        _, source = load_panoptic(config.network.weights)
        start_from(network, source, config.network.weights, HEAD)
    if config.training.sync_batch_norm and processes.world > 1:
        synchronise_batch_norms(network)
    return network.to(device=device, memory_format=memory_format(config))  # type: ignore[call-overload, no-any-return]


def loss_function(config: PanopticConfig, device: torch.device, precision: torch.dtype) -> LossOf:
    """The three losses in float32, the network in `precision`."""
    settings = config.loss
    weights = PanopticWeights(settings.semantic, settings.centre, settings.offset)

    def loss_of(network: nn.Module, batch: PanopticBatch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            output = network(batch.image)
        return panoptic_loss(output, batch.targets, hardest=settings.hardest, weights=weights).total

    return loss_of


def finish(
    run: Path,
    card: PanopticCard,
    state: State,
    validation: PanopticImages,
    look: PanopticSegmenter,
    processes: Processes,
) -> PanopticEvaluation | None:
    """Write model/ from the best weights, segment the validation images with it and report.

    The processes share the images; the main one does the rest, and alone has the evaluation.
    """
    provenance = {
        "medattn": __version__,
        "steps": state.step,
        "best_step": state.best_step,
        "validation_pq": state.best,
        "seconds": round(state.seconds),
        "validation_images": len(validation),
    }
    if processes.main:
        save_panoptic(run / "model", replace(card, provenance=provenance), load_file(run / BEST))
    processes.wait()
    card, network = load_panoptic(run / "model")
    final = PanopticSegmenter(card, network, look.device, look.precision, look.workers)
    images = {number: Path(validation.name(i)) for i, number in enumerate(validation.image_ids)}
    json, problems = write_predictions(final, images, run / "predictions", processes)
    if problems:
        raise InputError(*problems)
    if not processes.main:
        return None
    return evaluate_files(read_panoptic(json), validation.as_file(), run / "report", images=validation.images)
