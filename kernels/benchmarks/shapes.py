"""The registry: which problems are measured, and the random tensors of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
ALL_TERMS = ("rel_q", "rel_k", "rel_v")


@dataclass(frozen=True)
class Entry:
    """One problem: q, k [batch, *size, heads, width], v [.., value_width] and tables of positions.

    terms: the tables, of `rel_q`, `rel_k` and `rel_v` for axial attention and `rel` (one per axis) for block
    attention. also: implementations that take long to run or compile and are measured only where named here.
    """

    name: str
    operator: Literal["axial", "block"]
    device: Literal["cpu", "cuda"]
    size: tuple[int, ...]
    heads: int
    width: int
    value_width: int
    batch: int = 1
    terms: tuple[str, ...] = ()
    axis: int = 0
    block: int = 1
    halo: int = 0
    padding: Literal["masked", "zero"] = "masked"
    also: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """float32 on a CPU, bfloat16 on a GPU."""
        return DTYPE[self.device]

    @property
    def window(self) -> int:
        """Keys that a query of block attention sees along an axis."""
        return self.block + 2 * self.halo

    @property
    def options(self) -> dict[str, Any]:
        """The operator's arguments besides tensors."""
        if self.operator == "axial":
            return {"axis": self.axis}
        return {"block": self.block, "halo": self.halo, "padding": self.padding}

    @property
    def queries(self) -> int:
        """Of all heads and batch entries."""
        return self.batch * self.heads * math.prod(self.size)

    @property
    def pairs(self) -> int:
        """Query-key pairs whose weight can differ from zero, of all heads and batch entries."""
        if self.operator == "axial":
            return self.queries * self.size[self.axis]
        return self.batch * self.heads * math.prod(self._pairs_along(n) for n in self.size)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor by name; tables have a row for each offset that occurs."""
        inner = (self.batch, *self.size, self.heads)
        found = {"q": (*inner, self.width), "k": (*inner, self.width), "v": (*inner, self.value_width)}
        if self.operator == "block":
            rows = 2 * (self.block + self.halo) - 1
            return found | {f"rel{a}": (rows, self.width) for a in range(len(self.size)) if self.terms}
        rows = 2 * self.size[self.axis] - 1
        widths = {"rel_q": self.width, "rel_k": self.width, "rel_v": self.value_width}
        return found | {term: (rows, widths[term]) for term in self.terms}

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Normal numbers, the same in every call; tables scaled so that no logit term dominates."""
        generator = torch.Generator(self.device).manual_seed(0)
        found = {}
        for name, shape in self.shapes().items():
            x = torch.randn(shape, generator=generator, device=self.device, dtype=dtype or self.dtype)
            found[name] = x * shape[-1] ** -0.5 if name.startswith("rel") else x
        return found

    def small(self) -> Entry:
        """The same kind of problem, done in a moment: a few voxels and narrow heads."""
        return replace(
            self,
            size=(6, 4, 2)[: len(self.size)],
            batch=min(self.batch, 2),
            heads=2,
            width=4,
            value_width=4 * self.value_width // self.width,
            block=min(self.block, 2),
            halo=min(self.halo, 1),
        )

    def __str__(self) -> str:
        where = f"axis {self.axis}" if self.operator == "axial" else f"block {self.block} halo {self.halo}"
        parts = [
            f"{self.operator} {'x'.join(map(str, self.size))}",
            f"batch {self.batch}",
            f"{self.heads} heads",
            f"D {self.width}",
            f"E {self.value_width}",
            where if self.padding == "masked" else f"{where} padded with zeros",
            " ".join(self.terms) or "no position terms",
            str(self.dtype).removeprefix("torch."),
        ]
        return ", ".join(parts)

    def _pairs_along(self, size: int) -> int:
        """Query-key pairs along one axis of block attention."""
        count = 0
        for start in range(0, size, self.block):
            first, last = start - self.halo, start + self.block + self.halo
            keys = last - first if self.padding == "zero" else min(last, size) - max(first, 0)
            count += (min(start + self.block, size) - start) * keys
        return count


