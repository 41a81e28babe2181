"""Who proposes a trial's values and who stops it early."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from scipy.stats import wilcoxon

from medattn_pipelines.tuning.space import (
    AnyDistribution,
    Categorical,
    FloatRange,
    Pruner,
    Space,
    combinations,
    grid_values,
    is_active,
    label,
    on_steps,
    ordered,
)

CASES = "cases"  # start of a trial's attributes: the scores of the cases at a step
GENERATION = "cmaes_generation"
LEAST_CASES = 2


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """The values of a trial; the sampler's where a retried trial has none already."""
    values: dict[str, Any] = {}
    for path in ordered(space.space):
        distribution = space.space[path]
        if not is_active(distribution, values):
            continue
        kind = as_optuna(distribution)
        if isinstance(kind, CategoricalDistribution):
            found: Any = trial.suggest_categorical(path, kind.choices)
        elif isinstance(kind, FloatDistribution):
            found = trial.suggest_float(path, kind.low, kind.high, log=kind.log, step=kind.step)
        else:
            found = trial.suggest_int(path, kind.low, kind.high, log=kind.log, step=kind.step)
        values[path] = from_optuna(distribution, found)
    return values


def as_optuna(distribution: AnyDistribution) -> CategoricalDistribution | FloatDistribution | IntDistribution:
    """The same for Optuna, which keeps choices as text and wants a range to end on a step."""
    if isinstance(distribution, Categorical):
        return CategoricalDistribution([label(choice) for choice in distribution.choices])
    low, high, step = distribution.low, distribution.high, distribution.step
    if isinstance(distribution, FloatRange):
        end = high if step is None else on_steps(distribution)[-1]
        return FloatDistribution(low, end, log=distribution.log, step=step)
    end = high if distribution.log else high - (high - low) % distribution.step
    return IntDistribution(distribution.low, int(end), log=distribution.log, step=distribution.step)


def from_optuna(distribution: AnyDistribution, found: Any) -> Any:
    """The value that Optuna's stands for."""
    if isinstance(distribution, Categorical):
        return next(choice for choice in distribution.choices if label(choice) == found)
    return found


def make_sampler(space: Space, number: int) -> BaseSampler:
    """The sampler for trial `number`: its chance depends on seed and number alone, in whichever worker.

    All it knows stands in the storage, so a search that was stopped goes on as if it had not been.
    """
    seed = int(np.random.SeedSequence([space.seed, number]).generate_state(1)[0])
    settings = space.sampler
    if settings.name == "cmaes":
        return CmaEs(space, seed)
    if settings.name == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return TPESampler(
                seed=seed,
                n_startup_trials=settings.startup_trials,
                multivariate=True,
                group=any(distribution.when for distribution in space.space.values()),
            )
    return RandomSampler(seed=seed)


def grid_trials(space: Space) -> list[FrozenTrial]:
    """Every combination as a waiting trial, in an order drawn from the seed."""
    points = {path: grid_values(d, space.sampler.grid_points) for path, d in space.space.items()}
    found = combinations(space.space, points)
    random.Random(space.seed).shuffle(found)
    trials = []
    for values in found:
        kinds: dict[str, BaseDistribution] = {path: as_optuna(space.space[path]) for path in values}
        params = {
            path: label(value) if isinstance(kinds[path], CategoricalDistribution) else value
            for path, value in values.items()
        }
        trials.append(create_trial(state=TrialState.WAITING, params=params, distributions=kinds))
    return trials


