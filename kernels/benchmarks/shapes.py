"""A problem to measure: an operator, the shapes of its tensors, and random numbers for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
ALL_TERMS = ("rel_q", "rel_k", "rel_v")


@dataclass(frozen=True)
class Entry:
    """One problem: q, k [batch, *size, heads, width], v [.., value_width], and what else its operator takes.

    In lambda attention k and v have `depth` in the place of heads. Cross-covariance attention has one factor
    per head beside q, k and v.

    terms: the tables of positions: of `rel_q`, `rel_k` and `rel_v` for axial attention, `rel` (one per axis)
    for block attention, `table` for lambda attention. scope: rows of that table along each axis; 0 has a row
    for every offset. also: implementations that take long to run or compile and are measured only where named
    here.
    """

    name: str
    operator: Literal["axial", "block", "lambda", "crosscov"]
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
    depth: int = 1
    scope: int = 0
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
    def table(self) -> tuple[int, ...]:
        """Rows of lambda attention's table along each axis."""
        return tuple(self.scope or 2 * n - 1 for n in self.size)

    @property
    def options(self) -> dict[str, Any]:
        """The operator's arguments besides tensors."""
        if self.operator == "axial":
            return {"axis": self.axis}
        if self.operator == "block":
            return {"block": self.block, "halo": self.halo, "padding": self.padding}
        return {}

    @property
    def positions(self) -> int:
        """Of all batch entries."""
        return self.batch * math.prod(self.size)

    @property
    def queries(self) -> int:
        """Of all heads and batch entries."""
        return self.heads * self.positions

    @property
    def pairs(self) -> int:
        """Pairs that are seen: of a query and a key whose weight can differ from zero, of all heads and batch
        entries; in lambda attention of two positions with a table entry, which all heads share.
        """
        if self.operator == "axial":
            return self.queries * self.size[self.axis]
        if self.operator == "lambda":
            near = (_pairs_within(n, rows // 2) for n, rows in zip(self.size, self.table, strict=True))
            return self.batch * math.prod(near) if self.terms else 0
        return self.batch * self.heads * math.prod(self._pairs_along(n) for n in self.size)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor by name; tables have a row for each offset that occurs."""
        inner = (self.batch, *self.size)
        kv = (*inner, self.depth if self.operator == "lambda" else self.heads)
        found = {"q": (*inner, self.heads, self.width), "k": (*kv, self.width), "v": (*kv, self.value_width)}
        if self.operator == "crosscov":
            return found | {"temperature": (self.heads,)}
        if self.operator == "lambda":
            return found | dict.fromkeys(self.terms, (*self.table, self.depth, self.width))
        if self.operator == "block":
            rows = 2 * (self.block + self.halo) - 1
            return found | {f"rel{a}": (rows, self.width) for a in range(len(self.size)) if self.terms}
        rows = 2 * self.size[self.axis] - 1
        widths = {"rel_q": self.width, "rel_k": self.width, "rel_v": self.value_width}
        return found | {term: (rows, widths[term]) for term in self.terms}

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Normal numbers, the same in every call; tables scaled so that no term dominates.

        Factors of heads stay float32, as parameters do under autocast.
        """
        dtype = dtype or self.dtype
        generator = torch.Generator(self.device).manual_seed(0)
        found = {}
        for name, shape in self.shapes().items():
            of = torch.promote_types(dtype, torch.float32) if name == "temperature" else dtype
            x = torch.randn(shape, generator=generator, device=self.device, dtype=of)
            found[name] = x * shape[-1] ** -0.5 if name.startswith(("rel", "table")) else x
        return found

    def gradient(self, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers for the gradient of the output."""
        shape = (self.batch, *self.size, self.heads, self.value_width)
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def small(self) -> Entry:
        """The same kind of problem, done in a moment: a few voxels and narrow heads."""
        return replace(
            self,
            size=(6, 4, 2)[: len(self.size)],
            batch=min(self.batch, 2),
            heads=2,
            width=4,
            value_width=max(1, 4 * self.value_width // self.width),
            block=min(self.block, 2),
            halo=min(self.halo, 1),
            depth=min(self.depth, 2),
            scope=min(self.scope, 3),
        )

    def __str__(self) -> str:
        parts = [
            f"{self.operator} {'x'.join(map(str, self.size))}",
            f"batch {self.batch}",
            f"{self.heads} heads",
            f"D {self.width}",
            f"E {self.value_width}",
            *self._own(),
            str(self.dtype).removeprefix("torch."),
        ]
        return ", ".join(parts)

    def _own(self) -> list[str]:
        """What only this operator has, in words."""
        if self.operator == "crosscov":
            return []
        if self.operator == "lambda":
            table = f"table {'x'.join(map(str, self.table))}" if self.terms else "content only"
            return [f"U {self.depth}", table]
        where = f"axis {self.axis}" if self.operator == "axial" else f"block {self.block} halo {self.halo}"
        return [
            where if self.padding == "masked" else f"{where} padded with zeros",
            " ".join(self.terms) or "no position terms",
        ]

    def _pairs_along(self, size: int) -> int:
        """Query-key pairs along one axis of block attention."""
        count = 0
        for start in range(0, size, self.block):
            first, last = start - self.halo, start + self.block + self.halo
            keys = last - first if self.padding == "zero" else min(last, size) - max(first, 0)
            count += (min(start + self.block, size) - start) * keys
        return count


def from_plain(problem: dict[str, Any]) -> Entry:
    """The entry of its fields as JSON holds them."""
    return Entry(**{name: tuple(x) if isinstance(x, list) else x for name, x in problem.items()})


def _pairs_within(size: int, reach: int) -> int:
    """Pairs of places of an axis that are at most so far apart."""
    return sum(min(place + reach, size - 1) - max(place - reach, 0) + 1 for place in range(size))
