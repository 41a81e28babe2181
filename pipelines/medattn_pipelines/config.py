"""What a training run can be told: frozen models in which every field is typed, ranged and explained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

NUMBERS = (int, float, int | None, float | None)


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"expected [low, high], got low {pair[0]:g} above high {pair[1]:g}")
    return pair


def _window(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] >= pair[1]:
        raise ValueError(
            f"expected [low, high] with low below high, got low {pair[0]:g} and high {pair[1]:g}"
        )
    return pair


def _distinct(names: list[str]) -> list[str]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"every name once, got {', '.join(twice)} more than once")
    return names


Probability = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(gt=0, le=10)]


def _uncombined(wanted: bool, info: ValidationInfo) -> bool:
    others = [name for name in ("shard_weights", "checkpoint_activations") if info.data.get(name)]
    if wanted and others:
        raise ValueError(f"torch.compile does not go with {' and '.join(others)}; set one of them to false")
    return wanted


Deterministic = Annotated[
    bool, Field(description="CUDA: the same bits from the same run, slower; a CPU gives them anyway")
]
SyncBatchNorm = Annotated[
    bool,
    Field(description="Under torchrun, batch norm over the images of all processes instead of each one's"),
]
ShardWeights = Annotated[
    bool,
    Field(
        description="Under torchrun, each process keeps only its share of weights, averages and optimizer "
        "state (FSDP2), for networks that do not fit otherwise; alone, nothing"
    ),
]
CheckpointActivations = Annotated[
    bool,
    Field(
        description="Keep only each block's input for the backward pass and compute the rest again: less "
        "memory, about a third more time"
    ),
]
Compile = Annotated[bool, AfterValidator(_uncombined)]  # declared after the fields that it asks about
FactorRange = Annotated[tuple[Factor, Factor], AfterValidator(_ordered)]
Spacing = Annotated[float, Field(gt=0, le=50)]
Window = Annotated[tuple[float, float], AfterValidator(_window)]
Edge = Annotated[int, Field(ge=1, le=1024)]


def _home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # ~name of a user that does not exist
        raise ValueError(str(error)) from None


FilePath = Annotated[Path, AfterValidator(_home)]


class Section(BaseModel):
    """Shared rules: unknown fields, changes, infinities and booleans in place of numbers are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, ser_json_inf_nan="constants"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in NUMBERS:
            raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


class Data(Section):
    """The cases and how they are prepared."""

    root: FilePath = Field(description="Folder of cases: cases.json, labels.json and a folder per case")
    label_set: str = Field(
        default="hn_oar", description="Packaged label set, or the path of a label-set YAML"
    )
    organs: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)] | None = Field(
        default=None, description="Organs to learn, by their names in labels.json; null = all of them"
    )
    spacing_mm: tuple[Spacing, Spacing, Spacing] | None = Field(
        default=None,
        description="Voxel spacing to resample to, left-right, front-back, head-foot; null = planned",
    )
    patch_size: tuple[Edge, Edge, Edge] | None = Field(
        default=None, description="Training patch in voxels, same axes as spacing_mm; null = planned"
    )
    window_hu: Window | None = Field(
        default=None, description="CT numbers that are told apart, in HU: [low, high]; null = planned"
    )
    validation: float = Field(
        default=0.15, ge=0, le=0.9, description="Share of patients held out where cases.json gives no split"
    )
    workers: int = Field(
        default=2, ge=0, le=256, description="Threads that prepare and read cases; 0 = none extra"
    )
    cache: FilePath | None = Field(
        default=None, description="Folder for prepared volumes; null = `prepared` beside the run folder"
    )


class Run(Section):
    """Where a run is kept and who is told."""

    dir: FilePath | None = Field(
        default=None, description="The run folder; null = runs/<name of the config file>"
    )
    tracking: bool = Field(default=True, description="Mirror parameters and metrics to MLflow")
    experiment: str | None = Field(
        default=None, min_length=1, description="MLflow's experiment; null = name of the config file"
    )
    parent: str | None = Field(
        default=None, min_length=1, description="Key in run.json of the sweep that this run is a trial of"
    )


class Network(Section):
    """Which network is trained."""

    name: str = Field(default="unet_block", min_length=1, description="One of `medattn networks`")
    spatial_dims: Literal[2, 3] = Field(default=3, description="2: slice by slice, 3: volumes")
    options: dict[str, Any] = Field(default={}, description="Further arguments of the network, by name")


