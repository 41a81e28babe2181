"""The two files of a device: what was measured before is kept, unless measured anew or out of date."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from registry import REGISTRY
from report import LEGEND, Result, as_json, document, from_json
from shapes import from_plain


def path_for(folder: Path, device: str) -> Path:
    """Of both files, without their ending."""
    return folder / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def earlier(path: Path, about: dict[str, Any]) -> list[Result]:
    """The results in the file that still hold: of the same software, and of problems as they are now."""
    file = path.with_suffix(".json")
    if not file.exists():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    if any(found["machine"].get(key) != value for key, value in about.items() if key != "date"):
        print(f"{file.name}: measured with other versions or threads; begun anew", file=sys.stderr)
        return []
    entries = {entry.name: entry for entry in REGISTRY}
    kept = []
    for name, result in found["entries"].items():
        problem = {field: x for field, x in result["problem"].items() if field != "dtype"}
        if name in entries and from_plain(problem) == entries[name]:
            result.setdefault("date", found["machine"]["date"])
            kept.append(from_json(entries[name], result))
        else:
            print(
                f"{file.name}: {name} is no longer the problem that was measured; left out", file=sys.stderr
            )
    return kept


def write(path: Path, about: dict[str, Any], results: Iterable[Result]) -> None:
    """Both files, problems in the order of the registry; of two results for one the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    latest = {result.entry.name: result for result in results}
    ordered = [latest[entry.name] for entry in REGISTRY if entry.name in latest]
    entries = {result.entry.name: as_json(result) for result in ordered}
    text = json.dumps({"machine": about, "legend": LEGEND, "entries": entries}, indent=1)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(document(about, ordered), encoding="utf-8")
