"""What a training of a panoptic segmenter can be told."""

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
)

Share = Annotated[float, Field(gt=0, le=1)]
Edge = Annotated[int, Field(ge=1, le=16384)]


def _odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError(f"expected an odd number, got {number}")
    return number


class PanopticData(Section):
    """The images and their segments, in the COCO panoptic format."""

    root: FilePath = Field(description="Folder of the data set")
    layout: Literal["coco", "cityscapes", "mapillary", "mapillary_v2"] = Field(
        default="coco", description="Where files are below root, as the data set's publishers lay them out"
    )
    train: Literal["train", "val"] = Field(default="train", description="Which split is trained on")
    validation: Literal["train", "val"] = Field(default="val", description="Which split is validated on")
    train_images: int | None = Field(
        default=None, ge=1, description="Take the first so many training images; null = all"
    )
    validation_images: int | None = Field(
        default=None, ge=1, description="Take the first so many validation images; null = all"
    )
    corrupt_limit: int = Field(
        default=100,
        ge=0,
        description="Unreadable images that are counted, named and replaced before it is an error",
    )
    workers: int = Field(
        default=2, ge=0, le=256, description="Threads that read and change images; 0 = none extra"
    )


class PanopticNetwork(Section):
    """Which network is trained, and from what."""

    name: str = Field(
        default="axial_deeplab_s", min_length=1, description="A panoptic one of `medattn networks`"
    )
    options: dict[str, Any] = Field(default={}, description="Further arguments of the network, by name")
    backbone: FilePath | None = Field(
        default=None, description="Model folder of a classifier whose weights the backbone starts from"
    )
    weights: FilePath | None = Field(
        default=None, description="Model folder of a panoptic segmenter to start from; of other classes, too"
    )


class PanopticAugment(Section):
    """Random changes of training images."""

    scale_range: FactorRange = Field(default=(0.5, 1.5), description="Range of the zoom factor")
    longest_side: Edge | None = Field(
        default=None, description="Bring the longer side to this before zooming; null = as the image is"
    )
    scale_step: float = Field(
        default=0.1, ge=0, le=1, description="Distance between zoom factors; 0 = any in the range"
    )
    flip_probability: Probability = Field(default=0.5, description="Chance of a left-right flip")
    color_jitter: float = Field(
        default=0.0, ge=0, le=1, description="Largest relative change of brightness, contrast and saturation"
    )
    color_policy: float | None = Field(
        default=None, ge=0, le=1, description="Strength of DeepLab2's colour policy, 0.2 there; null = none"
    )


class PanopticTargets(Section):
    """What the network is to say of a pixel."""

    sigma: float = Field(default=8.0, gt=0, le=100, description="Deviation of a centre's Gaussian, in pixels")
    small_area: int = Field(
        default=4096, ge=0, description="Instances of fewer pixels have small_weight in the semantic loss"
    )
    small_weight: float = Field(
        default=3.0, ge=0, le=100, description="Weight of their pixels; 1 = as others"
    )


class PanopticLossWeights(Section):
    """The loss: semantic cross entropy, squared error of centres, absolute error of offsets."""

    hardest: Share = Field(
        default=0.2, description="Share of the pixels, those of largest loss, in the cross entropy; 1 = all"
    )
    semantic: float = Field(default=1.0, ge=0, description="Weight of the cross entropy")
    centre: float = Field(default=200.0, ge=0, description="Weight of the centres' loss")
    offset: float = Field(default=0.01, ge=0, description="Weight of the offsets' loss, which is in pixels")


class PanopticTraining(Section):
    """The optimisation. A schedule anneals on the larger of step / `steps` and elapsed / `max_minutes`."""

    steps: int = Field(default=200_000, ge=1, description="Optimiser steps")
    max_minutes: float | None = Field(
        default=None, gt=0, description="Wall-clock limit of the whole command, in minutes; null = none"
    )
    batch_size: int = Field(default=64, ge=1, description="Images per forward pass")
    accumulate: int = Field(default=1, ge=1, description="Forward passes per step; a step sees the product")
    optimizer: Literal["adamw", "sgd", "lamb", "radam_lookahead"] = Field(
        default="radam_lookahead", description="adamw is Adam without weight_decay; sgd has Nesterov momentum"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of sgd")
    learning_rate: float = Field(default=1e-3, gt=0, le=100, description="Peak, for the whole step's images")
    floor: float = Field(default=0.0, ge=0, le=1, description="Lowest learning rate at the end")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Not of biases, norms and tables")
    schedule: Literal["cosine", "poly"] = Field(default="poly", description="poly has exponent 0.9")
    warmup_steps: int = Field(
        default=2000, ge=0, description="Linear warm-up, at most a tenth of the whole run"
    )
    gradient_clip: float | None = Field(default=None, gt=0, description="Largest gradient norm; null = none")
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="Decay of the averaged weights; 0 = no average"
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
    validate_every: int = Field(default=5000, ge=1, description="Steps between validations")
    save_every: int = Field(default=1000, ge=1, description="Steps between checkpoints to resume from")
    patience: int | None = Field(
        default=None, ge=1, description="Stop after so many validations without a better one; null = never"
    )


class PanopticInference(Section):
    """How images are segmented, in validation and by the trained model."""

    longest_side: Edge = Field(
        default=641, description="Larger images are made smaller to this; pixels, best one more than 16 n"
    )
    shortest_side: Edge | None = Field(
        default=None, description="Bring the shorter side to this where the longer one allows it; null = any"
    )
    enlarge: bool = Field(default=False, description="Make smaller images larger to it, too")
    mean: tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406), description="Of red, green, blue in 0 to 1"
    )
    std: tuple[Share, Share, Share] = Field(
        default=(0.229, 0.224, 0.225), description="Deviations of the same"
    )
    threshold: Probability = Field(default=0.1, description="Lowest value of a centre")
    nms_kernel: Annotated[int, Field(ge=1), AfterValidator(_odd)] = Field(
        default=41, description="Pixels of the square in which one centre is kept"
    )
    top_k: int = Field(default=200, ge=1, description="Most instances in an image")
    strict_top_k: bool = Field(
        default=False, description="Keep centres above the last of them only, as the published code does"
    )
    stuff_area: int = Field(default=4096, ge=0, description="Stuff of fewer pixels is left void")
    scales: tuple[float, ...] = Field(
        default=(1.0,), min_length=1, description="Sizes whose predictions are averaged, as factors"
    )
    flip: bool = Field(default=False, description="Average with the left-right flipped image, too")


class PanopticConfig(Section):
    """A training run of a panoptic segmenter. `configfile.load_any` reads one from YAML and overrides."""

    task: Literal["panoptic"] = Field(description="panoptic")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of weights, order and augmentation")
    crop_size: tuple[Edge, Edge] = Field(
        default=(641, 641), description="Height and width of training images; best one more than 16 n"
    )
    data: PanopticData
    run: Run = Run()
    network: PanopticNetwork = PanopticNetwork()
    augment: PanopticAugment = PanopticAugment()
    targets: PanopticTargets = PanopticTargets()
    loss: PanopticLossWeights = PanopticLossWeights()
    training: PanopticTraining = PanopticTraining()
    inference: PanopticInference = PanopticInference()

    @property
    def run_dir(self) -> Path:
        """The run folder. `configfile.load_any` always sets it; a config built by hand must."""
        if self.run.dir is None:
            raise ValueError("run.dir is not set")
        return self.run.dir
