"""The one repair that needs no judgement: an organ with voxels in the label map was contoured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from medattn.atomic import write_text
from medattn.data.cases import read_cases
from medattn.data.fingerprint import Fingerprint


def complete_contoured(root: str | Path, fingerprints: Iterable[Fingerprint]) -> dict[str, tuple[str, ...]]:
    """Add to `contoured` in `cases.json` every organ that a case's label map holds voxels of.

    fingerprints: from the checkup of this folder. Returns case -> organs added. Every other field of the file
    stays as it is; without anything to add the file is not touched. Raises InputError for malformed entries.
    """
    read_cases(root)
    path = Path(root) / "cases.json"
    present = {f.case: [organ for organ, voxels in f.organ_voxels.items() if voxels] for f in fingerprints}
    entries, added = json.loads(path.read_text(encoding="utf-8")), {}
    for entry in entries:
        if missing := tuple(o for o in present.get(str(entry["case"]), ()) if o not in entry["contoured"]):
            entry["contoured"] += missing
            added[str(entry["case"])] = missing
    if added:
        write_text(path, json.dumps(entries, indent=1) + "\n")
    return added
