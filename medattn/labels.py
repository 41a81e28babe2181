"""Label sets: what an organ is called, its side, code, colour and contour tolerance.

One YAML file drives name mapping on import, training channels, left-right flips, metric tolerances, colours
and the terminology of exported segmentations.
"""

from __future__ import annotations

import dataclasses
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
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
        entries = content.get("organs") if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{path}: not a label set; expected `organs:` followed by a list of organs")
        if problems := [p for number, entry in enumerate(entries) for p in _entry_problems(number, entry)]:
            raise InputError(*(f"{path}: {problem}" for problem in problems))
        return cls(path.stem, tuple(_organ(entry) for entry in entries))

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

        An organ without a side stays where it is. A lone left organ would turn into a right one that the list
        lacks, and an organ named twice into either of the two: both raise InputError.
        """
        organs = self.resolve(names)
        position = {organ.name: number for number, organ in enumerate(organs)}
        problems = [
            f"{organ.name} has a side, but its pair {organ.pair} is not among {list(names)}"
            for organ in organs
            if organ.pair is not None and organ.pair not in position
        ] + [
            f"{name!r} and {names[position[organ.name]]!r} are the same organ, {organ.name}"
            for number, (name, organ) in enumerate(zip(names, organs, strict=True))
            if position[organ.name] != number
        ]
        if problems:
            raise InputError(*problems)
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


def _spellings(stem: str, side: str) -> list[str]:
    """Parotid, left -> Parotid left, Parotid Lt, Parotid L, left Parotid, Lt Parotid, L Parotid."""
    sides = (side, f"{side[0]}t", side[0])
    return [f"{stem} {word}" for word in sides] + [f"{word} {stem}" for word in sides]


def _organ(entry: dict[str, Any]) -> Organ:
    fields = {key: value for key, value in entry.items() if key != "stems"}
    stems = [spelling for stem in entry.get("stems", ()) for spelling in _spellings(stem, entry["side"])]
    fields["aliases"] = (*entry.get("aliases", ()), *stems)
    if "color" in entry:
        fields["color"] = tuple(entry["color"])
    return Organ(**fields)


def _entry_problems(number: int, entry: dict[str, Any]) -> list[str]:
    """What is wrong with the form of one entry of a label-set file."""
    name = entry.get("name")
    if not isinstance(name, str) or not _key(name):
        return [f"organ number {number + 1} has name {name!r}; expected a text with letters or digits"]
    known = {field.name for field in dataclasses.fields(Organ)} | {"stems"}
    problems = [
        f"{name}: unknown key {key!r}; expected one of {sorted(known)}" for key in entry if key not in known
    ]
    for key in ("aliases", "stems"):
        texts = entry.get(key, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) and _key(text) for text in texts):
            problems.append(f"{name}: {key} {texts!r}; expected a list of names")
    if entry.get("stems") and entry.get("side") not in ("left", "right"):
        problems.append(
            f"{name}: stems are completed with a side, but the organ has side {entry.get('side')!r}"
        )
    for key in ("code", "meaning", "side", "pair", "tolerance_source"):
        if not isinstance(entry.get(key), str | None):
            problems.append(
                f"{name}: {key} {entry[key]!r}; expected a text (in quotes where it looks like a number)"
            )
    color = entry.get("color", [0, 0, 0])
    if (
        not isinstance(color, list)
        or len(color) != 3
        or not all(isinstance(c, int) and 0 <= c <= 255 for c in color)
    ):
        problems.append(f"{name}: color {color!r}; expected three whole numbers from 0 to 255")
    tolerance = entry.get("tolerance_mm")
    if tolerance is not None and not (isinstance(tolerance, int | float) and 0 < tolerance < 100):
        problems.append(f"{name}: tolerance_mm {tolerance!r}; expected millimetres, above 0 and below 100")
    return problems


def _problems(organs: Sequence[Organ]) -> list[str]:
    by_name = {organ.name: organ for organ in organs}
    names = [organ.name for organ in organs]
    problems = [
        f"organ {name} is listed {names.count(name)} times" for name in by_name if names.count(name) > 1
    ]
    owner = dict[str, str]()
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
