"""Training on volumes, end to end: cases in; model, segmentations and report out."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medattn import __version__
from medattn.atomic import write_text
from medattn.data.augment import Augmentation
from medattn.data.cases import CaseFolder, assign_splits, read_cases
from medattn.data.check import check_cases, require_clean
from medattn.data.plan import Plan, make_plan
from medattn.data.sampling import Batch, PatchSampler
from medattn.data.store import Prepared, prepare_cases
from medattn.errors import InputError
from medattn.io import read_volume
from medattn.labels import LabelSet
from medattn.losses import segmentation_loss
from medattn.metrics import dice
from medattn.networks.registry import family, task_of
from medattn.report.tables import Evaluation
from medattn.segmenter import ModelCard, Segmenter, Settings, load_model, read_plan, save_model
from medattn.training.determinism import deterministic
from medattn.training.distributed import ALONE, Processes, joined, summed
from medattn.training.loop import RESERVE, Limits, Schedule, State
from medattn.training.optimizers import make_optimizer
from medattn.training.sharding import whole
from medattn.training.thin_maps import spare_thin_maps
from medattn_pipelines.config import Config
from medattn_pipelines.evaluation import evaluate
from medattn_pipelines.fitting import BEST, Trained, fit_run, make_learner
from medattn_pipelines.prediction import segment_all
from medattn_pipelines.progress import case_progress
from medattn_pipelines.record import tell_cases
from medattn_pipelines.runs import choose_device, choose_precision, open_run

MOMENTUM = 0.99  # of sgd, as in nnU-Net


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Trained[Evaluation]:
    """Train a network and report on the validation cases.

    The run folder gets config.yaml, plan.json, metrics.jsonl, checkpoints/ and, unless a signal ended the
    training, model/, predictions/ and report/. Under torchrun all processes train together and share the
    predictions, and the main one writes the rest. Raises InputError for unusable data, for a run folder that
    exists (unless resume or overwrite) and when training diverges.
    """
    started = time.monotonic()
    with (
        deterministic(config.training.deterministic),
        joined(choose_device(config.training.device)) as processes,
    ):
        return _train(config, processes, started, resume=resume, overwrite=overwrite)


def _train(
    config: Config, processes: Processes, started: float, *, resume: bool, overwrite: bool
) -> Trained[Evaluation]:
    run = open_run(config, resume=resume, overwrite=overwrite, processes=processes)
    device = processes.device
    precision = choose_precision(config.training.precision, device)
    label_set = LabelSet.load(config.data.label_set)
    with processes.main_first():  # it writes the plan and the store that the others find
        folder, plan = plan_data(config, run, label_set)
        card = describe_model(config, folder, plan, label_set)
        with torch.device("meta"):
            card.build()  # a wrong option shows now, not after an hour of preparation
        prepared = prepare(config, folder, plan)
    torch.manual_seed(config.seed)
    network = card.build().to(device)
    if device.type == "cpu":
        spare_thin_maps(network)
    learner = make_learner(
        config, run, network, partial(make_volume_optimizer, config), processes, resume=resume
    )
    # overlap 0 and no flips: a quick look that ranks checkpoints; the report uses the configured settings
    quick = dataclasses.replace(card, settings=dataclasses.replace(card.settings, overlap=0.0, flips=False))
    segmenter = Segmenter(quick, learner.averaged.module, device, precision)

    validation = folder.split("validation")
    begun = time.monotonic()
    with whole(learner.averaged):
        segmenter.segment(read_volume(validation[0].image))  # shows now, not in an hour, that memory suffices
    mine = -(-len(validation) // processes.world)
    reserve_seconds = RESERVE * mine * (time.monotonic() - begun)

    training = config.training
    reason, evaluation = fit_run(
        config,
        run,
        learner,
        training_batches(config, card, prepared, processes, learner.state.step),
        loss_function(device, precision),
        Schedule(training.learning_rate, training.warmup_steps, training.schedule),
        make_limits(config),
        score="Dice",
        validate=lambda: validation_dice(segmenter, folder, plan.organs, processes),
        finish=lambda: finish(config, run, card, learner.state, folder, segmenter, processes),
        started=started,
        reserve_seconds=reserve_seconds,
        resume=resume,
        processes=processes,
    )
    return Trained(run, reason, learner.state.step, evaluation)


def plan_data(config: Config, run: Path, label_set: LabelSet) -> tuple[CaseFolder, Plan]:
    """The checked cases with a split each, and the plan: the run's own if it has one, else a new one."""
    folder = read_cases(config.data.root)
    cases = assign_splits(folder.cases, validation=config.data.validation, seed=config.seed)
    folder = dataclasses.replace(folder, cases=cases)
    with case_progress("Reading cases", len(folder.cases)) as on_case:
        checkup = check_cases(folder, label_set, workers=max(1, config.data.workers), on_case=on_case)
    require_clean(checkup.findings)
    if warned := sum(finding.severity == "warning" for finding in checkup.findings):
        print(f"{folder.root}: {warned} warnings; `medattn check {folder.root}` explains them")
    for split in ("train", "validation"):
        if not folder.split(split):
            raise InputError(
                f"{folder.root}: no case for {split}; set 'split' in cases.json or data.validation"
            )
    organs = config.data.organs or list(folder.labels.values())
    if unknown := sorted(set(organs) - set(folder.labels.values())):
        raise InputError(
            f"data.organs: {unknown} not in {folder.root / 'labels.json'} {list(folder.labels.values())}"
        )
    if (run / "plan.json").is_file():
        return folder, stored_plan(run / "plan.json", config, organs)
    training = {case.name for case in folder.split("train")}
    plan = make_plan(
        [fingerprint for fingerprint in checkup.fingerprints if fingerprint.case in training],
        organs,
        spacing_mm=config.data.spacing_mm,
        patch_size=config.data.patch_size,
        window_hu=config.data.window_hu,
    )
    write_text(run / "plan.json", json.dumps(dataclasses.asdict(plan), indent=1) + "\n")
    return folder, plan


