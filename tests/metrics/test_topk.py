"""Classification scores against closed forms, scikit-learn and timm's ReaL evaluation."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medattn.errors import InputError
from medattn.metrics.topk import (
    calibration_error,
    per_class_accuracy,
    real_accuracy,
    top_k_accuracy,
    top_k_correct,
)


def drawn(images: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(images, classes, generator=rng), torch.randint(0, classes, (images,), generator=rng)


@given(st.integers(1, 60), st.integers(2, 12), st.integers(0, 99), st.integers(1, 12))
def test_top_k_equals_torch(images: int, classes: int, seed: int, k: int) -> None:
    scores, target = drawn(images, classes, seed)
    best = scores.topk(min(k, classes), 1).indices
    assert torch.equal(top_k_correct(scores, target, k), (best == target[:, None]).any(1))


def test_top_k_and_per_class_equal_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, target = drawn(500, 7, 0)
    for k in (1, 2, 5):
        peer = metrics.top_k_accuracy_score(target, scores, k=k, labels=range(7))
        assert top_k_accuracy(scores, target, k) == pytest.approx(peer)
    recall = metrics.recall_score(target, scores.argmax(1), average=None)
    assert per_class_accuracy(scores, target).tolist() == pytest.approx(recall.tolist())


def test_a_constant_network_is_right_for_one_class_only() -> None:
    """Ties go to the lower index: no network gets top-1 for having no opinion."""
    target = torch.arange(10)
    assert top_k_accuracy(torch.zeros(10, 10), target, 1) == pytest.approx(0.1)
    assert top_k_accuracy(torch.zeros(10, 10), target, 5) == pytest.approx(0.5)
    assert top_k_accuracy(torch.zeros(10, 10), target, 10) == 1.0


def test_scores_that_are_no_numbers_are_wrong() -> None:
    assert top_k_accuracy(torch.full((4, 3), math.nan), torch.zeros(4, dtype=torch.long), 1) == 0.0
    assert real_accuracy(torch.full((4, 3), math.nan), [[0]] * 4) == (0.0, 4)


def test_classes_without_images_have_no_accuracy() -> None:
    scores = torch.eye(4)[[0, 1, 1, 2]]
    accuracy = per_class_accuracy(scores, torch.tensor([0, 0, 1, 1]))
    assert accuracy[:2].tolist() == [0.5, 0.5]
    assert accuracy[2:].isnan().all()


def test_no_image_has_no_score() -> None:
    nothing, none = torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)
    assert math.isnan(top_k_accuracy(nothing, none))
    assert math.isnan(calibration_error(nothing, none))
    assert math.isnan(real_accuracy(torch.zeros(1, 5), [[]])[0])


def two_classes(confidence: list[float]) -> Tensor:
    first = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([first, 1 - first], 1)


def test_calibration_error_in_closed_form() -> None:
    """Three images at 0.9, two of them right, one at 0.6 that is wrong: 3/4 |2/3 - 0.9| + 1/4 |0 - 0.6|."""
    probabilities = two_classes([0.9, 0.9, 0.9, 0.6])
    error = calibration_error(probabilities, torch.tensor([0, 0, 1, 1]))
    assert error == pytest.approx(0.75 * abs(2 / 3 - 0.9) + 0.25 * 0.6)


def test_bins_include_their_upper_edge() -> None:
    """0.8 is 12/15: it shares a bin with 0.79, not with 0.81."""
    edge = 12 / 15
    apart = calibration_error(two_classes([edge, 0.81]), torch.tensor([0, 1]))
    assert apart == pytest.approx((abs(1 - edge) + 0.81) / 2)
    together = calibration_error(two_classes([edge, 0.79]), torch.tensor([0, 1]))
    assert together == pytest.approx(abs(1 - edge - 0.79) / 2)


@given(st.integers(1, 80), st.integers(0, 99), st.integers(1, 20))
def test_calibration_error_bin_by_bin(images: int, seed: int, bins: int) -> None:
    scores, target = drawn(images, 4, seed)
    probabilities = scores.double().softmax(1)
    confidence, right = probabilities.amax(1).numpy(), (probabilities.argmax(1) == target).numpy()
    expected = 0.0
    for low, high in zip(np.arange(bins) / bins, np.arange(1, bins + 1) / bins, strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(probabilities, target, bins) == pytest.approx(expected)


def test_logits_have_no_calibration() -> None:
    with pytest.raises(InputError, match="apply a softmax"):
        calibration_error(*drawn(5, 3, 0))


def test_real_accuracy_counts_only_images_with_labels() -> None:
    scores = torch.eye(4)[[0, 1, 2, 3]]
    assert real_accuracy(scores, [[0, 3], [0], [], {3}]) == (pytest.approx(2 / 3), 3)
    with pytest.raises(InputError, match=r"scores \(4, 4\) for 3 lists"):
        real_accuracy(scores, [[0]] * 3)


def test_real_accuracy_equals_timms(timm: ModuleType) -> None:
    from timm.data.real_labels import RealLabelsImagenet

    names = [f"ILSVRC2012_val_{n + 1:08d}.JPEG" for n in range(50000)]
    peer = RealLabelsImagenet(names)
    labels = [peer.real_labels[name] for name in names[:2000]]
    scores, _ = drawn(2000, 1000, 0)
    likely = torch.tensor([several[0] if several and n % 2 else 0 for n, several in enumerate(labels)])
    scores.scatter_(1, likely[:, None], 9.0)
    peer.add_result(scores)
    accuracy, counted = real_accuracy(scores, labels)
    assert 100 * accuracy == pytest.approx(peer.get_accuracy(1))
    assert counted == sum(map(bool, labels)) < 2000


@pytest.mark.parametrize(
    ("scores", "target", "k", "message"),
    [
        pytest.param(
            torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), 1, r"\(3, 4\) and target", id="rows"
        ),
        pytest.param(torch.zeros(3), torch.zeros(3, dtype=torch.long), 1, "expected", id="vector"),
        pytest.param(torch.zeros(2, 4), torch.tensor([0, 4]), 1, "from 0 to 4 for 4 classes", id="class"),
        pytest.param(torch.zeros(2, 4), torch.tensor([-1, 0]), 1, "from -1 to 0", id="negative"),
        pytest.param(torch.zeros(2, 4), torch.tensor([0, 0]), 0, "top-0", id="k"),
    ],
)
def test_what_does_not_fit_is_refused(scores: Tensor, target: Tensor, k: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        top_k_accuracy(scores, target, k)
