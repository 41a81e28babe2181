"""Block attention through Triton: the operator as torch knows it, and the launches behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from medattn_kernels._launch import at, padded
from medattn_kernels.block.tiling import Tiles, Tiling, cut, table_row

Triple = tuple[int, ...]

LONGEST_WINDOW = 128  # along an axis: its position terms stay in registers
QUERIES, KEYS = 64, 64  # per tile; fewer for wide heads, long windows or a bias, which need more registers
FEWEST_QUERIES = 16  # of a tile; blocks of fewer are joined
SCRATCH = 0.125  # of inputs, outputs and gradients: position terms that the two backward passes share
PROGRAMS, FEWEST_PROGRAMS = 1024, 128  # of passes that sum over blocks: some per multiprocessor, or one
SUMS = 2**23  # numbers, above which there are fewer programs
ABSENT = Tiling(size=1, blocks=1, block=1, stride=1, before=0, window=1, step=1)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: tuple[int, ...],
    halo: tuple[tuple[int, int], ...],
    rel: tuple[Tensor, ...] | None,
    bias: Tensor | None,
    stride: tuple[int, ...],
    scale: float,
    masked: bool,
    step: tuple[int, ...] | None = None,
) -> Tensor:
    """`medattn_kernels.block_attention` in float32, bfloat16 or float16, differentiable once.

    step: between neighbouring queries as offsets count them, the stride if None.
    """
    tables = (None, None, None) if rel is None else (*[None] * (3 - len(rel)), *rel)
    sides = [side for pair in halo for side in pair]
    out: Tensor = _attention(q, k, v, *tables, bias, block, sides, stride, step or stride, scale, masked)[0]
    return out


def refusal(size: Sequence[int], block: Sequence[int], halo: Sequence[tuple[int, int]], masked: bool) -> str:
    """Why the kernels cannot take these windows together with `rel`; empty if they can."""
    longest = max(cut(n, b, h, 1, masked).window for n, b, h in zip(size, block, halo, strict=True))
    if longest <= LONGEST_WINDOW:
        return ""
    return f"takes windows of at most {LONGEST_WINDOW} positions per axis beside rel, got {longest}"


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel0: Tensor | None,
    rel1: Tensor | None,
    rel2: Tensor | None,
    bias: Tensor | None,
    block: Sequence[int],
    halo: Sequence[int],
    stride: Sequence[int],
    step: Sequence[int],
    scale: float,
    masked: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, *ceil(size / stride), H, E], and [.., H, 2] as `tiles.store_norm` writes it."""
    from medattn_kernels.block import kernel

    out, norm = _empty(q, v, stride)
    if q.numel():
        launch = _Launch(q, v, (rel0, rel1, rel2), bias, block, halo, stride, step, scale, masked)
        grid = (launch.items * launch.heads * launch.tiles,)
        launch.run(kernel.forward, grid, *launch.inputs(q, k, v), at(out), at(norm))
    return out, norm


