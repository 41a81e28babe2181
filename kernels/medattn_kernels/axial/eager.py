"""Axial attention in plain torch: a few lines at a time, their logits formed again in the backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medattn_kernels._chunk import chunk_size
from medattn_kernels._select import without_autocast

Box = tuple[slice, ...]
Factor = float | Tensor


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axis: int,
    rel_q: Tensor | None,
    rel_k: Tensor | None,
    rel_v: Tensor | None,
    gain: Tensor | None,
    span: int | None,
    scale: float,
    separate: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`medattn_kernels.axial_attention` on any device, differentiable once.

    A table term is one product with the rows of all offsets, [i, 2 L] per line; entry L - 1 + j - i of row i
    belongs to key j, so the logits [i, j] are a strided view of it and nothing is gathered.
    """
    length, precise = q.shape[1 + axis], torch.promote_types(q.dtype, torch.float32)
    rows = [
        None if table is None else _rows(table.to(precise), length, sign)
        for table, sign in ((rel_q, 1), (rel_k, -1), (rel_v, 1))
    ]
    gain = None if gain is None else gain.to(precise)
    content, position = _attention(q, k, v, *rows, gain, axis, span or 0, scale, separate)
    return (content, position) if separate else content


def offsets(length: int, device: torch.device) -> Tensor:
    """Key place minus query place, [i, j]."""
    place = torch.arange(length, device=device)
    return place[None, :] - place[:, None]


