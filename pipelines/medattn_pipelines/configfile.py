"""YAML files and overrides become a config, or one InputError that lists every problem with its place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from medattn.errors import InputError
from medattn_pipelines.config import Config
from medattn_pipelines.imageconfig import ImageConfig
from medattn_pipelines.panopticconfig import PanopticConfig

AnyConfig = Config | ImageConfig | PanopticConfig
TASKS: dict[str, type[AnyConfig]] = {
    "volumes": Config,
    "classification": ImageConfig,
    "panoptic": PanopticConfig,
}

Loc = tuple[int | str, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1 and reads 1e-3 as text; YAML 1.2, and everybody, reads a number."""


class _Dumper(yaml.SafeDumper):
    """Quotes the text "1e-3", which the loader would take for a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a training on volumes in a YAML file, with `a.b=value` overrides applied in order.

    run.dir and run.experiment are filled in. Relative paths in a config are relative to the working
    directory. Raises InputError with one line per problem, `file:line: field: what` or `override '...':
    field: what`.
    """
    config = validated(read_source(Path(path), overrides), Config)
    assert isinstance(config, Config)
    return config


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """The same for whichever task the file names."""
    return load_source(read_source(Path(path), overrides))


def load_source(source: Source) -> AnyConfig:
    """The config in a source, of whichever task it names. Raises InputError as `load` does."""
    task = source.content.get("task", "volumes")
    if task not in TASKS:
        near = difflib.get_close_matches(str(task), TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of: {', '.join(TASKS)}"
        raise InputError(f"{source.place(('task',))}: task: {task!r} is no task{hint}")
    return validated(source, TASKS[task])


@dataclass(frozen=True)
class Source:
    """A file with the overrides applied, and the complaints so far.

    node: knows the file's lines. overrides: where each was given, for people, and the field that it replaces.
    """

    path: Path
    node: yaml.Node
    content: dict[Any, Any]
    overrides: list[tuple[str, Loc]]
    problems: list[str]

    def place(self, loc: Loc) -> str:
        """Where a field was set: `file:line` or the override."""
        place = f"{self.path}:{line_of(self.node, loc)}"
        for given, keys in self.overrides:
            if keys == loc[: len(keys)] or loc == keys[: len(loc)]:
                place = given
        return place


def read_source(path: Path, overrides: Sequence[str] = ()) -> Source:
    """A YAML file with overrides applied, not compared with any model yet. Raises InputError."""
    node, content, problems = _parse(path)
    applied = []
    for override in overrides:
        try:
            applied.append((f"override {override!r}", apply_override(content, override)))
        except InputError as error:
            problems += error.problems
    return Source(path, node, content, applied, problems)


def validated(source: Source, model: type[AnyConfig]) -> AnyConfig:
    """The config in a source. Raises InputError with one line per problem, its place first."""
    problems = list(source.problems)
    try:
        content = {key: value for key, value in source.content.items() if value is not None}
        config = model.model_validate(content)
    except ValidationError as error:
        problems += [_sentence(source, model, detail) for detail in error.errors(include_url=False)]
    if problems:
        raise InputError(*problems)
    stem = source.path.stem
    named = {"dir": config.run.dir or Path("runs") / stem, "experiment": config.run.experiment or stem}
    run = config.run.model_copy(update=named)
    return config.model_copy(update={"run": run})


def dump(config: AnyConfig) -> str:
    """The config as YAML, defaults included; `load` of it gives an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flatten(config: AnyConfig) -> dict[str, Any]:
    """Every field by its dotted path, as overrides spell it: {"training.steps": 20000, ...}."""
    return dict(leaves(config.model_dump(mode="json")))


def explain() -> str:
    """A line per field for help texts, by task: dotted path, default in YAML, description."""
    return "\n\n".join(f"{task}:\n{_explain(model)}" for task, model in TASKS.items())


def _explain(model: type[BaseModel]) -> str:
    lines = []
    for section, outer in model.model_fields.items():
        nested = isinstance(outer.annotation, type) and issubclass(outer.annotation, BaseModel)
        fields = outer.annotation.model_fields if nested else {"": outer}  # type: ignore[union-attr]
        for name, field in fields.items():
            path = f"{section}.{name}".rstrip(".")
            default = (
                "" if field.is_required() else "=" + yaml.safe_dump(field.default, default_flow_style=True)
            )
            lines.append(f"  {path + default.splitlines()[0] if default else path:<40}  {field.description}")
    return "\n".join(lines)


def leaves(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The values in nested sections with their dotted paths."""
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        nested = isinstance(value, dict)
        found += leaves(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return found


def _parse(path: Path) -> tuple[yaml.Node, dict[Any, Any], list[str]]:
    """The file as nodes, which know their lines, as plain values, and the complaints about repeated keys."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        repeated = _repeated_keys(path, node)
        content = None if node is None else loader.construct_document(node)
    except FileNotFoundError:
        known = sorted(str(file) for file in Path("configs").rglob("*.yaml"))
        near = difflib.get_close_matches(str(path), known, n=1) or known
        hint = f"did you mean {' or '.join(near)}?" if near else "and no configs/ folder here"
        raise InputError(f"{path}: no such config; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as a text file ({error})") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply, or an anchor that refers to itself") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"{path}{f':{mark.line + 1}' if mark else ''}: {_not_yaml(error)}") from None
    if node is None:
        raise InputError(f"{path}: empty; a config needs at least `data: {{root: FOLDER}}`")
    if not isinstance(content, dict):
        raise InputError(
            f"{path}:{node.start_mark.line + 1}: expected sections such as `data:`, got {content!r}"
        )
    return node, content, repeated


def _not_yaml(error: yaml.YAMLError) -> str:
    return f"not valid YAML: {getattr(error, 'problem', None) or getattr(error, 'reason', None) or error}"


def _repeated_keys(path: Path, node: yaml.Node | None, prefix: str = "") -> list[str]:
    problems, lines = [], dict[str, int]()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if lines.setdefault(name, line) != line:
            problems.append(f"{path}:{line}: {name}: stands on line {lines[name]} already; keep one of them")
        problems += _repeated_keys(path, value, f"{name}.")
    return problems


def apply_override(content: dict[Any, Any], override: str) -> Loc:
    """Set a field of nested sections as `a.b=value` says; returns its keys. Raises InputError."""
    name, equals, text = override.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(keys):
        raise InputError(f"override {override!r}: expected field=value, such as training.steps=1000")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: {_not_yaml(error)}") from None
    except ValueError as error:
        raise InputError(f"override {override!r}: not valid YAML: {error}") from None
    put(content, keys, value, f"override {override!r}")
    return keys


def put(content: dict[Any, Any], keys: Loc, value: Any, place: str) -> None:
    """Set a field of nested sections, which are made where they are missing.

    Raises InputError, with the place where the value was given, for a section that is a value.
    """
    section = content
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise InputError(f"{place}: {'.'.join(map(str, keys[:depth]))} is a value, not a section")
    section[keys[-1]] = value


def _sentence(source: Source, model: type[BaseModel], detail: Any) -> str:
    loc: Loc = detail["loc"]
    return f"{source.place(loc)}: {'.'.join(map(str, loc))}: {_reason(model, detail)}"


def _reason(config: type[BaseModel], detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        return f"unknown field{_suggestion(config, detail['loc'])}"
    if detail["type"] == "missing" and isinstance(detail["loc"][-1], str):
        return "missing, but every config needs it"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if detail["type"] == "model_type":
        return f"expected a section of fields (got {detail['input']!r})"
    return f"{detail['msg']} (got {detail['input']!r})"


def _suggestion(config: type[BaseModel], loc: Loc) -> str:
    """The nearest field of the same section, or the field of this very name in another one."""
    model: Any = config
    for key in loc[:-1]:
        model = model.model_fields[key].annotation
    near = difflib.get_close_matches(str(loc[-1]), model.model_fields, n=1) or [
        f"{section}.{loc[-1]}"
        for section, field in config.model_fields.items()
        if isinstance(field.annotation, type)
        and issubclass(field.annotation, BaseModel)
        and loc[-1] in field.annotation.model_fields
    ]
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of: {', '.join(model.model_fields)}"


def line_of(node: yaml.Node, loc: Loc) -> int:
    """The line, from 1, of the deepest part of `loc` that the file contains."""
    line = node.start_mark.line + 1
    for part in loc:
        children: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        if isinstance(node, yaml.MappingNode):
            children = {key.value: (key, value) for key, value in node.value}
        elif isinstance(node, yaml.SequenceNode):
            children = {number: (value, value) for number, value in enumerate(node.value)}
        if part not in children:
            break
        key, node = children[part]
        line = key.start_mark.line + 1
    return line
