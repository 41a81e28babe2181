"""What a config says of panoptic images becomes sources, batches, and the rules that a model carries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from medattn.data.images.transforms import ColourJitter
from medattn.data.panoptic.colour import ColourPolicy
from medattn.data.panoptic.sampling import PanopticBatch, TrainingPanoptic
from medattn.data.panoptic.source import PanopticImages, panoptic_images
from medattn.data.panoptic.targets import TargetRules
from medattn.data.panoptic.transforms import PanopticTransform, PanopticView
from medattn.inference.panoptic import PanopticRules
from medattn.training.distributed import Processes
from medattn_pipelines.panopticconfig import PanopticConfig


def read_sources(config: PanopticConfig) -> tuple[PanopticImages, PanopticImages]:
    """The images to train on and to validate on; the categories are those of the former."""
    data = config.data
    train = panoptic_images(data.layout, data.root, data.train, limit=data.train_images)
    validation = panoptic_images(
        data.layout,
        data.root,
        data.validation,
        categories=train.categories,
        limit=data.validation_images,
    )
    return train, validation


def training_images(config: PanopticConfig, source: PanopticImages, processes: Processes) -> TrainingPanoptic:
    """The batches of this process."""
    return TrainingPanoptic(
        source,
        training_transform(config),
        config.training.batch_size,
        config.seed,
        rank=processes.rank,
        world=processes.world,
        unreadable_limit=config.data.corrupt_limit,
    )


def training_transform(config: PanopticConfig) -> PanopticTransform:
    """The random changes and the targets that the config asks for."""
    augment, wanted, view = config.augment, config.targets, config.inference
    jitter, policy = augment.color_jitter, augment.color_policy
    return PanopticTransform(
        size=config.crop_size,
        scale=augment.scale_range,
        step=augment.scale_step,
        longest=augment.longest_side,
        flip=augment.flip_probability,
        policy=ColourPolicy(policy) if policy is not None else None,
        jitter=ColourJitter(jitter, jitter, jitter) if jitter else None,
        mean=view.mean,
        std=view.std,
        rules=TargetRules(wanted.sigma, wanted.small_area, wanted.small_weight),
    )


def training_batches(
    config: PanopticConfig, images: TrainingPanoptic, device: torch.device, step: int
) -> Iterator[PanopticBatch]:
    """Batches on the device, from optimiser step `step` on."""
    start = step * config.training.accumulate
    for batch in images.batches(start, config.data.workers, pin_memory=device.type == "cuda"):
        moved = batch.to(device)
        yield replace(moved, image=moved.image.contiguous(memory_format=memory_format(config)))


def panoptic_view(config: PanopticConfig) -> PanopticView:
    """What images go through in validation and before the trained model."""
    view = config.inference
    return PanopticView(
        longest=view.longest_side,
        shortest=view.shortest_side,
        enlarge=view.enlarge,
        mean=view.mean,
        std=view.std,
    )


def panoptic_rules(config: PanopticConfig) -> PanopticRules:
    """How outputs become segments."""
    view = config.inference
    return PanopticRules(
        threshold=view.threshold,
        nms_kernel=view.nms_kernel,
        top_k=view.top_k,
        strict_top_k=view.strict_top_k,
        stuff_area=view.stuff_area,
    )


def memory_format(config: PanopticConfig) -> torch.memory_format:
    """How images and the network lie in memory."""
    return torch.channels_last if config.training.channels_last else torch.contiguous_format