class Augment(Section):
    """Random changes of training patches. Ranges are [low, high]; a value is drawn uniformly."""

    enabled: bool = Field(default=True, description="Augment at all")
    flip_probability: Probability = Field(
        default=0.5, description="Chance of a left-right flip; paired organs swap their labels"
    )
    affine_probability: Probability = Field(
        default=0.5, description="Chance of rotation, scaling and translation"
    )
    rotate_degrees: float = Field(
        default=15, ge=0, le=180, description="Largest rotation about each axis, in degrees"
    )
    scale_range: FactorRange = Field(default=(0.8, 1.25), description="Range of the zoom factor")
    translate_mm: float = Field(default=5, ge=0, le=200, description="Largest shift along each axis, in mm")
    intensity_probability: Probability = Field(default=0.3, description="Chance of each of the changes below")
    contrast_range: FactorRange = Field(default=(0.75, 1.25), description="Range of the factor")
    brightness: float = Field(
        default=0.1, ge=0, le=1, description="Largest shift, in half widths of the HU window"
    )
    gamma_range: FactorRange = Field(
        default=(0.7, 1.5), description="Range of the exponent on the patch's range"
    )
    noise: float = Field(
        default=0.05, ge=0, le=1, description="Largest noise deviation, in half widths of the HU window"
    )
    blur_mm: float = Field(
        default=1.5, ge=0, le=20, description="Largest deviation of the Gaussian blur, in mm"
    )


class Training(Section):
    """The optimisation. A schedule anneals on the larger of step / `steps` and elapsed / `max_minutes`."""

    steps: int = Field(default=20_000, ge=1, description="Optimiser steps")
    max_minutes: float | None = Field(
        default=None, gt=0, description="Wall-clock limit of the whole command, in minutes; null = none"
    )
    batch_size: int = Field(default=2, ge=1, le=4096, description="Patches per step")
    learning_rate: float = Field(default=1e-3, gt=0, le=10, description="Peak learning rate")
    weight_decay: float = Field(default=1e-2, ge=0, le=1, description="Weight decay")
    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw", description="adamw, or sgd with Nesterov momentum 0.99"
    )
    schedule: Literal["cosine", "poly"] = Field(
        default="cosine", description="How the rate falls to zero after warm-up; poly has exponent 0.9"
    )
    warmup_steps: int = Field(
        default=200, ge=0, description="Steps of linear warm-up, at most a tenth of the whole run"
    )
    gradient_clip: float = Field(default=12.0, gt=0, description="Largest gradient norm")
    ema_decay: float = Field(
        default=0.999, ge=0, lt=1, description="Decay of the averaged weights; 0 = no average"
    )
    deep_supervision: bool = Field(default=True, description="Add losses at the coarser decoder levels")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="bf16 autocast or full precision; auto = bf16 where the device computes in it",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto = cuda where there is one"
    )
    deterministic: Deterministic = False
    shard_weights: ShardWeights = False
    checkpoint_activations: CheckpointActivations = False
    log_every: int = Field(default=20, ge=1, description="Steps between lines in metrics.jsonl")
    validate_every: int = Field(default=500, ge=1, description="Steps between validations on whole volumes")
    save_every: int = Field(default=500, ge=1, description="Steps between checkpoints to resume from")
    patience: int | None = Field(
        default=None, ge=1, description="Stop after so many validations without a better one; null = never"
    )
    foreground_share: Probability = Field(
        default=0.67, description="Share of patches centred on a drawn organ"
    )


class Inference(Section):
    """How whole volumes are segmented, in validation and by the trained model."""

    overlap: float = Field(
        default=0.5, ge=0, le=0.9, description="Share of a tile that its neighbour repeats"
    )
    flips: bool = Field(
        default=False, description="Average with the left-right flipped volume; takes twice as long"
    )
    keep_largest: bool = Field(default=True, description="Keep the largest connected part of each organ")
    batch_size: int = Field(default=2, ge=1, le=4096, description="Tiles per forward pass")


class Config(Section):
    """A training run on volumes. `configfile.load` reads one from YAML and overrides."""

    task: Literal["volumes"] = Field(
        default="volumes", description="What is trained: volumes or classification"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Seed of splits, weights, sampling and augmentation"
    )
    data: Data
    run: Run = Run()
    network: Network = Network()
    augment: Augment = Augment()
    training: Training = Training()
    inference: Inference = Inference()

    @property
    def run_dir(self) -> Path:
        """The run folder. `configfile.load` always sets it; a config built by hand must."""
        if self.run.dir is None:
            raise ValueError("run.dir is not set")
        return self.run.dir

    @property
    def cache_dir(self) -> Path:
        """The folder of prepared volumes: data.cache, or `prepared` beside the run folder."""
        return self.data.cache or self.run_dir.parent / "prepared"
