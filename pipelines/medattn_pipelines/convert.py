"""`medattn convert`: weights that others published become a model folder, whole or not at all.

A source is its options and a function that writes the folder, so that volumes and images can have a model
card each. The function gets the weights under the authors' names and maps them to ours.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from medattn.atomic import atomic_folder
from medattn.errors import InputError
from medattn.weights import read_weights
from medattn_pipelines.config import Section
from medattn_pipelines.convert_images import IMAGE_SOURCES
from medattn_pipelines.convert_source import Published, Source
from medattn_pipelines.convert_volumes import BlockUNetOptions, write_block_unet

SOURCES: dict[str, Source] = {
    "cerr-block-unet": Source(BlockUNetOptions, write_block_unet),
    **IMAGE_SOURCES,
}


def convert(
    source: str, checkpoint: Path, out: Path, options: Mapping[str, Any], overrides: Sequence[str] = ()
) -> dict[str, str]:
    """Write a model folder from a published checkpoint; returns what came out, by headings.

    source: one of SOURCES. out: a folder that does not exist or is empty. options: of that source;
    overrides: the same as `option=value`, the value in YAML. Raises InputError for what is wrong with either,
    for a checkpoint that cannot be read or is of another architecture; then nothing is written.
    """
    chosen = _validated(source, dict(options) | dict(_parse(text) for text in overrides))
    with atomic_folder(out) as folder:
        weights = read_weights(checkpoint)
        with checkpoint.open("rb") as file:
            published = Published(checkpoint, weights, hashlib.file_digest(file, "sha256").hexdigest())
        rows = SOURCES[source].write(published, chosen, folder)
    return {**rows, "model": str(out)}


def _parse(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"{text!r}: expected option=value, such as placement=last")
    try:
        return name, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise InputError(f"{text!r}: the value is not valid YAML") from None


def _validated(source: str, given: Mapping[str, Any]) -> Section:
    """The source's options. Raises InputError with a sentence per problem."""
    kind = SOURCES[source].options
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False):
            name = ".".join(map(str, detail["loc"]))
            near = difflib.get_close_matches(name, kind.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"its options are {', '.join(kind.model_fields)}"
            reason = str(detail.get("ctx", {}).get("error") or f"{detail['msg']} (got {detail['input']!r})")
            if detail["type"] == "extra_forbidden":
                reason = f"{source} has no such option; {hint}"
            problems.append(f"option {name}: {reason}")
        raise InputError(*problems) from None
