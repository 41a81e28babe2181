"""What a search can be told: frozen models of a search space file, and the values a trial may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from medattn_pipelines.config import FilePath, Section

Measure = Literal["score", "latency", "memory", "parameters"]
Direction = Literal["maximize", "minimize"]
UNITS: dict[Measure, str] = {
    "score": "best validation score",
    "latency": "ms per forward pass of one patch or image",
    "memory": "MiB at the peak of training",
    "parameters": "weights of the network",
}
Values = Mapping[str, Any]  # dotted config path -> value; a path that is not active is absent


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class Distribution(Section):
    """What every kind has in common."""

    when: dict[str, Annotated[Any, AfterValidator(_listed)]] = Field(
        default={}, description="Searched only where each of these other fields has one of these values"
    )


class _Range(Distribution):
    log: bool = Field(default=False, description="Draw the logarithm evenly")

    @model_validator(mode="after")
    def _ordered(self) -> _Range:
        low, high, step = (getattr(self, name) for name in ("low", "high", "step"))
        if low >= high:
            raise ValueError(f"expected low below high, got low {low:g} and high {high:g}")
        if self.log and low <= 0:
            raise ValueError(f"expected low above 0 with log: true, got {low:g}")
        if self.log and step is not None and step != 1:
            raise ValueError("log and step exclude each other; leave one of them out")
        if step is not None and step > high - low:
            raise ValueError(f"expected a step of at most high - low = {high - low:g}, got {step:g}")
        return self


class FloatRange(_Range):
    """Numbers from low to high."""

    type: Literal["float"]
    low: float = Field(description="Smallest value")
    high: float = Field(description="Largest value")
    step: float | None = Field(default=None, gt=0, description="Distance between values; null = any")


class IntRange(_Range):
    """Whole numbers from low to high."""

    type: Literal["int"]
    low: int = Field(description="Smallest value")
    high: int = Field(description="Largest value")
    step: int = Field(default=1, ge=1, description="Distance between values")


class Categorical(Distribution):
    """One of some values, of any kind that YAML can write."""

    type: Literal["categorical"]
    choices: list[Any] = Field(min_length=2, description="The values")

    @model_validator(mode="after")
    def _distinct(self) -> Categorical:
        names = [label(choice) for choice in self.choices]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"every choice once, got {', '.join(twice)} more than once")
        return self


AnyDistribution = FloatRange | IntRange | Categorical


def _type_of(content: Any) -> str | None:
    found = content.get("type") if isinstance(content, dict) else getattr(content, "type", None)
    return None if found is None else str(found)


# a function tells them apart: a field that validators look at first cannot
_Tagged = Annotated[
    Annotated[FloatRange, Tag("float")]
    | Annotated[IntRange, Tag("int")]
    | Annotated[Categorical, Tag("categorical")],
    Discriminator(_type_of),
]


def label(choice: Any) -> str:
    """A choice as text, as YAML writes it on one line: what a storage keeps and people read.

    >>> label([0, 1]), label(True), label("axial")
    ('[0, 1]', 'true', 'axial')
    """
    text = yaml.safe_dump(choice, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("...\n").strip()


class Sampler(Section):
    """Who proposes the values of a trial."""

    name: Literal["tpe", "cmaes", "random", "grid"] = Field(
        default="tpe",
        description="tpe: multivariate Parzen estimators; cmaes: evolution, of numbers; grid: all values",
    )
    startup_trials: int = Field(default=10, ge=1, description="Random trials before tpe or cmaes propose")
    grid_points: int = Field(
        default=3, ge=2, le=100, description="Values that grid takes of a range without steps"
    )


class Pruner(Section):
    """Who stops trials that fall behind, at their validations."""

    name: Literal["none", "median", "hyperband", "wilcoxon"] = Field(
        default="none",
        description="median: below the others'; hyperband: by halving; wilcoxon: cases compared in pairs",
    )
    startup_trials: int = Field(
        default=5, ge=1, description="Complete trials before median or wilcoxon stop one"
    )
    warmup_steps: int = Field(default=0, ge=0, description="Training steps before any trial is stopped")
    p: float = Field(default=0.05, gt=0, lt=1, description="wilcoxon: stop below this probability")
    reduction: int = Field(default=3, ge=2, le=10, description="hyperband: one of so many goes on")


class Bound(Section):
    """What a trial must keep to count."""

    at_most: float | None = Field(default=None, description="Largest value")
    at_least: float | None = Field(default=None, description="Smallest value")

    @model_validator(mode="after")
    def _one(self) -> Bound:
        if self.at_most is None and self.at_least is None:
            raise ValueError("expected at_most or at_least, got neither")
        return self


class Practice(Section):
    """Practice cases, written to data.root where there is nothing: for searches that show how it is done."""

    cases: int = Field(default=8, ge=2, le=1000, description="How many")
    size: int = Field(default=48, ge=16, le=512, description="Voxels per axis in plane")
    seed: int = Field(default=0, ge=0, description="Of the patients")


class Space(Section):
    """A search. `spacefile.read_search` reads one from YAML."""

    base: FilePath | None = Field(default=None, description="Config file that all trials start from")
    config: dict[str, Any] = Field(
        default={}, description="Fields that replace those of base; or all of them"
    )
    space: dict[str, _Tagged] = Field(min_length=1, description="Dotted config path -> distribution")
    objectives: dict[Measure, Direction] = Field(
        default={"score": "maximize"}, min_length=1, description="What is best: measure -> direction"
    )
    constraints: dict[Measure, Bound] = Field(default={}, description="Measure -> at_most or at_least")
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
    trials: int | None = Field(
        default=None, ge=1, description="Complete trials of the whole study; null = 50, or the whole grid"
    )
    timeout_minutes: float | None = Field(
        default=None, gt=0, description="A worker starts no trial after so long; null = no limit"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of the sampler")
    practice: Practice | None = Field(default=None, description="Practice cases where data.root is missing")


def ordered(space: Mapping[str, AnyDistribution]) -> list[str]:
    """The paths, each after those that its `when` names. Raises ValueError with the paths of a circle."""
    done: list[str] = []
    left = list(space)
    while left:
        ready = [path for path in left if all(parent in done for parent in space[path].when)]
        if not ready:
            raise ValueError(", ".join(left))
        done += ready
        left = [path for path in left if path not in ready]
    return done


def is_active(distribution: AnyDistribution, values: Values) -> bool:
    """Whether it is searched where the fields that it depends on have these values."""
    return all(
        parent in values and label(values[parent]) in map(label, wanted)
        for parent, wanted in distribution.when.items()
    )


def extremes(distribution: AnyDistribution) -> list[Any]:
    """Both ends of a range, or every choice."""
    if isinstance(distribution, Categorical):
        return list(distribution.choices)
    return [distribution.low, distribution.high]


def grid_values(distribution: AnyDistribution, points: int) -> list[Any]:
    """Every choice, every step, or `points` values spread evenly (in the logarithm if `log`)."""
    if isinstance(distribution, Categorical):
        return list(distribution.choices)
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is not None and not distribution.log:
        return on_steps(distribution)
    shares = [n / (points - 1) for n in range(points)]
    spread = [low * (high / low) ** s if distribution.log else low + s * (high - low) for s in shares]
    spread[-1] = high
    return sorted({round(x) for x in spread}) if isinstance(distribution, IntRange) else spread


def on_steps(distribution: FloatRange | IntRange) -> list[Any]:
    """Every value of a range with steps, as decimals add up: 0, 0.3, 0.6, 0.9."""
    low, high, step = (Decimal(str(x)) for x in (distribution.low, distribution.high, distribution.step))
    values = [low + n * step for n in range(int((high - low) / step) + 1)]
    return [int(x) if isinstance(distribution, IntRange) else float(x) for x in values]


def combinations(
    space: Mapping[str, AnyDistribution], values_of: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """Every combination of these values, each once: a path that is not active does not multiply them."""
    found: list[dict[str, Any]] = [{}]
    for path in ordered(space):
        found = [
            {**values, path: value} if is_active(space[path], values) else values
            for values in found
            for value in (values_of[path] if is_active(space[path], values) else (None,))
        ]
    return found


def grid_size(space: Mapping[str, AnyDistribution], points: int) -> int:
    """How many combinations a grid has at most, conditions aside."""
    size = 1
    for distribution in space.values():
        size *= len(grid_values(distribution, points))
    return size


def explain_space() -> str:
    """A line per field for help texts: path, default in YAML, description."""
    sections: dict[str, type[Section]] = {
        "": Space,
        "space.PATH (type: float).": FloatRange,
        "space.PATH (type: int).": IntRange,
        "space.PATH (type: categorical).": Categorical,
        "sampler.": Sampler,
        "pruner.": Pruner,
        "constraints.MEASURE.": Bound,
        "practice.": Practice,
    }
    lines = []
    for prefix, model in sections.items():
        for name, field in model.model_fields.items():
            default = field.default
            shown = "" if field.is_required() or isinstance(default, Section) else f"={label(default)}"
            if name != "type" and not (prefix == "" and name in ("sampler", "pruner")):
                lines.append(f"  {prefix + name + shown:<44}  {field.description}")
    lines += [f"  {'measure ' + name:<44}  {unit}" for name, unit in UNITS.items()]
    return "\n".join(lines)
