"""What a training of an image classifier can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from medattn_pipelines.config import (
    CheckpointActivations,
    Compile,
    Deterministic,
    FactorRange,
    FilePath,
    Probability,
    Run,
    Section,
    ShardWeights,
    SyncBatchNorm,
    _ordered,
)

Interpolation = Literal["bilinear", "bicubic"]
Share = Annotated[float, Field(gt=0, le=1)]


class ImageData(Section):
    """The images."""

    root: FilePath = Field(description="Folder with the training and validation images")
    train: str = Field(
        default="train",
        description="Below root: a folder per class, or tar shards such as train-{000..146}.tar",
    )
    validation: str = Field(
        default="val", description="Below root: the same, or a flat folder with data.ground_truth"
    )
    ground_truth: FilePath | None = Field(
        default=None, description="Text file with `file class` lines, for a flat folder of validation images"
    )
    classes: FilePath | None = Field(
        default=None, description="Class list with names: LOC_synset_mapping.txt, or JSON {wnid: name}"
    )
    corrupt_limit: int = Field(
        default=100,
        ge=0,
        description="Unreadable images that are counted, named and skipped before it is an error",
    )
    workers: int = Field(
        default=2, ge=0, le=256, description="Threads that read and change images; 0 = none extra"
    )


class ImageNetwork(Section):
    """Which network is trained, and from what."""

    name: str = Field(default="resnet50", min_length=1, description="A classifier of `medattn networks`")
    options: dict[str, Any] = Field(default={}, description="Further arguments of the network, by name")
    weights: FilePath | None = Field(
        default=None, description="Model folder to start from, such as one trained at a lower resolution"
    )


class ImageAugment(Section):
    """Random changes of training images."""

    scale_range: Annotated[tuple[Share, Share], AfterValidator(_ordered)] = Field(
        default=(0.08, 1.0), description="Range of the crop's share of the image's area"
    )
    ratio_range: FactorRange = Field(
        default=(0.75, 4 / 3), description="Range of the crop's width over height"
    )
    interpolation: Literal["bilinear", "bicubic", "random"] = Field(
        default="bicubic", description="How crops are resized"
    )
    flip_probability: Probability = Field(default=0.5, description="Chance of a left-right flip")
    color_jitter: float = Field(
        default=0.0, ge=0, le=1, description="Largest relative change of brightness, contrast and saturation"
    )
    randaugment_magnitude: float | None = Field(
        default=None, ge=0, le=30, description="RandAugment's magnitude, of 10 usually; null = no RandAugment"
    )
    randaugment_std: float = Field(default=0.5, ge=0, le=10, description="Deviation of that magnitude")
    randaugment_operations: int = Field(default=2, ge=1, le=10, description="Operations per image")
    erase_probability: Probability = Field(default=0.0, description="Chance that a box is replaced by noise")
    mixup: float = Field(
        default=0.0, ge=0, le=10, description="Parameter of mixup's Beta distribution; 0 = off"
    )
    cutmix: float = Field(default=0.0, ge=0, le=10, description="Parameter of CutMix's; 0 = off")
    mix_probability: Probability = Field(default=1.0, description="Chance that a batch is mixed at all")
    switch_probability: Probability = Field(default=0.5, description="Chance of CutMix where both are on")
    repeats: int = Field(
        default=1, ge=1, le=16, description="Times that an image enters a step, each time changed anew"
    )


class Distillation(Section):
    """A second loss, against what a teacher says of the same images."""

    teacher: FilePath | None = Field(default=None, description="Model folder of the teacher; null = none")
    kind: Literal["hard", "soft"] = Field(
        default="hard", description="Its best class, or all its probabilities"
    )
    weight: Probability = Field(default=0.5, description="Share of this loss; the labels have the rest")
    temperature: float = Field(default=1.0, gt=0, le=100, description="Divides both sides' logits; soft only")


class ImageTraining(Section):
    """The optimisation. A schedule anneals on the larger of step / steps and elapsed / `max_minutes`."""

    epochs: float = Field(default=300, gt=0, description="Passes over the training images")
    steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps; null = as many as epochs make"
    )
    max_minutes: float | None = Field(
        default=None, gt=0, description="Wall-clock limit of the whole command, in minutes; null = none"
    )
    batch_size: int = Field(default=128, ge=1, description="Images per forward pass")
    accumulate: int = Field(default=1, ge=1, description="Forward passes per step; a step sees the product")
    optimizer: Literal["adamw", "sgd", "lamb", "radam_lookahead"] = Field(
        default="sgd", description="sgd has Nesterov momentum"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of sgd")
    learning_rate: float = Field(default=0.1, gt=0, le=100, description="Peak, for the whole step's images")
    floor: float = Field(default=0.0, ge=0, le=1, description="Lowest learning rate at the end")
    weight_decay: float = Field(default=1e-4, ge=0, le=1, description="Not of biases, norms and tables")
    schedule: Literal["cosine", "poly"] = Field(default="cosine", description="poly has exponent 0.9")
    warmup_epochs: float = Field(
        default=5, ge=0, description="Linear warm-up, at most a tenth of the whole run"
    )
    gradient_clip: float | None = Field(default=None, gt=0, description="Largest gradient norm; null = none")
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="Decay of the averaged weights; 0 = no average"
    )
    label_smoothing: float = Field(
        default=0.1, ge=0, lt=1, description="Share of a target spread over all classes"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="bf16 autocast or full precision; auto = bf16 where the device computes in it",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto = cuda where there is one"
    )
    deterministic: Deterministic = False
    sync_batch_norm: SyncBatchNorm = False
    shard_weights: ShardWeights = False
    checkpoint_activations: CheckpointActivations = False
    channels_last: bool = Field(default=True, description="Channels innermost in memory: faster convolutions")
    compile: Compile = Field(default=False, description="Compile the network with torch.compile")
    log_every: int = Field(default=20, ge=1, description="Steps between lines in metrics.jsonl")
    validate_every: int | None = Field(
        default=None, ge=1, description="Steps between validations; null = an epoch"
    )
    save_every: int | None = Field(
        default=None, ge=1, description="Steps between checkpoints; null = an epoch"
    )
    patience: int | None = Field(
        default=None, ge=1, description="Stop after so many validations without a better one; null = never"
    )


class ImageInference(Section):
    """How images are classified, in validation and by the trained model."""

    image_size: int = Field(
        default=224, ge=1, le=4096, description="Pixels per side of what the network sees"
    )
    crop_ratio: Share = Field(default=0.875, description="That side over the resized image's shorter side")
    interpolation: Interpolation = Field(default="bicubic", description="How images are resized")
    mean: tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406), description="Of red, green, blue in 0 to 1"
    )
    std: tuple[Share, Share, Share] = Field(
        default=(0.229, 0.224, 0.225), description="Deviations of the same"
    )
    batch_size: int = Field(default=128, ge=1, description="Images per forward pass")


class ImageConfig(Section):
    """A training run of an image classifier. `configfile.load` reads one from YAML and overrides."""

    task: Literal["classification"] = Field(description="classification")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of weights, order and augmentation")
    image_size: int = Field(default=224, ge=1, le=4096, description="Pixels per side of training images")
    data: ImageData
    run: Run = Run()
    network: ImageNetwork = ImageNetwork()
    augment: ImageAugment = ImageAugment()
    training: ImageTraining = ImageTraining()
    distillation: Distillation = Distillation()
    inference: ImageInference = ImageInference()

    @property
    def run_dir(self) -> Path:
        """The run folder. `configfile.load` always sets it; a config built by hand must."""
        if self.run.dir is None:
            raise ValueError("run.dir is not set")
        return self.run.dir
