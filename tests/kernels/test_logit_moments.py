"""Closed-form moments of logits against the maps themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medattn_kernels import logit_moments
from medattn_kernels.axial import moments as module
from medattn_kernels.axial.moments import pairs_seen
from medattn_kernels.testing import AWKWARD_SIZES, make_qkv


def _terms(q: Tensor, k: Tensor, axis: int, rel_q: Tensor, rel_k: Tensor, span: int | None) -> list[Tensor]:
    """Per head, all values of the three terms over the pairs seen: [H, pairs] each, pair by pair."""
    q, k = (x.movedim((1 + axis, -2), (0, 1)).flatten(2, -2) for x in (q, k))  # [L, H, lines, D]
    values: list[list[Tensor]] = [[], [], []]
    for i in range(len(q)):
        for j in range(len(q)):
            if span is None or abs(j - i) <= span // 2:
                rows = [t[min(max(j - i + len(t) // 2, 0), len(t) - 1)] for t in (rel_q, rel_k)]
                for term, (a, b) in zip(
                    values, ((q[i], k[j]), (q[i], rows[0]), (k[j], rows[1])), strict=True
                ):
                    term.append((a * b).sum(-1))
    return [torch.cat(term, 1) for term in values]


@pytest.mark.parametrize("span", [None, 5])
@pytest.mark.parametrize("size", [*AWKWARD_SIZES, (13, 2)], ids=str)
def test_moments_and_their_gradients_equal_those_of_the_maps(size: tuple[int, ...], span: int | None) -> None:
    """float64: agreement to 1e-10; D 4, so that both the map and the Gram form are met."""
    for axis in range(len(size)):
        qkv = make_qkv(size, width=4)
        generator = torch.Generator().manual_seed(1)
        tables = [torch.randn(rows, 4, generator=generator, dtype=torch.float64) for rows in (5, 25)]
        leaves = [x.requires_grad_() for x in (qkv["q"], qkv["k"], *tables)]
        q, k, rel_q, rel_k = leaves
        got = logit_moments(q, k, axis=axis, rel_q=rel_q, rel_k=rel_k, span=span)
        terms = _terms(q, k, axis, rel_q, rel_k, span)
        assert 2 * math.prod(size) // size[axis] * pairs_seen(size[axis], span) == terms[0].shape[1]
        got_mean, got_variance = got
        mean, variance = (
            torch.stack([f(t) for t in terms])
            for f in (lambda t: t.mean(1), lambda t: t.var(1, correction=0))
        )
        torch.testing.assert_close(got_mean, mean, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(got_variance, variance, atol=1e-10, rtol=1e-10)
        weight = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        want = torch.autograd.grad((mean * weight.mT + variance * weight).sum(), leaves)
        have = torch.autograd.grad((got_mean * weight.mT + got_variance * weight).sum(), leaves)
        for a, b in zip(have, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_a_mean_of_ten_standard_deviations_costs_no_digits() -> None:
    """float32 inputs around 10: the variance agrees with the one of the map formed in float64 to 1e-6."""
    qkv = make_qkv((40,), width=3, dtype=torch.float32)
    q, k = 10 + qkv["q"], 10 + qkv["k"]
    table = torch.zeros(1, 3)
    expected = torch.stack(
        [t.var(1, correction=0) for t in _terms(q.double(), k.double(), 0, table, table, None)]
    )
    torch.testing.assert_close(logit_moments(q, k, axis=0)[1].double(), expected, atol=0, rtol=1e-6)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = make_qkv((9, 4), width=4)
    whole = logit_moments(qkv["q"], qkv["k"], axis=0)
    monkeypatch.setattr(module, "chunk_size", lambda _: 100)
    pieces = logit_moments(qkv["q"], qkv["k"], axis=0)
    torch.testing.assert_close(pieces, whole, atol=1e-12, rtol=1e-12)


@settings(max_examples=20)
@given(length=st.integers(1, 12), width=st.integers(1, 8), seed=st.integers(0, 99))
def test_both_forms_of_the_content_term_agree(length: int, width: int, seed: int) -> None:
    qkv = make_qkv((length,), width=width, seed=seed)
    gram = logit_moments(qkv["q"], qkv["k"], axis=0)
    mapped = logit_moments(qkv["q"], qkv["k"], axis=0, span=2 * length + 1)
    torch.testing.assert_close(gram, mapped, atol=1e-10, rtol=1e-10)


def test_absent_tables_give_zeros_and_an_empty_batch_an_error() -> None:
    qkv = make_qkv((5,))
    got = logit_moments(qkv["q"], qkv["k"], axis=0)
    assert all(float(moment[1:].abs().max()) == 0 for moment in got)
    with pytest.raises(ValueError, match="at least one entry in the batch"):
        logit_moments(qkv["q"][:0], qkv["k"][:0], axis=0)