def _rows(table: Tensor, length: int, sign: int) -> Tensor:
    """Table rows of the offsets sign * (1 - L, .., L), [2 L, width]; the last one belongs to no pair."""
    last = table.shape[0] - 1
    offset = sign * torch.arange(1 - length, length + 1, device=table.device)
    return table[(offset + last // 2).clamp(0, last)]


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_query: Tensor | None,
    by_key: Tensor | None,
    by_value: Tensor | None,
    gain: Tensor | None,
    axis: int,
    span: int,
    scale: float,
    separate: bool,
) -> tuple[Tensor, Tensor]:
    """Content (or the whole output) and position (empty unless separate), in q's dtype.

    by_query, by_key [2 L, D], by_value [2 L, E]: table rows by offset, those of keys by query minus key.
    """
    content, position = _empty(v, separate)
    with without_autocast(q):
        for lines in _cut(q, k, v, (by_query, by_key, by_value), gain, axis, span, scale):
            attention = lines.attention()
            part = lines.v.mT @ attention.mT
            if lines.by_value is not None:
                moved = _weighted(lines.by_offset(attention), lines.by_value)
                if separate:
                    lines.write(position, moved)
                else:
                    part += moved
            lines.write(content, part)
    return content, position


def run_backward(
    dcontent: Tensor,
    dposition: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    by_query: Tensor | None,
    by_key: Tensor | None,
    by_value: Tensor | None,
    gain: Tensor | None,
    axis: int,
    span: int,
    scale: float,
    separate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the three kinds of rows and the gain; empty for what is not there."""
    rows = by_query, by_key, by_value
    dq, dk, dv, *sums = _empty_gradients(q, k, v, *rows, gain)
    dby_query, dby_key, dby_value, dgain = (x.zero_() for x in sums)
    with without_autocast(q):
        for lines in _cut(q, k, v, rows, gain, axis, span, scale):
            attention = lines.attention()
            dout = lines.read(dcontent)
            lines.write(dv, dout.mT @ attention)
            dattention = dout @ lines.v.mT
            if lines.by_value is not None:
                dout = lines.read(dposition) if separate else dout
                dattention += lines.products(dout, lines.by_value)
                dby_value += _row_gradient(dout, lines.by_offset(attention))
            dlogits = torch._softmax_backward_data(dattention, attention, -1, attention.dtype)
            by_content, by_rows = lines.pull(dlogits, lines.k, 1, lines.by_query, dby_query)
            lines.write(dq, lines.joined(by_content, by_rows, 1))
            if gain is not None:
                lines.add_gain(dgain[0], scale, lines.q, by_content)
                lines.add_gain(dgain[1], scale, lines.q, by_rows)
            by_content, by_rows = lines.pull(dlogits.mT, lines.q, 2, lines.by_key, dby_key)
            lines.write(dk, lines.joined(by_content, by_rows, 2))
            if gain is not None:
                lines.add_gain(dgain[2], scale, lines.k, by_rows)
    return dq, dk, dv, dby_query, dby_key, dby_value, dgain


@dataclass(frozen=True)
class _Lines:
    """Some lines of some heads, n together.

    q, k: [n, L, D]. v: [n, L, E]. by_query, by_key: [2 L, D]. by_value: [2 L, E]. factors: scale times gain
    of the three logit terms. hidden: [i, j]. wide: room for [n, L, 2 L]. box: where the lines are in
    [B, *size off the axis, H].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    by_query: Tensor | None
    by_key: Tensor | None
    by_value: Tensor | None
    factors: tuple[Factor, ...]
    hidden: Tensor | None
    wide: Tensor
    axis: int
    box: Box

    def read(self, x: Tensor) -> Tensor:
        """These lines of [B, *size, H, width], [n, L, width]."""
        return _read(x, self.axis, self.box)

    def write(self, x: Tensor, part: Tensor) -> None:
        """Put [n, width, L] where these lines are in [B, *size, H, width]."""
        place = x.movedim(1 + self.axis, -1)[self.box]
        place.copy_(part.view(place.shape))

    def scaled(self, term: int) -> Tensor:
        """The vectors of a logit term, q, q or k, times its factor."""
        return _times(self.k if term == 2 else self.q, self.factors[term])

    def attention(self) -> Tensor:
        """Softmax weights, [n, i, j]."""
        logits = self.scaled(0) @ self.k.mT
        if self.by_query is not None:
            logits += self.products(self.scaled(1), self.by_query)
        if self.by_key is not None:
            logits += self.products(self.scaled(2), self.by_key).mT
        if self.hidden is not None:
            logits.masked_fill_(self.hidden, float("-inf"))
        return logits.softmax(-1)

    def products(self, x: Tensor, rows: Tensor) -> Tensor:
        """x_i.rows[j - i], [n, i, j], until `wide` is used again."""
        torch.mm(x.flatten(0, 1), rows.mT, out=self.wide.flatten(0, 1))
        return _pairs(self.wide)

    def by_offset(self, x: Tensor) -> Tensor:
        """[n, i, j] at entry L - 1 + j - i of row i, [n, L, 2 L], until `wide` is used again."""
        _pairs(self.wide.zero_()).copy_(x)
        return self.wide

    def pull(
        self, dlogits: Tensor, other: Tensor, term: int, rows: Tensor | None, drows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What content and rows give to the gradient of q (or k), before their factors, [n, D, L] each.

        dlogits: [n, i, j], or its transpose for k. other: k (or q). Adds to the gradient of the rows.
        """
        by_content = other.mT @ dlogits.mT
        if rows is None:
            return by_content, None
        wide = self.by_offset(dlogits)
        drows += _row_gradient(self.scaled(term), wide)
        return by_content, _weighted(wide, rows)

    def joined(self, by_content: Tensor, by_rows: Tensor | None, term: int) -> Tensor:
        """Both parts times their factors, [n, D, L]."""
        content = _times(by_content, self.factors[0])
        return content if by_rows is None else content.add_(_times(by_rows, self.factors[term]))

    def add_gain(self, dgain: Tensor, scale: float, x: Tensor, dx: Tensor | None) -> None:
        """Add a term's part of the gradient of its gain [H]: scale sum x.dx over the lines of a head."""
        if dx is not None:
            heads = dgain[self.box[-1]]
            by_line = (x.mT * dx).flatten(1).sum(1, dtype=dgain.dtype)
            heads += scale * by_line.view(-1, len(heads)).sum(0)


def _cut(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Sequence[Tensor | None],
    gain: Tensor | None,
    axis: int,
    span: int,
    scale: float,
) -> Iterator[_Lines]:
    """All lines, so many at a time that their products with a table, [n, L, 2 L], keep to the chunk size."""
    length = q.shape[1 + axis]
    grid = q.movedim(1 + axis, -1).shape[:-2]  # [B, *size off the axis, H]
    limit = max(1, chunk_size(q) // (2 * length**2))
    room = q.new_empty(min(limit, math.prod(grid)), length, 2 * length)
    hidden = offsets(length, q.device).abs() > span // 2 if span else None
    by_query, by_key, by_value = (None if x is None else x.to(q.dtype) for x in rows)
    for box in _boxes(grid, limit):
        some_q, some_k, some_v = (_read(x, axis, box) for x in (q, k, v))
        factors = _factors(gain, scale, grid, box)
        wide = room[: len(some_q)]
        yield _Lines(some_q, some_k, some_v, by_query, by_key, by_value, factors, hidden, wide, axis, box)


def _boxes(sizes: Sequence[int], limit: int) -> Iterator[Box]:
    """Cut a grid into boxes of at most `limit` entries: whole last axes and a part of the one before them."""
    if not sizes:
        yield ()
        return
    step = max(1, limit // math.prod(sizes[1:]))
    for start in range(0, sizes[0], step):
        for rest in _boxes(sizes[1:], limit):
            yield slice(start, start + step), *rest


def _factors(gain: Tensor | None, scale: float, grid: Sequence[int], box: Box) -> tuple[Factor, ...]:
    """What each logit term is multiplied by: one number, or [n, 1, 1]."""
    if gain is None:
        return (scale,) * 3
    return tuple((scale * g).expand(grid)[box].reshape(-1, 1, 1) for g in gain)


def _read(x: Tensor, axis: int, box: Box) -> Tensor:
    """The lines of a box, [n, L, width]: copied, since BLAS is slow on the strides of a volume."""
    return x.movedim(1 + axis, -2)[box].contiguous().view(-1, x.shape[1 + axis], x.shape[-1])


def _times(x: Tensor, factor: Factor) -> Tensor:
    return (x * factor).to(x.dtype)


def _pairs(wide: Tensor) -> Tensor:
    """[n, L, 2 L] by offset, seen by pairs: the view [n, i, j] of its entries L - 1 + j - i in row i."""
    length = wide.shape[1]
    return torch.unflatten(wide.flatten(1)[:, length - 1 : -1], 1, (length, 2 * length - 1))[..., :length]


def _weighted(wide: Tensor, rows: Tensor) -> Tensor:
    """Sums of rows with weights [n, L, 2 L], [n, width, L]: BLAS is slow on results as narrow as a head."""
    return torch.bmm(rows.mT.expand(len(wide), -1, -1), wide.mT)


def _row_gradient(x: Tensor, wide: Tensor) -> Tensor:
    """Sum of wide[n, i, o] x[n, i] over lines and places, [2 L, width]."""
    return (x.flatten(0, 1).mT @ wide.flatten(0, 1)).mT


# operators to torch, so that torch.compile takes the loops and their writes in place as they are
_attention = torch.library.custom_op("medattn::axial_attention_eager", run_forward, mutates_args=())
_backward = torch.library.custom_op("medattn::axial_attention_eager_backward", run_backward, mutates_args=())


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty(v, rest[-1])


@_backward.register_fake
def _(dcontent: Tensor, dposition: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_empty_gradients(*rest[:7]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.numbers = inputs[7:]


def _differentiate(ctx: Any, dcontent: Tensor, dposition: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing computes them again, and allows no more
    gradients = _backward(dcontent, dposition, *saved, *ctx.numbers)
    present = [None if x is None else g for x, g in zip(saved, gradients, strict=True)]
    return *present, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_remember)


def _empty(v: Tensor, separate: bool) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty(v.shape if separate else (0,))


def _empty_gradients(q: Tensor, *others: Tensor | None) -> list[Tensor]:
    return [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, *others)]