def find(name: str) -> Entry:
    """The entry of that name. Raises KeyError."""
    return {entry.name: entry for entry in REGISTRY}[name]


def _volumes() -> Iterator[Entry]:
    """Head-and-neck volumes, 8 heads of 16; Axial-DeepLab's values are twice as wide."""

    def axial(side: int, name: str = "", axis: int = 1, **options: Any) -> Entry:
        size, options = (side,) * 3, {"terms": ALL_TERMS} | options
        return Entry(f"axial-{side}{name}", "axial", "cuda", size, 8, 16, 32, axis=axis, **options)

    def block(side: int, name: str = "", **options: Any) -> Entry:
        size, options = (side,) * 3, {"terms": ("rel",)} | options
        return Entry(f"block-{side}{name}", "block", "cuda", size, 8, 16, 16, block=8, halo=4, **options)

    yield axial(96, also=("compiled", "flex"))
    yield axial(96, "-first-axis", axis=0)
    yield axial(96, "-last-axis", axis=2)
    yield axial(96, "-logit-terms", terms=("rel_q", "rel_k"), also=("flex",))  # all that FlexAttention can do
    yield axial(128, also=("compiled",))
    yield axial(160)
    yield axial(192)
    yield block(96, also=("flex",))
    yield block(96, "-plain", terms=(), also=("flex",))
    yield block(64, also=("compiled", "flex"))  # where the dense forms fit into memory
    yield block(192)


def _stages() -> Iterator[Entry]:
    """Attention layers of published 2D networks, batch 32."""

    def axial(side: int, width: int, also: tuple[str, ...] = ()) -> Entry:
        numbers: dict[str, Any] = {"batch": 32, "terms": ALL_TERMS, "also": also}
        size = (side, side)
        return Entry(f"axial-resnet-{side}", "axial", "cuda", size, 8, width, 2 * width, **numbers)

    def halo(side: int, heads: int, width: int, also: tuple[str, ...] = ()) -> Entry:
        numbers: dict[str, Any] = {"batch": 32, "terms": ("rel",), "padding": "zero", "also": also}
        size = (side, side)
        return Entry(
            f"halonet-{side}", "block", "cuda", size, heads, width, width, block=8, halo=3, **numbers
        )

    # Axial-ResNet-L at 224 x 224: 128 to 1024 channels of values
    yield axial(56, 8, ("compiled",))
    yield axial(28, 16)
    yield axial(14, 32)
    yield axial(7, 64)
    # HaloNet-H0 to H2 at 256 x 256: 64 to 512 channels
    yield halo(64, 4, 16, ("compiled", "flex"))
    yield halo(32, 8, 16)
    yield halo(16, 8, 32)
    yield halo(8, 8, 64)


def _for_cpus() -> Iterator[Entry]:
    """32 output channels and two heads, as in `unet_axial` and `unet_block`; small ones with `naive`."""

    def axial(name: str, side: int, heads: int, width: int, value_width: int) -> Entry:
        numbers: dict[str, Any] = {"axis": 1, "terms": ALL_TERMS, "also": ("naive",)}
        return Entry(f"cpu-axial-{name}", "axial", "cpu", (side,) * 3, heads, width, value_width, **numbers)

    def block(name: str, size: tuple[int, ...], heads: int, **options: Any) -> Entry:
        return Entry(f"cpu-{name}", "block", "cpu", size, heads, 16, 16, terms=("rel",), **options)

    yield axial("64", 64, 2, 8, 16)
    yield axial("64-four-heads", 64, 4, 8, 8)
    yield axial("16", 16, 2, 8, 16)
    yield block("block-64", (64, 64, 64), 2, block=4, halo=2)  # naive would take minutes
    yield block("block-16", (16, 16, 16), 2, block=4, halo=2, also=("naive",))
    yield block("halonet-32", (32, 32), 4, batch=4, block=8, halo=3, padding="zero", also=("naive",))


REGISTRY = (*_volumes(), *_stages(), *_for_cpus())
