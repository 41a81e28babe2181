"""Who competes on a problem: this package's implementations, and other ways to the same output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import peers_axial
import peers_block
import peers_crosscov
import peers_lambda
import torch
from shapes import Entry
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from medattn_kernels import axial, block, crosscov, lambdas
from medattn_kernels._select import Impl

OURS = ("naive", "eager", "triton")
PACKAGES = {"axial": axial, "block": block, "lambda": lambdas, "crosscov": crosscov}
OPERATORS: dict[str, Callable[..., Any]] = {
    "axial": axial.axial_attention,
    "block": block.block_attention,
    "lambda": lambdas.lambda_attention,
    "crosscov": crosscov.cross_covariance_attention,
}
PEERS = {"axial": peers_axial, "block": peers_block, "lambda": peers_lambda, "crosscov": peers_crosscov}


@dataclass(frozen=True)
class Candidate:
    """One way to compute an entry.

    run: from the entry's tensors, by name, to the output. without: tables that it cannot take, so that it
    computes less. differs: another way in which its function differs; it is then not compared with ours.
    """

    run: Callable[..., Tensor]
    without: tuple[str, ...] = ()
    differs: str = ""

    @property
    def same_function(self) -> bool:
        """Whether it computes all that the entry asks for."""
        return not (self.without or self.differs)

    @property
    def function(self) -> str:
        """What it computes, in a word or two."""
        without = f"without {' '.join(self.without)}" if self.without else ""
        return ", ".join(filter(None, [without, self.differs])) or "same"


def candidates(entry: Entry) -> dict[str, Candidate | str]:
    """By name, all that can take such a problem; for one that is not installed, the reason."""
    found: dict[str, Candidate | str] = {
        name: Candidate(ours(entry, name)) for name in _implementations(entry)
    }
    found["dense"] = Candidate(bound(entry, "dense"))
    if "compiled" in entry.also:
        found["compiled"] = Candidate(torch.compile(bound(entry, "dense"), dynamic=False))
    if entry.operator in ("axial", "block"):
        found |= _fused(entry)
    return found


def _fused(entry: Entry) -> dict[str, Candidate | str]:
    """Softmax attention of PyTorch and of other packages, which have no room for a value table."""
    found: dict[str, Candidate | str] = {}
    rel_v = ("rel_v",) if "rel_v" in entry.terms else ()
    found["sdpa"] = Candidate(bound(entry, "sdpa"), without=rel_v)
    if "flex" in entry.also:
        attend = torch.compile(flex_attention, dynamic=False)
        found["flex"] = Candidate(bound(entry, "flex", attend=attend), without=rel_v)
    if entry.operator == "block":
        found |= _installed(entry)
    return found


def ours(entry: Entry, impl: str) -> Callable[..., Tensor]:
    """This package's operator with the entry's options; block attention's tables come one by one."""

    def run(q: Tensor, k: Tensor, v: Tensor, **others: Tensor) -> Tensor:
        options: dict[str, Any] = entry.options | {"impl": cast(Impl, impl)}
        if entry.operator == "block":
            options["rel"] = list(others.values()) or None
        else:
            options |= others
        out = OPERATORS[entry.operator](q, k, v, **options)
        assert isinstance(out, Tensor)
        return out

    return run


def _implementations(entry: Entry) -> list[str]:
    """Of this package, those that the operator has and that make sense on the entry's device."""
    has = PACKAGES[entry.operator].IMPLEMENTATIONS
    fits = {"naive": "naive" in entry.also, "eager": True, "triton": entry.device == "cuda"}
    return [name for name in has if fits[name]]


def bound(entry: Entry, name: str, **options: Any) -> Callable[..., Tensor]:
    """A peer in plain torch: `dense`, `sdpa` or `flex`."""
    peer = getattr(PEERS[entry.operator], name)

    def run(**tensors: Tensor) -> Tensor:
        out: Tensor = peer(entry, **tensors, **options)
        return out

    return run


def _installed(entry: Entry) -> dict[str, Candidate | str]:
    """Other packages' block attention, where they are installed and take such a problem."""
    found: dict[str, Candidate | str] = {}
    whole = all(n % entry.block == 0 for n in entry.size)
    if len(entry.size) == 2 and entry.padding == "zero" and entry.terms and whole:
        try:
            found["timm"] = Candidate(peers_block.timm(entry))
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
            found["timm"] = f"not importable: {error}"
    if entry.device == "cuda" and entry.padding == "masked" and min(entry.size) >= entry.window:
        tables = tuple(name for name in entry.shapes() if name.startswith("rel"))
        try:
            found["natten"] = Candidate(peers_block.natten(entry), tables, "windows shifted at borders")
        except ImportError as error:
            found["natten"] = f"not importable: {error}"
    return found
