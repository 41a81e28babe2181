"""The classes of a data set: WordNet ids in sorted order, whose places are the class indices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from medattn.errors import InputError

LISTED = 5  # names in a message; the rest is a number


@dataclass(frozen=True)
class Classes:
    """wnids: sorted, so that a class's index is its place, as in every published ImageNet model.

    names: one per wnid, for people; the wnid itself where none is known.
    """

    wnids: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, wnids: Iterable[str], names: dict[str, str] | None = None) -> Classes:
        """Classes of these wnids in sorted order."""
        ordered = tuple(sorted(set(wnids)))
        return cls(ordered, tuple((names or {}).get(wnid) or wnid for wnid in ordered))

    def __len__(self) -> int:
        return len(self.wnids)

    @cached_property
    def index(self) -> dict[str, int]:
        """wnid -> class index."""
        return {wnid: number for number, wnid in enumerate(self.wnids)}

    def require_count(self, expected: int, where: str) -> None:
        """Raise InputError unless there are `expected` classes, as a network's outputs demand."""
        if len(self) != expected:
            raise InputError(
                f"{where}: {len(self)} classes, expected {expected}; set the network's number of classes to "
                f"{len(self)}, or give the data set that belongs to it"
            )

    def require_all(self, found: Iterable[int], where: str) -> None:
        """Raise InputError with the classes that have no image among `found` class indices."""
        present = set(found)
        missing = [wnid for number, wnid in enumerate(self.wnids) if number not in present]
        if missing:
            raise InputError(
                f"{where}: no image of {len(missing)} of {len(self)} classes ({listed(missing)}), expected "
                "every class; add their images, or allow a part of the classes"
            )

    def require_known(self, wnids: Iterable[str], where: str) -> None:
        """Raise InputError with those wnids that are no class."""
        unknown = sorted(set(wnids) - set(self.wnids))
        if unknown:
            raise InputError(
                f"{where}: {len(unknown)} wnids that are not among the {len(self)} classes "
                f"({listed(unknown)}), expected those of the training set; remove them or give the class "
                "list that has them"
            )


def read_classes(path: str | Path) -> Classes:
    """A class list: text with a line `wnid name` per class (LOC_synset_mapping.txt), or JSON {wnid: name}.

    Raises InputError for a file that holds neither, and for a wnid that is listed twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        pairs = _from_json(text) if path.suffix == ".json" else _from_lines(text)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: no class list ({error}), expected lines `wnid name` or JSON {{wnid: name}}; correct "
            "the file"
        ) from error
    wnids = [wnid for wnid, _ in pairs]
    if twice := sorted(
        {wnid for wnid in wnids if wnids.count(wnid) > 1} if len(set(wnids)) < len(wnids) else ()
    ):
        raise InputError(f"{path}: wnids listed twice ({listed(twice)}), expected each once; remove a line")
    return Classes.of(wnids, dict(pairs))


def listed(names: Sequence[str]) -> str:
    """The first few names and how many follow.

    >>> listed(["a", "b", "c", "d", "e", "f", "g"])
    'a, b, c, d, e and 2 more'
    """
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _from_lines(text: str) -> list[tuple[str, str]]:
    pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    if not pairs:
        raise ValueError("empty file")
    return [(pair[0], pair[1].strip() if len(pair) > 1 else "") for pair in pairs]


def _from_json(text: str) -> list[tuple[str, str]]:
    found = json.loads(text)
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise ValueError("no object of strings")
    return list(found.items())
