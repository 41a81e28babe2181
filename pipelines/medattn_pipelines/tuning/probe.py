"""A search is tried out before its first trial: every bound and choice must give a config and a network."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from medattn.errors import InputError
from medattn_pipelines.configfile import AnyConfig
from medattn_pipelines.tuning.space import (
    AnyDistribution,
    Categorical,
    FloatRange,
    Values,
    extremes,
    is_active,
    label,
    on_steps,
    ordered,
)
from medattn_pipelines.tuning.spacefile import Search

DRAWS = 20  # random combinations


def check_search(search: Search) -> None:
    """Raise InputError with every value of the space that gives no valid config or no network.

    Nothing is allocated and no data is read. Each end of a range and each choice is tried with the first
    values of the other fields, then some random combinations.
    """
    # combinations second: where a single value fails, so do many of them, and say nothing new
    for probes in (_single(search), _together(search)):
        _check(search, probes)


def _check(search: Search, probes: Iterator[tuple[str, Values]]) -> None:
    problems: dict[str, None] = {}
    valid: list[tuple[str, AnyConfig]] = []
    for what, values in probes:
        try:
            valid.append((what, search.config(values)))
        except InputError as error:
            problems |= dict.fromkeys(error.problems)
    if not problems:  # torch is loaded for what is left alone: a typo shows at once
        problems = dict.fromkeys(_network_problems(valid))
    if problems:
        raise InputError(*problems)


def _single(search: Search) -> Iterator[tuple[str, Values]]:
    """Each value to try on its own, and how to call it."""
    space = search.space.space
    # fields of the network first, and those that depend on others before them: what is wrong with a network
    # is told of the first probe that builds it
    deepest = ordered(space)[::-1]
    for path in sorted(deepest, key=lambda path: not path.startswith("network.")):
        for value in extremes(space[path]):
            values = _with(space, path, value)
            yield f"{search.value_place(path, value)}: space: {path}: {label(value)}", values


def _together(search: Search) -> Iterator[tuple[str, Values]]:
    chance = random.Random(search.space.seed)
    for _ in range(DRAWS):
        values = _draw(search.space.space, chance)
        together = ", ".join(f"{path}={label(value)}" for path, value in values.items())
        yield f"{search.place('space')}: space: together, {together}", values


def _with(space: dict[str, AnyDistribution], path: str, value: Any) -> dict[str, Any]:
    """First values of all fields, but this one and those that it depends on as it needs them."""
    wanted = {path: value} | _needed(space, path)
    values: dict[str, Any] = {}
    for name in ordered(space):
        if is_active(space[name], values):
            values[name] = wanted.get(name, extremes(space[name])[0])
    return values


def _needed(space: dict[str, AnyDistribution], path: str) -> dict[str, Any]:
    needed: dict[str, Any] = {}
    for parent, values in space[path].when.items():
        needed |= {parent: values[0]} | _needed(space, parent)
    return needed


def _draw(space: dict[str, AnyDistribution], chance: random.Random) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for path in ordered(space):
        if is_active(space[path], values):
            values[path] = _value(space[path], chance)
    return values


def _value(distribution: AnyDistribution, chance: random.Random) -> Any:
    if isinstance(distribution, Categorical):
        return chance.choice(distribution.choices)
    low, high = distribution.low, distribution.high
    if distribution.step is not None:
        return chance.choice(on_steps(distribution))
    assert isinstance(distribution, FloatRange)
    return low * (high / low) ** chance.random() if distribution.log else chance.uniform(low, high)


def _network_problems(configs: list[tuple[str, AnyConfig]]) -> Iterator[str]:
    tried: set[str] = set()
    for what, config in configs:
        options = _network_options(config)
        key = json.dumps([config.network.name, options], default=str, sort_keys=True)
        if key not in tried:
            tried.add(key)
            try:
                _build(config.task, config.network.name, options)
            except InputError as error:
                yield f"{what}: {error}"


def _network_options(config: AnyConfig) -> dict[str, Any]:
    """As the pipelines give them; the numbers of channels and classes stand for those of the data."""
    options = dict(config.network.options)
    if config.task == "classification":
        return {"image_size": config.image_size, "num_classes": 10} | options
    if config.task == "panoptic":
        return {"image_size": config.crop_size, "num_classes": 10} | options
    if config.network.name.startswith("unet"):
        levels = len(options.get("widths") or ()) or 6  # the plan of the data says how many there are
        strides = [2] * (levels - 1)
        options = {"deep_supervision": config.training.deep_supervision, "strides": strides} | options
    return {"spatial_dims": config.network.spatial_dims, "in_channels": 1, "out_channels": 8} | options


def _build(task: str, name: str, options: dict[str, Any]) -> None:
    import torch

    from medattn.networks import create
    from medattn.networks.registry import task_of

    wanted = "segmentation" if task == "volumes" else task
    if task_of(name) != wanted:
        raise InputError(f"{name!r} is made for {task_of(name)}, not for {wanted}")
    with torch.device("meta"):
        create(name, **options)