def run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel0: Tensor | None,
    rel1: Tensor | None,
    rel2: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    norm: Tensor,
    block: Sequence[int],
    halo: Sequence[int],
    stride: Sequence[int],
    step: Sequence[int],
    scale: float,
    masked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the tables and the bias; empty for what is not there."""
    from medattn_kernels.block import kernel

    rel = (rel0, rel1, rel2)
    dq, dk, dv, *drel, dbias = _empty_gradients(q, k, v, *rel, bias)
    if not q.numel():
        drel0, drel1, drel2 = (x.zero_() for x in drel)
        return dq, dk, dv, drel0, drel1, drel2, dbias.zero_()
    launch = _Launch(q, v, rel, bias, block, halo, stride, step, scale, masked)
    if math.prod(stride) > 1:
        dq.zero_()  # between the queries
    inputs, outputs = launch.inputs(q, k, v), (at(out), at(dout))
    statistics = at(norm), at(torch.empty_like(norm[..., :1]))
    sums, terms = launch.table_sums(), launch.terms()
    shared = None if terms is None else at(terms)
    parts, box, places = launch.boxes()
    grid: tuple[int, ...]
    for turn in launch.turns(terms):
        tiles = launch.items * turn["heads"] * launch.tiles
        programs = tiles if sums is None else min(tiles, len(sums))
        arguments = (*inputs, *outputs, *statistics, shared, at(dq), sums, tiles)
        launch.run(kernel.backward_queries, (programs,), *arguments, **turn)
        arguments = (*inputs, at(dout), *statistics, shared, at(dk), at(dv), parts, box)
        grid = (launch.items * math.prod(parts) * turn["heads"],)
        launch.run(kernel.backward_keys, grid, *arguments, **turn, P=places)
    if sums is not None:
        total = sums.sum(0, dtype=torch.float64)
        tables = enumerate(zip(drel, rel, strict=True))
        drel = [empty if t is None else launch.by_row(total, a, t) for a, (empty, t) in tables]
    if bias is not None:
        logits = launch.logit_sums()
        grid = (len(logits), launch.heads * launch.tiles * launch.key_tiles)
        launch.run(kernel.backward_bias, grid, *inputs, at(dout), *statistics, logits, launch.items)
        dbias = launch.by_rows(logits.sum(0, dtype=torch.float64), bias)
    drel0, drel1, drel2 = drel
    return dq, dk, dv, drel0, drel1, drel2, dbias


_attention = torch.library.custom_op("medattn::block_attention", run_forward, mutates_args=())
_backward = torch.library.custom_op("medattn::block_attention_backward", run_backward, mutates_args=())


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty(q, v, rest[-4])


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_empty_gradients(q, k, v, *rest[:4]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.numbers = inputs[7:]


def _differentiate(ctx: Any, dout: Tensor, dnorm: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    gradients = _backward(dout, *saved, *ctx.numbers)
    present = [g if x is not None else None for x, g in zip(saved[:7], gradients, strict=True)]
    return *present, *[None] * len(ctx.numbers)


_attention.register_autograd(_differentiate, setup_context=_remember)


def _empty(q: Tensor, v: Tensor, stride: Sequence[int]) -> tuple[Tensor, Tensor]:
    size = [-(-n // step) for n, step in zip(q.shape[1:-2], stride, strict=True)]
    batch, heads = q.shape[0], q.shape[-2]
    return (
        v.new_empty(batch, *size, heads, v.shape[-1]),
        q.new_empty(batch, *size, heads, 2, dtype=torch.float32),
    )


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor | None) -> list[Tensor]:
    gradients = [x.new_empty(x.shape) for x in (q, k, v)]
    return gradients + [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in parameters]


class _Launch:
    """How one call is cut: tiles, grids and the arguments that all kernels share."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        rel: tuple[Tensor | None, ...],
        bias: Tensor | None,
        block: Sequence[int],
        halo: Sequence[int],
        stride: Sequence[int],
        step: Sequence[int],
        scale: float,
        masked: bool,
    ) -> None:
        pairs = zip(halo[::2], halo[1::2], strict=True)
        given = list(zip(q.shape[1:-2], block, pairs, stride, step, strict=True))
        own = _three_axes(cut(n, b, h, t, masked, e) for n, b, h, t, e in given)
        joined = _joined(own)[-len(given) :]
        self.cut = _three_axes(
            cut(n, b * j, h, t, masked, e) for (n, b, h, t, e), j in zip(given, joined, strict=True)
        )
        self.q, self.axes, self.heads = q, len(given), q.shape[-2]
        self.widths = q.shape[-1], v.shape[-1]
        self.items = len(q) * math.prod(t.blocks for t in self.cut)
        self.queries = math.prod(t.queries for t in self.cut)
        self.keys = math.prod(t.window for t in self.cut)
        self.rel = tuple(None if t is None else self._by_offset(t, 0, axis) for axis, t in enumerate(rel))
        self.bias = bias
        for axis in range(self.axes):
            if self.bias is not None:
                self.bias = self._by_offset(self.bias, 1 + axis, 3 - self.axes + axis)
        widths = [padded(n) for n in self.widths]
        rows = padded(max(t.offsets for t in self.cut))
        most = min(QUERIES if max(widths) <= 64 else QUERIES // 2, max(16, 4096 // rows))
        self.options = {
            "MASKED": masked,
            "Q": min(most, padded(self.queries)),
            "K": KEYS if max(widths) <= 32 and bias is None else KEYS // 2,
            "W": widths[0],
            "X": widths[1],
            "P": padded(max(t.window for t in self.cut)),
            "R": rows,
            "num_warps": 4 if max(widths) <= 64 else 8,
            "num_stages": 1,
        }
        self.tiles = -(-self.queries // self.options["Q"])
        self.key_tiles = -(-self.keys // self.options["K"])
        names = ("size", "blocks", "block", "queries", "stride", "before", "window")
        inverses = _inverse([t.queries for t in self.cut]), _inverse([t.window for t in self.cut])
        self.arguments: dict[str, Any] = {
            "cut": (*_triples(self.cut, *names), inverses, self._steps()),
            "own": None if self.cut == own else _triples(own, "block", "before", "window"),
            "heads": self.heads,
            "width": self.widths[0],
            "value_width": self.widths[1],
            "scale": scale,
        }

    def run(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **others: int) -> None:
        """Launch a kernel on the device of q; others take the place of the launch's own arguments."""
        with torch.cuda.device_of(self.q):  # type: ignore[no-untyped-call]
            kernel[grid](*arguments, **self.arguments | self.options | others)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        """What every kernel takes first."""
        return at(q), at(k), at(v), self.rel, self.bias

    def boxes(self) -> tuple[Triple, Triple, int]:
        """How many boxes of at most K keys an axis of a block is cut into, their sides, and P for them."""
        steps = [t.block for t in self.cut]
        parts, box = [1, 1, 1], list(steps)
        while math.prod(box) > self.options["K"]:
            longest = box.index(max(box))
            parts[longest] += 1
            box[longest] = -(-steps[longest] // parts[longest])
        return tuple(parts), tuple(box), padded(sum(box[-self.axes :]))

    def terms(self) -> Tensor | None:
        """Room for the position terms of as many heads as the budget allows, [B, *out, heads, places]."""
        if self.rel[2] is None:
            return None
        cut = self.cut[-self.axes :]
        places = sum(t.window for t in cut)
        vectors = 4 * sum(self.widths)  # q, k, v, out and their gradients
        heads = max(1, min(self.heads, int(SCRATCH * self.heads * vectors / places)))
        return self.q.new_empty(len(self.q), *(-(-t.size // t.stride) for t in cut), heads, places)

    def turns(self, terms: Tensor | None) -> Iterator[dict[str, int]]:
        """Which heads to work on at a time."""
        step = self.heads if terms is None else terms.shape[-2]
        for first in range(0, self.heads, step):
            yield {"first_head": first, "heads": min(step, self.heads - first)}

    def table_sums(self) -> Tensor | None:
        """Zeros for the gradients of the tables by program, axis and offset."""
        if self.rel[2] is None:
            return None
        room = 3, self.options["R"], self.options["W"]
        programs = min(PROGRAMS, max(FEWEST_PROGRAMS, SUMS // math.prod(room)))
        return self.q.new_zeros(
            min(programs, self.items * self.heads * self.tiles), *room, dtype=torch.float32
        )

    def logit_sums(self) -> Tensor:
        """Room for the gradients of one block's logits, [parts, H, queries, keys]."""
        parts = max(1, min(self.items, PROGRAMS // (self.heads * self.tiles * self.key_tiles)))
        return self.q.new_empty(parts, self.heads, self.queries, self.keys, dtype=torch.float32)

    def by_row(self, total: Tensor, axis: int, table: Tensor) -> Tensor:
        """Gradient of a table from its sums by offset, [3, R, W]."""
        t = self.cut[axis]
        by_offset = total[axis, : t.offsets, : table.shape[1]]
        return (_hot(t.all_offsets(total.device), table.shape[0]).mT @ by_offset).to(table.dtype)

    def by_rows(self, total: Tensor, bias: Tensor) -> Tensor:
        """Gradient of the bias from that of the logits, [H, queries, keys]."""
        cut = self.cut[-self.axes :]
        total = total.view(self.heads, *(t.queries for t in cut), *(t.window for t in cut))
        for axis, t in enumerate(cut):
            pairs = total.movedim((1, 1 + self.axes - axis), (-2, -1)).flatten(-2)
            total = pairs @ _hot(t.offset(total.device).flatten(), bias.shape[1 + axis])  # the axis is done
        return total.to(bias.dtype)

    def _steps(self) -> Triple | None:
        """Between queries as offsets count them; None, a kernel of its own, where they count voxels."""
        steps = tuple(t.step for t in self.cut)
        return None if steps == tuple(t.stride for t in self.cut) else steps

    def _by_offset(self, table: Tensor, dim: int, axis: int) -> Tensor:
        """A row for every offset that occurs along an axis of the cut, in the place of the table's rows."""
        rows = table_row(self.cut[axis].all_offsets(table.device), table.shape[dim])
        return table.to(self.q.dtype).index_select(dim, rows).contiguous()


def _three_axes(tiles: Iterable[Tiling]) -> Tiles:
    """Three axes, the absent ones first."""
    tiles = tuple(tiles)
    return (ABSENT,) * (3 - len(tiles)) + tiles


def _joined(tiles: Tiles) -> list[int]:
    """How many blocks to work on as one along each axis, so that a tile has enough queries.

    Not along an axis whose offsets count queries: they start anew in every block.
    """
    joined, sides = [1, 1, 1], [t.queries for t in tiles]
    while math.prod(sides) < FEWEST_QUERIES:
        more = [a for a, t in enumerate(tiles) if joined[a] < t.blocks and t.step == t.stride]
        if not more:
            break
        axis = min(more, key=lambda a: sides[a])
        joined[axis], sides[axis] = 2 * joined[axis], 2 * sides[axis]
    return joined


def _triples(tiles: Tiles, *names: str) -> tuple[Any, ...]:
    return tuple(tuple(getattr(t, name) for t in tiles) for name in names)


def _inverse(shape: Sequence[int]) -> tuple[int, int]:
    """What divides by the last two sides of a box together and by the last one, see `tiles.quick_unravel`."""
    return -(-(2**31) // (shape[1] * shape[2])), -(-(2**31) // shape[2])


def _hot(offset: Tensor, rows: int) -> Tensor:
    """One where an offset belongs to a table row, float64 [offsets, rows]."""
    row = table_row(offset, rows)
    return (row[:, None] == torch.arange(rows, device=row.device)).double()
