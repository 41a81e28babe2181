"""The marginal loss against its definition, and what undrawn organs may and may not change."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from medattn.losses import dice_cross_entropy, merge_undrawn, segmentation_loss, soft_dice

RNG = torch.Generator().manual_seed(3)
LOGITS = torch.randn(2, 4, 5, 6, 7, generator=RNG, dtype=torch.float64)
LABELS = torch.randint(0, 4, (2, 5, 6, 7), generator=RNG)
ALL = torch.ones(2, 3, dtype=torch.bool)


def test_merging_adds_the_probabilities_of_undrawn_organs_to_background() -> None:
    drawn = torch.tensor([[True, False, True], [False, False, True]])
    merged, plain = merge_undrawn(LOGITS, drawn).softmax(1), LOGITS.softmax(1)
    torch.testing.assert_close(merged[0, 0], plain[0, 0] + plain[0, 2])
    torch.testing.assert_close(merged[1, 0], plain[1, 0] + plain[1, 1] + plain[1, 2])
    torch.testing.assert_close(merged[0, 1], plain[0, 1])
    assert float(merged[0, 2].max()) == 0
    assert merge_undrawn(LOGITS, ALL) is LOGITS


def test_loss_of_a_fully_drawn_batch_is_dice_plus_cross_entropy() -> None:
    loss = dice_cross_entropy(LOGITS, LABELS, ALL)
    p = LOGITS.softmax(1)
    dice = []
    for organ in (1, 2, 3):
        mask = (organ == LABELS).double()
        dice.append((2 * (p[:, organ] * mask).sum() + 1) / (p[:, organ].sum() + mask.sum() + 1))
    expected = 1 - sum(dice) / 3 + F.cross_entropy(LOGITS, LABELS)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)


def test_shifting_probability_between_background_and_an_undrawn_organ_costs_nothing() -> None:
    drawn = torch.tensor([[True, False, True]] * 2)
    labels = torch.where(LABELS == 2, 0, LABELS)
    p = LOGITS.softmax(1)
    moved = p.clone()
    moved[:, 0], moved[:, 2] = p[:, 0] + 0.9 * p[:, 2], 0.1 * p[:, 2]
    torch.testing.assert_close(
        dice_cross_entropy(p.log(), labels, drawn), dice_cross_entropy(moved.log(), labels, drawn)
    )


def test_gradients_stay_finite_when_organs_are_undrawn() -> None:
    logits = (50 * LOGITS).float().requires_grad_()
    drawn = torch.tensor([[False, False, False], [True, False, False]])
    dice_cross_entropy(logits, torch.where(LABELS > 1, 0, LABELS), drawn).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_nothing_drawn_at_all_leaves_the_background_term_only() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert float(soft_dice(LOGITS.softmax(1), LABELS * 0, nothing)) == 1
    assert abs(float(dice_cross_entropy(LOGITS, LABELS * 0, nothing))) < 1e-6


def test_dice_leaves_an_organ_without_a_voxel_to_the_cross_entropy() -> None:
    p = LOGITS.softmax(1).requires_grad_()
    soft_dice(p, torch.where(LABELS == 3, 0, LABELS), ALL).backward()  # type: ignore[no-untyped-call]
    assert p.grad is not None
    assert float(p.grad[:, 3].abs().max()) == 0
    assert float(p.grad[:, 1].abs().min()) > 0


def test_dice_sums_over_the_cases_in_which_an_organ_is_drawn() -> None:
    drawn = torch.tensor([[True, False, False], [True, True, False]])
    p = LOGITS.softmax(1)
    dice = []
    for organ, cases in ((1, [0, 1]), (2, [1])):
        mask = (LABELS[cases] == organ).double()
        overlap, total = (p[cases, organ] * mask).sum(), p[cases, organ].sum() + mask.sum()
        dice.append((2 * overlap + 1) / (total + 1))
    torch.testing.assert_close(soft_dice(p, LABELS, drawn), sum(dice) / 2)


def test_deep_supervision_halves_the_weight_of_each_coarser_output() -> None:
    coarse = F.avg_pool3d(LOGITS[..., :6, :6], 2)
    fine, labels = LOGITS[..., :4, :6, :6], LABELS[:, :4, :6, :6]
    mean = (dice_cross_entropy(fine, labels, ALL) * 1 + dice_cross_entropy(fine, labels, ALL) * 0.5) / 1.5
    torch.testing.assert_close(segmentation_loss([fine, fine], labels, ALL), mean)
    assert float(segmentation_loss([fine, coarse[..., :2, :, :]], labels, ALL)) > 0