class CmaEs(BaseSampler):
    """CMA-ES (Hansen) over the ranges without conditions; the rest, and the start, are random.

    Optuna's own keeps the state of the evolution in the storage as a pickle, and to read one is to run what
    whoever writes to the database put there. This one works the state out anew from the finished trials.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed
        self._random = RandomSampler(seed=seed)
        self.generation: int | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The ranges that every trial has."""
        return {
            path: as_optuna(distribution)
            for path, distribution in self._space.space.items()
            if not isinstance(distribution, Categorical) and not distribution.when
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A draw from the distribution that the finished generations lead to; nothing in the beginning."""
        from cmaes import CMA  # type: ignore[import-untyped]

        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(complete) < self._space.sampler.startup_trials:
            return {}
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
        ranges = {path: self._space.space[path] for path in search_space}
        bounds = np.tile([0.0, 1.0], (len(ranges), 1))
        evolution = CMA(mean=np.full(len(ranges), 0.5), sigma=1 / 6, bounds=bounds, seed=self._space.seed)
        while True:
            born = [t for t in complete if t.user_attrs.get(GENERATION) == evolution.generation]
            if len(born) < evolution.population_size:
                break
            first = sorted(born, key=lambda t: t.number)[: evolution.population_size]
            evolution.tell([(_place(t.params, ranges), sign * float(t.values[0])) for t in first])
        self.generation = evolution.generation
        evolution.reseed_rng(self._seed)
        shares = evolution.ask()
        return {path: _value(ranges[path], float(x)) for path, x in zip(ranges, shares, strict=True)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """At random."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _place(params: Mapping[str, Any], ranges: Mapping[str, AnyDistribution]) -> np.ndarray[Any, Any]:
    """Where values lie in their ranges: 0 at low, 1 at high."""
    found = []
    for path, distribution in ranges.items():
        assert not isinstance(distribution, Categorical)
        low, high, value = (float(x) for x in (distribution.low, distribution.high, params[path]))
        if distribution.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        found.append((value - low) / (high - low))
    return np.array(found)


def _value(distribution: AnyDistribution, share: float) -> int | float:
    """The other way round, on the nearest step."""
    assert not isinstance(distribution, Categorical)
    low, high, step = distribution.low, distribution.high, distribution.step
    value = low * (high / low) ** share if distribution.log else low + share * (high - low)
    if step is not None and not distribution.log:
        return min(on_steps(distribution), key=lambda x: abs(float(x) - value))  # type: ignore[no-any-return]
    value = min(max(value, low), high)
    return value if isinstance(distribution, FloatRange) else round(value)


def make_pruner(pruner: Pruner, first_step: int, last_step: int | None) -> BasePruner:
    """Who stops trials. first_step, last_step: the first validation, and the end where it is known."""
    if pruner.name == "median":
        return MedianPruner(n_startup_trials=pruner.startup_trials, n_warmup_steps=pruner.warmup_steps)
    if pruner.name == "hyperband":
        return HyperbandPruner(
            min_resource=max(1, pruner.warmup_steps, first_step),
            max_resource=last_step or "auto",
            reduction_factor=pruner.reduction,
        )
    if pruner.name == "wilcoxon":
        return CaseWilcoxon(pruner)
    return NopPruner()


class CaseWilcoxon(BasePruner):
    """Stops a trial whose validation cases are worse than the best trial's at the same step.

    One-sided signed-rank test (Wilcoxon 1945) on the differences of the cases, as for two methods on the same
    patients: what makes a case hard is in both. Optuna's pruner of this name takes all values of a trial for
    one sample; here each validation is a test of its own, as the same cases at two steps are not independent.
    With n cases p is at least 2^-n: of fewer than five, none stops a trial at p = 0.05.
    """

    def __init__(self, settings: Pruner) -> None:
        self._settings = settings

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether to stop it now."""
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        counted = [t for t in complete if all(bound <= 0 for bound in t.constraints.values())]
        step = trial.last_step
        enough = len(complete) >= self._settings.startup_trials and counted
        if step is None or step < self._settings.warmup_steps or not enough:
            return False
        best = max(counted, key=lambda t: float(t.values[0]))
        return self.worse(
            trial.user_attrs.get(f"{CASES}/{step}", {}), best.user_attrs.get(f"{CASES}/{step}", {})
        )

    def worse(self, scores: Mapping[str, float], best: Mapping[str, float]) -> bool:
        """Whether the scores of the cases are below those of the best trial, by more than chance."""
        differences: Sequence[float] = [scores[case] - best[case] for case in scores if case in best]
        if len(differences) < LEAST_CASES:
            return False
        p = wilcoxon(differences, alternative="less", zero_method="zsplit").pvalue
        return bool(p < self._settings.p)
