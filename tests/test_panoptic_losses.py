"""The panoptic loss against closed forms, and gradients where nothing has a weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medattn.panoptic import IGNORED, PanopticOutput, PanopticTargets
from medattn.panoptic_losses import PanopticWeights, hardest_cross_entropy, panoptic_loss

SIZE = (9, 13)


def example(seed: int = 0) -> tuple[PanopticOutput, PanopticTargets]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    output = PanopticOutput(*((random(2, channels, *SIZE) * 4).requires_grad_() for channels in (5, 1, 2)))
    classes = torch.randint(-1, 5, (2, *SIZE), generator=generator)
    targets = PanopticTargets(
        classes,
        random(2, *SIZE) * 3,
        random(2, 1, *SIZE),
        (random(2, 1, *SIZE) > 0.5).double(),
        random(2, 2, *SIZE) * 9,
        (random(2, 1, *SIZE) > 0.5).double(),
    )
    return output, targets


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def test_a_hand_made_case() -> None:
    # one pixel in two classes with logits 0: log 2; heat 0.5 off: 200 / 4; offsets 3 and 4 off: 0.01 * 7
    output = PanopticOutput(torch.zeros(1, 2, 1, 1), torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, 2, 1, 1))
    one = torch.ones(1, 1, 1, 1)
    targets = PanopticTargets(
        torch.zeros(1, 1, 1, dtype=torch.int64),
        one[0],
        one,
        one,
        torch.tensor([3.0, -4]).view(1, 2, 1, 1),
        one,
    )
    loss = panoptic_loss(output, targets, hardest=1.0)
    expected = [math.log(2) + 50 + 0.07, math.log(2), 50, 0.07]
    torch.testing.assert_close(torch.stack(loss), torch.tensor(expected))


@pytest.mark.parametrize("hardest", [1.0, 0.37, 0.2, 1e-9])
def test_the_hardest_pixels_are_the_head_of_the_sorted_losses(hardest: float) -> None:
    output, targets = example()
    log_p = output.semantic.detach().log_softmax(1)
    losses = sorted(
        (
            -float(targets.semantic_weight[n, y, x] * log_p[n, c, y, x])
            for n in range(2)
            for y in range(SIZE[0])
            for x in range(SIZE[1])
            if (c := int(targets.semantic[n, y, x])) != IGNORED
        ),
        reverse=True,
    )
    kept = losses[: max(1, int(hardest * 2 * SIZE[0] * SIZE[1]))]
    loss = hardest_cross_entropy(output.semantic, targets.semantic, targets.semantic_weight, hardest)
    assert loss.item() == pytest.approx(math.fsum(kept) / len(kept), rel=1e-12)


def test_all_pixels_of_weight_one_are_the_plain_cross_entropy() -> None:
    output, targets = example()
    loss = hardest_cross_entropy(
        output.semantic, targets.semantic, torch.ones_like(targets.semantic_weight), 1.0
    )
    torch.testing.assert_close(loss, F.cross_entropy(output.semantic, targets.semantic, ignore_index=IGNORED))


def test_only_the_hardest_pixels_have_a_gradient() -> None:
    output, targets = example()
    backward(hardest_cross_entropy(output.semantic, targets.semantic, torch.ones(2, *SIZE), 0.2))
    assert output.semantic.grad is not None
    assert int(output.semantic.grad.abs().sum(1).bool().sum()) == int(0.2 * 2 * SIZE[0] * SIZE[1])


def test_padding_without_weight_changes_nothing_while_enough_pixels_count() -> None:
    output, targets = example()
    grown = [F.pad(part, (0, 4)) for part in output]
    classes = F.pad(targets.semantic, (0, 4), value=IGNORED)
    weight = F.pad(targets.semantic_weight, (0, 4))
    plain = hardest_cross_entropy(output.semantic, targets.semantic, targets.semantic_weight, 1.0)
    torch.testing.assert_close(hardest_cross_entropy(grown[0], classes, weight, 1.0), plain)


def test_centre_and_offset_losses_are_weighted_means() -> None:
    output, targets = example()
    loss = panoptic_loss(output, targets, weights=PanopticWeights(0, 3, 5))
    squares = (output.centre - targets.centre)[targets.centre_weight.bool()] ** 2
    torch.testing.assert_close(loss.centre, 3 * squares.mean())
    chosen = targets.offset_weight.expand_as(output.offset).bool()
    absolute = (output.offset - targets.offset)[chosen].abs().mean() * 2  # the sum of down and right
    torch.testing.assert_close(loss.offset, 5 * absolute)
    assert loss.semantic.item() == 0
    torch.testing.assert_close(loss.total, loss.centre + loss.offset)


def test_gradients_are_those_of_finite_differences() -> None:
    output, targets = example(3)
    assert torch.autograd.gradcheck(
        lambda *parts: panoptic_loss(PanopticOutput(*parts), targets, hardest=0.3).total, tuple(output)
    )


@pytest.mark.parametrize("hardest", [0.2, 1.0])
def test_without_any_weight_loss_and_gradients_are_zero(hardest: float) -> None:
    output, targets = example()
    nothing = targets._replace(
        semantic=torch.full_like(targets.semantic, IGNORED),
        semantic_weight=torch.zeros_like(targets.semantic_weight),
        centre_weight=torch.zeros_like(targets.centre_weight),
        offset_weight=torch.zeros_like(targets.offset_weight),
    )
    loss = panoptic_loss(output, nothing, hardest=hardest)
    backward(loss.total)
    assert [part.item() for part in loss] == [0, 0, 0, 0]
    for part in output:
        assert part.grad is not None
        assert not part.grad.any()


def test_maps_are_resized_to_the_targets_in_float32() -> None:
    targets = PanopticTargets(*(part.float() if part.is_floating_point() else part for part in example()[1]))
    small = PanopticOutput(*(torch.randn(2, channels, 3, 4).bfloat16() for channels in (5, 1, 2)))
    whole = PanopticOutput(
        *(F.interpolate(part.float(), SIZE, mode="bilinear", align_corners=True) for part in small)
    )
    for part, expected in zip(panoptic_loss(small, targets), panoptic_loss(whole, targets), strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("hardest", [0.0, 1.5, -1.0])
def test_a_share_that_is_none_is_refused(hardest: float) -> None:
    output, targets = example()
    with pytest.raises(ValueError, match="hardest"):
        panoptic_loss(output, targets, hardest=hardest)
