"""A search space file becomes a search, or one InputError that lists every problem with its place."""

from __future__ import annotations

import copy
import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from medattn.errors import InputError
from medattn_pipelines.configfile import (
    AnyConfig,
    Loc,
    Source,
    apply_override,
    leaves,
    load_source,
    put,
    read_source,
)
from medattn_pipelines.tuning.space import (
    AnyDistribution,
    Bound,
    Categorical,
    FloatRange,
    IntRange,
    Practice,
    Pruner,
    Sampler,
    Space,
    Values,
    grid_size,
    label,
    ordered,
)

KINDS: dict[str, type[BaseModel]] = {"float": FloatRange, "int": IntRange, "categorical": Categorical}
SECTIONS: dict[str, type[BaseModel]] = {
    "sampler": Sampler,
    "pruner": Pruner,
    "practice": Practice,
    "constraints": Bound,
}
FIXED = ("task", "run.dir", "run.tracking", "run.experiment", "run.parent")  # what a trial does not choose
LARGEST_GRID = 10_000


@dataclass(frozen=True)
class Search:
    """A search space with the config that its trials start from.

    file: knows the lines of the space. base: the config's content, not yet compared with its model. folder:
    where trials and results are kept.
    """

    file: Source
    space: Space
    base: Source
    folder: Path

    @property
    def name(self) -> str:
        """Of the study: the file's stem."""
        return self.file.path.stem

    @property
    def tracking(self) -> bool:
        """Whether MLflow follows."""
        return load_source(self.base).run.tracking

    @property
    def experiment(self) -> str:
        """MLflow's, of the search and all its trials."""
        return str(self._run("experiment", self.name))

    @property
    def parent(self) -> str | None:
        """Key of the run that the search belongs to."""
        found = self._run("parent", None)
        return None if found is None else str(found)

    def _run(self, name: str, default: Any) -> Any:
        found = (self.base.content.get("run") or {}).get(name)
        return default if found is None else found

    def place(self, *loc: int | str) -> str:
        """`file:line` of a part of the space."""
        return self.file.place(loc)

    def config(self, values: Values, run: Path | None = None) -> AnyConfig:
        """The config of a trial. Raises InputError where a value does not fit."""
        content = copy.deepcopy(self.base.content)
        given = list(self.base.overrides)
        for path in sorted(values, key=lambda path: path.count(".")):
            keys, place = tuple(path.split(".")), self.value_place(path, values[path])
            put(content, keys, copy.deepcopy(values[path]), place)
            given.append((place, keys))
        config = load_source(Source(self.base.path, self.base.node, content, given, self.base.problems))
        return config.model_copy(update={"run": config.run.model_copy(update={"dir": run or self.folder})})

    def value_place(self, path: str, value: Any) -> str:
        """Where the space says that a field may have this value."""
        distribution = self.space.space[path]
        if isinstance(distribution, Categorical):
            names = [label(choice) for choice in distribution.choices]
            number = names.index(label(value)) if label(value) in names else 0
            return self.place("space", path, "choices", number)
        ends = {distribution.low: "low", distribution.high: "high"}
        return self.place("space", path, ends[value]) if value in ends else self.place("space", path)


def read_search(path: Path, overrides: Sequence[str] = ()) -> Search:
    """The search in a YAML file; overrides replace fields of its config.

    Everything that can be known without building a network is checked. Raises InputError with one line per
    problem, `file:line: field: what` or `override '...': field: what`.
    """
    file = read_source(path)
    space = _space(file)
    problems = list(file.problems)
    try:
        base, folder = _base(file, space, overrides)
    except InputError as error:
        raise InputError(*problems, *error.problems) from None
    search = Search(file, space, base, folder)
    problems += [*base.problems, *_path_problems(search, overrides), *_condition_problems(search)]
    if not problems:
        try:
            problems += _method_problems(search, load_source(base).task)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*dict.fromkeys(problems))
    return search


def _space(file: Source) -> Space:
    try:
        return Space.model_validate({key: value for key, value in file.content.items() if value is not None})
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise InputError(*file.problems, *(_sentence(file, detail) for detail in details)) from None


def _sentence(file: Source, detail: Any) -> str:
    loc: Loc = detail["loc"]
    model: type[BaseModel] = Space
    if len(loc) > 2 and loc[0] == "space" and loc[2] in KINDS:
        model, loc = KINDS[str(loc[2])], (*loc[:2], *loc[3:])  # the file does not nest by type
    elif len(loc) > 1 and loc[0] in SECTIONS:
        model = SECTIONS[str(loc[0])]
    return f"{file.place(loc)}: {': '.join(map(str, loc))}: {_reason(model, detail, str(loc[-1]))}"


def _reason(model: type[BaseModel], detail: Any, name: str) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(name, model.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(model.model_fields)}"
        return f"unknown field; {hint}"
    if kind == "missing":
        return "missing, but every search needs it" if model is Space else "missing"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind.startswith("union_tag"):  # no such type, or none
        given = detail["input"].get("type") if isinstance(detail["input"], dict) else None
        near = difflib.get_close_matches(str(given), KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(KINDS)}"
        return f"type: {given!r} is no distribution; {hint}" if given else f"type: missing; {hint}"
    if kind == "model_type":
        return f"expected a section of fields (got {detail['input']!r})"
    return f"{detail['msg']} (got {detail['input']!r})"


