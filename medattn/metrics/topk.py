"""Scores of a classifier: top-k and per-class accuracy, calibration, and ImageNet's reassessed labels.

All are shares from 0 to 1 in float64. A score over no image is NaN. An image whose scores are not all numbers
counts as wrong.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from medattn.errors import InputError

BINS = 15  # of the calibration error, as in Guo et al.


def top_k_correct(scores: Tensor, target: Tensor, k: int) -> Tensor:
    """[N] bool: fewer than k classes are scored above the true one; of equal scores the lower index is above.

    scores: [N, C] logits or probabilities. target: [N] class indices. k at least C is always right.

    Raises InputError for shapes that do not fit, classes outside 0 to C - 1 and k below 1.
    """
    _check(scores, target)
    if k < 1:
        raise InputError(f"top-{k} accuracy, expected k of at least 1; correct k")
    true = scores.gather(1, target[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    above = (scores > true) | ((scores == true) & before)
    return (above.sum(1) < k) & ~scores.isnan().any(1)


def top_k_accuracy(scores: Tensor, target: Tensor, k: int = 1) -> float:
    """Share of images whose class is among the k best scored; arguments as `top_k_correct`."""
    return _mean(top_k_correct(scores, target, k))


def per_class_accuracy(scores: Tensor, target: Tensor) -> Tensor:
    """[C] float64: top-1 accuracy over the images of each class, NaN for a class without any.

    Arguments and errors as `top_k_correct`. The mean over classes is `per_class_accuracy(...).nanmean()`.
    """
    classes = scores.shape[-1]
    right = torch.bincount(target[top_k_correct(scores, target, 1)], minlength=classes)
    return right.double() / torch.bincount(target, minlength=classes)


def calibration_error(probabilities: Tensor, target: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: how far confidence and accuracy are apart, on average over images.

    The confidence of an image is its largest probability. `bins` bins of equal width, ((b - 1) / bins, b /
    bins]; the sum over bins of the share of images in it times |accuracy - mean confidence| (Guo et al., ICML
    2017).

    probabilities: [N, C], rows that sum to 1. target: [N]. Raises InputError as `top_k_correct` does, and for
    what are no probabilities, such as logits.
    """
    right = top_k_correct(probabilities, target, 1).double()
    if not len(right):
        return math.nan
    sums = probabilities.double().sum(1)
    if not bool(((probabilities >= 0).all(1) & ((sums - 1).abs() < 1e-2)).all()):
        raise InputError("calibration error: rows are no probabilities, expected sums of 1; apply a softmax")
    n, confidence, accurate = reliability(probabilities.double().amax(1), right, bins).unbind(1)
    return float((accurate - confidence).abs().sum() / n.sum())


def reliability(confidence: Tensor, right: Tensor, bins: int = BINS) -> Tensor:
    """[bins, 3] float64: images, sum of their confidences and number of right ones, per bin of confidence.

    confidence: [N] from 0 to 1. right: [N] 0 or 1. The bins are those of `calibration_error`.
    """
    edges = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
    values = torch.stack((torch.ones_like(confidence), confidence, right), 1).double()
    found = torch.zeros(bins, 3, dtype=torch.float64, device=confidence.device)
    return found.index_add(0, torch.bucketize(confidence.double(), edges), values)


def real_accuracy(scores: Tensor, labels: Sequence[Collection[int]]) -> tuple[float, int]:
    """ImageNet ReaL (Beyer et al. 2020): share of images whose best scored class is among its labels.

    scores: [N, C]. labels: per image the classes that people found in it; an image with none is not counted.
    Returns the share and over how many images it is. Raises InputError for labels of other images.
    """
    if scores.ndim != 2 or len(scores) != len(labels):
        raise InputError(
            f"scores {tuple(scores.shape)} for {len(labels)} lists of labels, expected [N, C] and N lists; "
            "give both in the same order"
        )
    best, valid = scores.argmax(1).tolist(), (~scores.isnan().any(1)).tolist()
    counted = [
        ok and cls in allowed for cls, ok, allowed in zip(best, valid, labels, strict=True) if len(allowed)
    ]
    return (sum(counted) / len(counted) if counted else math.nan), len(counted)


def _mean(right: Tensor) -> float:
    return float(right.double().mean())


def _check(scores: Tensor, target: Tensor) -> None:
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise InputError(
            f"scores {tuple(scores.shape)} and target {tuple(target.shape)}, expected [N, C] and [N]; give "
            "one row of scores per image"
        )
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < scores.shape[1]:
        raise InputError(
            f"target from {int(target.min())} to {int(target.max())} for {scores.shape[1]} classes, "
            f"expected 0 to {scores.shape[1] - 1}; use the classes that the model was trained for"
        )
