"""What a config says of images becomes batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from medattn.data.images.classes import Classes, read_classes
from medattn.data.images.erasing import RandomErasing
from medattn.data.images.folder import image_folder, validation_images
from medattn.data.images.mixing import Mixing
from medattn.data.images.randaugment import RandAugment
from medattn.data.images.reading import ImageSource
from medattn.data.images.sampling import EvaluationImages, ImageBatch, TrainingImages
from medattn.data.images.shards import Shards
from medattn.data.images.transforms import ColourJitter, EvaluationTransform, TrainingTransform
from medattn.errors import InputError
from medattn_pipelines.imageconfig import ImageConfig


def read_images(config: ImageConfig) -> tuple[TrainingImages, EvaluationImages]:
    """Where training and validation images come from, and how they are read."""
    data, view = config.data, evaluation_transform(config)
    train_source = _source(data.root / data.train, None, config)
    classes = train_source.classes
    labels = data.ground_truth
    validation: ImageSource = (
        _source(data.root / data.validation, classes, config)
        if labels is None
        else validation_images(data.root / data.validation, classes, labels=labels)
    )
    training = TrainingImages(
        train_source,
        training_transform(config),
        config.training.batch_size,
        config.seed,
        repeats=config.augment.repeats,
        unreadable_limit=data.corrupt_limit,
    )
    return training, EvaluationImages(
        validation, view, config.inference.batch_size, unreadable_limit=data.corrupt_limit
    )


def _source(path: Path, classes: Classes | None, config: ImageConfig) -> ImageSource:
    """classes: those of the training images; None for the training images themselves."""
    listed = config.data.classes
    named = read_classes(listed) if classes is None and listed is not None else None
    if path.suffix == ".tar":
        if (classes := classes or named) is None:
            raise InputError(f"{path}: shards hold class numbers only; give the class list as data.classes")
        return Shards.open(str(path), classes, cache=config.run_dir.parent / "shards")
    source = image_folder(path, classes)
    if named is None:
        return source
    names = dict(zip(named.wnids, named.names, strict=True))
    return replace(source, classes=Classes.of(source.classes.wnids, names))


def training_transform(config: ImageConfig) -> TrainingTransform:
    """The random changes that the config asks for."""
    augment, view = config.augment, config.inference
    magnitude, jitter = augment.randaugment_magnitude, augment.color_jitter
    return TrainingTransform(
        size=config.image_size,
        scale=augment.scale_range,
        ratio=augment.ratio_range,
        interpolation=augment.interpolation,
        flip=augment.flip_probability,
        randaugment=None
        if magnitude is None
        else RandAugment(magnitude, augment.randaugment_std, augment.randaugment_operations),
        jitter=ColourJitter(jitter, jitter, jitter) if jitter else None,
        erasing=RandomErasing(augment.erase_probability) if augment.erase_probability else None,
        mean=view.mean,
        std=view.std,
    )


def evaluation_transform(config: ImageConfig) -> EvaluationTransform:
    """What validation images and those of the trained model go through."""
    view = config.inference
    return EvaluationTransform(
        view.image_size,
        view.crop_ratio,
        interpolation=view.interpolation,
        mean=view.mean,
        std=view.std,
    )


def training_batches(
    config: ImageConfig, images: TrainingImages, device: torch.device, step: int
) -> Iterator[ImageBatch]:
    """Mixed batches with soft targets on the device, from optimiser step `step` on."""
    augment, training = config.augment, config.training
    mixing = Mixing(
        len(images.source.classes),
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        probability=augment.mix_probability,
        switch=augment.switch_probability,
        smoothing=training.label_smoothing,
    )
    start = step * training.accumulate
    batches = images.batches(start, config.data.workers, pin_memory=device.type == "cuda")
    for number, batch in enumerate(batches, start):
        moved = mixing(batch.to(device), seed=config.seed, step=number)
        yield replace(moved, image=moved.image.contiguous(memory_format=memory_format(config)))


def memory_format(config: ImageConfig) -> torch.memory_format:
    """How images and the network lie in memory."""
    return torch.channels_last if config.training.channels_last else torch.contiguous_format
