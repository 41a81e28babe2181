"""Segmentation losses that know which organs someone drew."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def merge_undrawn(logits: Tensor, drawn: Tensor) -> Tensor:
    """Logits of the marginal distribution in which undrawn organs count as background.

    logits: [B, 1 + K, *size], channel 0 background. drawn: [B, K] bool, organ contoured in this case.
    A voxel labelled background may belong to an organ that nobody drew, so its probability is summed into
    channel 0 and its own channel becomes impossible (marginal loss: Fang & Yan 2020, Shi et al. 2021).
    """
    if bool(drawn.all()):
        return logits
    impossible = torch.finfo(logits.dtype).min / 4
    undrawn = ~drawn.reshape(*drawn.shape, *[1] * (logits.ndim - 2))
    pool = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(~undrawn, impossible)], 1)
    return torch.cat([pool.logsumexp(1, keepdim=True), logits[:, 1:].masked_fill(undrawn, impossible)], 1)


def soft_dice(probabilities: Tensor, labels: Tensor, drawn: Tensor) -> Tensor:
    """Mean soft Dice over the organs drawn in at least one case of the batch; a number in (0, 1].

    probabilities: [B, 1 + K, *size]. labels: [B, *size] integers, 0 background. Sums run over the batch
    (batch Dice), so that an organ absent from one patch is no division by nothing.
    """
    K = drawn.shape[1]
    target = F.one_hot(labels.long(), K + 1)[..., 1:].movedim(-1, 1)
    mask = drawn.reshape(*drawn.shape, *[1] * (labels.ndim - 1)).to(probabilities)
    axes = [0, *range(2, probabilities.ndim)]
    p = probabilities[:, 1:] * mask
    t = target.to(p) * mask
    overlap, total = (p * t).sum(axes), p.sum(axes) + t.sum(axes)
    dice = (2 * overlap + 1) / (total + 1)
    scored = drawn.any(0)
    return dice[scored].mean() if bool(scored.any()) else dice.sum() * 0 + 1


def dice_cross_entropy(logits: Tensor, labels: Tensor, drawn: Tensor) -> Tensor:
    """1 - soft Dice + cross entropy, both on the marginal distribution of `merge_undrawn`, in float32."""
    merged = merge_undrawn(logits.float(), drawn)
    return 1 - soft_dice(merged.softmax(1), labels, drawn) + F.cross_entropy(merged, labels.long())


def segmentation_loss(outputs: Tensor | list[Tensor], labels: Tensor, drawn: Tensor) -> Tensor:
    """`dice_cross_entropy` of the logits; of a list of them, the mean with weights 1, 1/2, 1/4, ..."""
    if isinstance(outputs, Tensor):
        return dice_cross_entropy(outputs, labels, drawn)
    weights = [0.5**level for level in range(len(outputs))]
    terms = [
        weight * dice_cross_entropy(logits, _nearest(labels, logits.shape[2:]), drawn)
        for weight, logits in zip(weights, outputs, strict=True)
    ]
    return torch.stack(terms).sum() / sum(weights)


def _nearest(labels: Tensor, size: torch.Size) -> Tensor:
    if labels.shape[1:] == size:
        return labels
    return F.interpolate(labels[:, None].float(), size=tuple(size), mode="nearest-exact")[:, 0].to(
        labels.dtype
    )
