"""What `medattn convert` makes of a published checkpoint: the parts that volumes and images share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medattn import __version__
from medattn.errors import InputError
from medattn_pipelines.config import Section


@dataclass(frozen=True)
class Published:
    """A checkpoint. weights: by the authors' names. sha256: of the file."""

    path: Path
    weights: Mapping[str, Tensor]
    sha256: str

    def provenance(self, source: str) -> dict[str, str]:
        """Where a model came from, for its card."""
        return {"medattn": __version__, "source": source, "file": self.path.name, "sha256": self.sha256}


@dataclass(frozen=True)
class Source:
    """Options are what the weights do not tell. write: fills the folder and returns what to print."""

    options: type[Section]
    write: Callable[[Published, Any, Path], dict[str, str]]


def require_same(found: Tensor, expected: Tensor) -> None:
    """Raise where a model that was read back does not give what the checkpoint's network gives."""
    if not bool(expected.isfinite().all()):
        raise InputError("the network's output is not finite; the checkpoint is damaged, take another one")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