def prepare(config: Config, folder: CaseFolder, plan: Plan) -> list[Prepared]:
    """The training cases on the plan's grid. Raises InputError where an organ is in none of them."""
    with case_progress("Preparing", len(folder.split("train"))) as on_case:
        prepared = prepare_cases(
            folder.split("train"),
            folder.labels,
            plan,
            config.cache_dir,
            workers=config.data.workers,
            on_case=on_case,
        )
    require_examples(plan, prepared)
    return prepared


def require_examples(plan: Plan, cases: Sequence[Prepared]) -> None:
    """Raise InputError for organs without a voxel in any prepared training case."""
    found = [any(len(case.anchors[number]) for case in cases) for number in range(len(plan.organs))]
    if absent := [organ for organ, there in zip(plan.organs, found, strict=True) if not there]:
        raise InputError(f"no training case holds {', '.join(absent)}; name the others in data.organs")


def stored_plan(path: Path, config: Config, organs: Sequence[str]) -> Plan:
    """The plan of the run to resume. Raises InputError where it is damaged or the config wants another."""
    try:
        plan = read_plan(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not a plan ({reason}); start again with --overwrite") from None
    wanted = {name: getattr(config.data, name) for name in ("spacing_mm", "patch_size", "window_hu")}
    wanted["organs"] = tuple(organs)
    if changed := [name for name, value in wanted.items() if value not in (None, getattr(plan, name))]:
        raise InputError(
            f"{path}: the run was planned with another {', '.join(changed)}, which cannot change on the way; "
            "resume with the old value, or start again with --overwrite"
        )
    return plan


def describe_model(config: Config, folder: CaseFolder, plan: Plan, label_set: LabelSet) -> ModelCard:
    """All of a model but its weights, from the config and the data.

    Raises InputError for a network that does not segment.
    """
    if task_of(config.network.name) != "segmentation":
        raise InputError(
            f"network.name: {config.network.name!r} classifies images and does not segment volumes; "
            "`medattn networks` lists what each network is made for"
        )
    options = dict(config.network.options)
    if family(config.network.name) == "unet":
        options = {"deep_supervision": config.training.deep_supervision} | options
    return ModelCard(
        network=config.network.name,
        spatial_dims=config.network.spatial_dims,
        options=options,
        plan=plan,
        labels=folder.labels,
        organs=dict(zip(plan.organs, label_set.resolve(plan.organs), strict=True)),
        mirror=_mirror(config, label_set, plan.organs),
        settings=Settings(**config.inference.model_dump()),
    )


def make_volume_optimizer(config: Config, network: nn.Module) -> torch.optim.Optimizer:
    """The one that the config names; weight decay shrinks every parameter."""
    training = config.training
    rate, decay = training.learning_rate, training.weight_decay
    return make_optimizer(training.optimizer, network.parameters(), rate, decay, MOMENTUM)


def make_limits(config: Config) -> Limits:
    """When the loop stops and what it does in between."""
    training = config.training
    return Limits(
        steps=training.steps,
        max_seconds=None if training.max_minutes is None else 60 * training.max_minutes,
        patience=training.patience,
        validate_every=training.validate_every,
        save_every=training.save_every,
    )


def training_batches(
    config: Config, card: ModelCard, cases: Sequence[Prepared], processes: Processes, start: int
) -> Iterator[Batch]:
    """This process's share of augmented batches on its device, from step `start` on; each batch a function of
    seed and step alone."""
    rank, world = processes.rank, processes.world
    sampler = PatchSampler(
        cases,
        card.plan.patch_size,
        config.training.batch_size,
        config.training.foreground_share,
        config.seed,
        rank,
        world,
    )
    changes = config.augment.model_dump()
    augment = Augmentation(card.plan.spacing_mm, card.mirror, **changes) if changes.pop("enabled") else None
    for step, batch in enumerate(sampler.batches(start, config.data.workers), start):
        moved = batch.to(processes.device)
        yield augment(moved, seed=config.seed, step=step, rank=rank, world=world) if augment else moved


def loss_function(device: torch.device, precision: torch.dtype) -> Callable[[nn.Module, Batch], Tensor]:
    """Forward pass and loss; the network under autocast, the loss in float32."""

    def loss_of(network: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            outputs = network(batch.image)
        return segmentation_loss(outputs, batch.label, batch.drawn, summed)

    return loss_of


def validation_dice(
    segmenter: Segmenter, folder: CaseFolder, organs: Sequence[str], processes: Processes = ALONE
) -> tuple[float, dict[str, float]]:
    """Mean Dice over organs, and what to log: it and the mean of each organ, on the cases' own grids.

    An organ counts in the validation cases that someone contoured it in. The processes share the cases.
    """
    scores: dict[str, dict[str, float]] = {}
    value_of = {name: value for value, name in folder.labels.items()}
    for case in folder.split("validation")[processes.rank :: processes.world]:
        predicted = segmenter.segment(read_volume(case.image))
        reference = read_volume(case.label).array
        scores[case.name] = {
            organ: dice(predicted == value_of[organ], reference == value_of[organ])
            for organ in set(organs) & set(case.contoured)
        }
    scores = {case: of_case for share in processes.gathered(scores) for case, of_case in share.items()}
    tell_cases({case: fmean(of_case.values()) for case, of_case in scores.items() if of_case})
    drawn = {organ: [of_case[organ] for of_case in scores.values() if organ in of_case] for organ in organs}
    means = {organ: fmean(values) for organ, values in drawn.items() if values}
    if not means:
        raise InputError(f"{folder.root}: no validation case has a contoured organ of {list(organs)}")
    mean = fmean(means.values())
    return mean, {"validation_dice": mean} | {f"dice/{organ}": score for organ, score in means.items()}


def finish(
    config: Config,
    run: Path,
    card: ModelCard,
    state: State,
    folder: CaseFolder,
    segmenter: Segmenter,
    processes: Processes,
) -> Evaluation | None:
    """Write model/ from the best weights, segment the validation cases with it and report.

    The processes share the cases; the main one does the rest, and alone has the evaluation.
    """
    provenance = {
        "medattn": __version__,
        "steps": state.step,
        "best_step": state.best_step,
        "validation_dice": state.best,
        "seconds": round(state.seconds),
        "train_cases": len(folder.split("train")),
        "validation_cases": len(folder.split("validation")),
    }
    if processes.main:
        card = dataclasses.replace(card, provenance=provenance)
        save_model(run / "model", card, load_file(run / BEST))
    processes.wait()
    card, network = load_model(run / "model")
    segmenter = Segmenter(card, network, segmenter.device, segmenter.precision)
    volumes = {case.name: case.image for case in folder.split("validation")}
    segment_all(segmenter, volumes, run / "predictions", export=["seg.nrrd"], processes=processes)
    if not processes.main:
        return None
    with case_progress("Measuring", len(volumes)) as on_case:
        return evaluate(
            run / "predictions",
            folder.root,
            run / "report",
            label_set=config.data.label_set,
            workers=1,  # in this process: others would import the caller's script again
            on_case=on_case,
        )


def _mirror(config: Config, label_set: LabelSet, organs: Sequence[str]) -> tuple[int, ...] | None:
    """Organ -> organ under a left-right flip; None where the config never flips."""
    if not (config.augment.enabled and config.augment.flip_probability) and not config.inference.flips:
        return None
    try:
        return label_set.mirror(organs)
    except InputError as error:
        advice = "; to train without flips, set augment.flip_probability=0 and inference.flips=false"
        raise InputError(*(problem + advice for problem in error.problems)) from None
