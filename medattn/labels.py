"""Label sets: what an organ is called, its side, code, colour and contour tolerance.

One YAML file drives name mapping on import, training channels, left-right flips, metric tolerances, colours
and the terminology of exported segmentations.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from medattn.errors import InputError

PACKAGED = Path(__file__).parent / "label_sets"


@dataclass(frozen=True)
class Organ:
    """One structure. Names follow TG-263.

    aliases: other spellings seen in hospitals. code, meaning: SNOMED CT of the structure without its side.
    side: "left", "right" or None. pair: the name of the mirror structure. color: RGB, 0 to 255.
    tolerance_mm: surface distance that experts disagree by; tolerance_source: where it comes from.
    """

    name: str
    aliases: tuple[str, ...] = ()
    code: str | None = None
    meaning: str | None = None
    color: tuple[int, int, int] = (128, 128, 128)
    side: str | None = None
    pair: str | None = None
    tolerance_mm: float | None = None
    tolerance_source: str | None = None


@dataclass(frozen=True)
class LabelSet:
    """Organs by name and alias; spelling is compared without case, spaces and punctuation."""

    name: str
    organs: tuple[Organ, ...]

    def __post_init__(self) -> None:
        if problems := _problems(self.organs):
            raise InputError(*(f"label set {self.name}: {problem}" for problem in problems))

    @classmethod
    def load(cls, name_or_path: str | Path = "hn_oar") -> LabelSet:
        """A packaged label set by name, or one of your own by the path of its YAML file."""
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = PACKAGED / f"{name_or_path}.yaml"
        if not path.is_file():
            packaged = ", ".join(sorted(p.stem for p in PACKAGED.glob("*.yaml")))
            raise InputError(f"{name_or_path}: no such label set; give a YAML file or one of: {packaged}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls(path.stem, tuple(_organ(entry) for entry in content["organs"]))
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a label set: {error}") from None

    def find(self, name: str) -> Organ | None:
        """The organ of this name or alias, or None."""
        return self._by_key.get(_key(name))

    def describe(self, name: str) -> Organ:
        """The organ of this name or alias; for an unknown name a bare organ that carries the name only."""
        return self.find(name) or Organ(name)

    def resolve(self, names: Iterable[str]) -> tuple[Organ, ...]:
        """The organs of these names. Raises InputError with every unknown name and the nearest known one."""
        names = tuple(names)
        if problems := [self._unknown(name) for name in names if self.find(name) is None]:
            raise InputError(*problems)
        return tuple(self.describe(name) for name in names)

    def mirror(self, names: Sequence[str]) -> tuple[int, ...]:
        """For each name, the position of what it becomes when left and right are swapped.

        An organ whose pair is not among the names stays where it is only if it has no side; a lone left
        organ would turn into a right one that the list lacks, which raises InputError.
        """
        organs = self.resolve(names)
        position = {organ.name: number for number, organ in enumerate(organs)}
        if lonely := [
            organ.name for organ in organs if organ.pair is not None and organ.pair not in position
        ]:
            raise InputError(
                *(f"{name} has a side, but its pair is not among {list(names)}" for name in lonely)
            )
        return tuple(position[organ.pair or organ.name] for organ in organs)

    @cached_property
    def _by_key(self) -> dict[str, Organ]:
        return {_key(name): organ for organ in self.organs for name in (organ.name, *organ.aliases)}

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(_key(name), self._by_key, n=1)
        hint = f"; did you mean {self._by_key[near[0]].name!r}?" if near else ""
        return (
            f"organ {name!r} is not in label set {self.name}{hint} (add it or an alias to a label-set YAML)"
        )


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _organ(entry: dict[str, Any]) -> Organ:
    color = tuple(int(c) for c in entry.pop("color", (128, 128, 128)))
    aliases = tuple(str(alias) for alias in entry.pop("aliases", ()))
    code = entry.pop("code", None)
    return Organ(
        color=(color[0], color[1], color[2]),
        aliases=aliases,
        code=None if code is None else str(code),
        **entry,
    )


def _problems(organs: Sequence[Organ]) -> list[str]:
    problems, owner = [], dict[str, str]()
    by_name = {organ.name: organ for organ in organs}
    for organ in organs:
        for name in (organ.name, *organ.aliases):
            if owner.setdefault(_key(name), organ.name) != organ.name:
                problems.append(f"{name!r} belongs to {owner[_key(name)]} and to {organ.name}")
        if (organ.side is None) != (organ.pair is None) or organ.side not in (None, "left", "right"):
            problems.append(
                f"{organ.name}: side {organ.side!r} and pair {organ.pair!r}; "
                "expected left or right and a pair, or neither"
            )
        elif organ.pair is not None:
            pair = by_name.get(organ.pair)
            if pair is None or pair.pair != organ.name or pair.side == organ.side:
                problems.append(
                    f"{organ.name}: its pair {organ.pair} must exist, name it back and lie on the other side"
                )
    return problems