def _base(file: Source, space: Space, overrides: Sequence[str]) -> tuple[Source, Path]:
    """The config that trials start from, and the folder of the study."""
    given: list[tuple[str, Loc]] = []
    problems: list[str] = []
    if space.base is not None:
        try:
            source = read_source(file.path.parent / space.base)
        except InputError as error:
            place = file.place(("base",))
            raise InputError(*(f"{place}: base: {problem}" for problem in error.problems)) from None
        content = copy.deepcopy(source.content)
        if isinstance(content.get("run"), dict):
            content["run"].pop("dir", None)  # the run folder of the config is not that of the search
        problems += source.problems
    elif space.config:
        nodes = {key.value: value for key, value in file.node.value}
        source, content = Source(file.path, nodes["config"], {}, [], []), {}
    else:
        raise InputError(f"{file.path}: base: missing; name a config file there, or write one as `config:`")
    for path, value in leaves(space.config):
        keys = tuple(path.split("."))
        place = file.place(("config", *keys))
        put(content, keys, copy.deepcopy(value), place)
        given.append((place, keys))
    for override in overrides:
        try:
            given.append((f"override {override!r}", apply_override(content, override)))
        except InputError as error:
            problems += error.problems
    run = content.get("run")
    folder = run.get("dir") if isinstance(run, dict) else None
    kept = Source(source.path, source.node, content, given, problems)
    return kept, Path(str(folder)).expanduser() if folder else Path("runs") / file.path.stem


def _path_problems(search: Search, overrides: Sequence[str]) -> list[str]:
    problems = []
    fixed = {override.partition("=")[0]: override for override in overrides}
    for path in search.space.space:
        place = f"{search.place('space', path)}: space: {path}"
        if not all(path.split(".")):
            problems.append(f"{place}: expected a config path such as training.learning_rate")
        elif path in FIXED:
            problems.append(f"{place}: cannot be searched; give it one value in `config:`")
        elif path in fixed:
            problems.append(
                f"override {fixed[path]!r}: {path} is searched ({search.place('space', path)}); "
                "take it out of the space to fix it"
            )
    return problems


def _condition_problems(search: Search) -> list[str]:
    space, problems = search.space.space, []
    for path, distribution in space.items():
        for parent, wanted in distribution.when.items():
            place = f"{search.place('space', path, 'when', parent)}: space: {path}: when: {parent}"
            if parent not in space:
                near = difflib.get_close_matches(parent, space, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; searched are: {', '.join(space)}"
                problems.append(f"{place}: is not searched{hint}")
            else:
                problems += [
                    f"{place}: never has the value {label(value)}{_possible(space[parent])}"
                    for value in wanted
                    if not _has(space[parent], value)
                ]
    if not problems:
        try:
            ordered(space)
        except ValueError as error:
            problems.append(f"{search.place('space')}: space: {error}: depend on each other in a circle")
    return problems


def _has(distribution: AnyDistribution, value: Any) -> bool:
    if isinstance(distribution, Categorical):
        return label(value) in map(label, distribution.choices)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return numeric and distribution.low <= value <= distribution.high


def _possible(distribution: AnyDistribution) -> str:
    if isinstance(distribution, Categorical):
        return f"; its choices are {', '.join(map(label, distribution.choices))}"
    return f"; it runs from {distribution.low:g} to {distribution.high:g}"


def _method_problems(search: Search, task: str) -> list[str]:
    """What objectives, sampler and pruner cannot do with each other or with the task."""
    space, problems = search.space, []
    natural: Mapping[str, str] = {"score": "maximize"}
    for measure, direction in space.objectives.items():
        if direction != (wanted := natural.get(measure, "minimize")):
            place = search.place("objectives", measure)
            problems.append(f"{place}: objectives: {measure}: {direction} finds the worst; expected {wanted}")
    pruner = f"{search.place('pruner', 'name')}: pruner: name: {space.pruner.name}"
    if space.pruner.name != "none" and list(space.objectives) != ["score"]:
        problems.append(
            f"{pruner}: stops trials by their score, but objectives are {', '.join(space.objectives)}; "
            "make the others constraints, or leave the pruner out"
        )
    if space.pruner.name == "wilcoxon" and task != "volumes":
        problems.append(
            f"{pruner}: compares the Dice of each case, which {task} has not; use median or hyperband"
        )
    if space.practice and task != "volumes":
        problems.append(f"{search.place('practice')}: practice: there are practice cases for volumes alone")
    return problems + _sampler_problems(search)


def _sampler_problems(search: Search) -> list[str]:
    space, name = search.space, search.space.sampler.name
    place = f"{search.place('sampler', 'name')}: sampler: name: {name}"
    if name == "grid" and (size := grid_size(space.space, space.sampler.grid_points)) > LARGEST_GRID:
        return [
            f"{place}: has up to {size} combinations, expected at most {LARGEST_GRID}; "
            "take fewer values, or sampler: {name: tpe}"
        ]
    if name != "cmaes":
        return []
    numbers = [d for d in space.space.values() if not isinstance(d, Categorical) and not d.when]
    problems = []
    if len(numbers) < 2:
        problems.append(f"{place}: needs two ranges of numbers without `when`, found {len(numbers)}; use tpe")
    if len(space.objectives) > 1:
        problems.append(f"{place}: finds the best of one objective, found {len(space.objectives)}; use tpe")
    if importlib.util.find_spec("cmaes") is None:
        problems.append(f"{place}: needs the package cmaes; install it with `pip install cmaes`, or use tpe")
    return problems
