"""Segmentation losses that know which organs someone drew."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Total = Callable[[Tensor], Tensor]  # of a batch's sums over the processes that share it


def alone(sums: Tensor) -> Tensor:
    """The `Total` of one process."""
    return sums


def merge_undrawn(logits: Tensor, drawn: Tensor) -> Tensor:
    """Logits of the marginal distribution in which undrawn organs count as background.

    logits: [B, 1 + K, *size], channel 0 background. drawn: [B, K] bool, organ contoured in this case.
    A voxel labelled background may belong to an organ that nobody drew, so its probability is summed into
    channel 0 and its own channel becomes impossible (marginal loss: Fang & Yan 2020, Shi et al. 2021).
    """
    if bool(drawn.all()):
        return logits
    undrawn = ~drawn
    pooled = [F.pad(row, (1, 0), value=True) for row in undrawn]  # background itself and who joins it
    background = torch.stack([one[pool].logsumexp(0) for one, pool in zip(logits, pooled, strict=True)])
    mask = undrawn.reshape(*drawn.shape, *[1] * (logits.ndim - 2))
    organs = logits[:, 1:].masked_fill(mask, torch.finfo(logits.dtype).min / 4)
    return torch.cat([background[:, None], organs], 1)


def soft_dice(probabilities: Tensor, labels: Tensor, drawn: Tensor, total: Total = alone) -> Tensor:
    """Mean soft Dice over the organs that have a voxel in the batch; a number in (0, 1], 1 if none has.

    probabilities: [B, 1 + K, *size]. labels: [B, *size] integers, 0 background. drawn: [B, K] bool; cases in
    which an organ is not drawn have no part in its sums, which run over the batch (batch Dice).

    An organ without a voxel is left to the cross entropy: its Dice is 0 for any prediction but none at all,
    and pulling it there costs thin organs, absent from many patches, all they learned in the others.

    total: sums over processes that hold a part of the batch each, such as `training.distributed.summed`.
    """
    axes = tuple(range(2, probabilities.ndim))
    target = torch.zeros_like(probabilities).scatter_(1, labels.long()[:, None], 1.0)
    overlap = ((probabilities * target).sum(axes)[:, 1:] * drawn).sum(0)
    voxels = (target.sum(axes)[:, 1:] * drawn).sum(0)
    predicted = (probabilities.sum(axes)[:, 1:] * drawn).sum(0)
    overlap, voxels, predicted = total(torch.stack([overlap, voxels, predicted])).unbind()
    dice = (2 * overlap + 1) / (predicted + voxels + 1)
    present = voxels > 0
    return dice[present].mean() if bool(present.any()) else dice.sum() * 0 + 1


def dice_cross_entropy(logits: Tensor, labels: Tensor, drawn: Tensor, total: Total = alone) -> Tensor:
    """1 - soft Dice + cross entropy, both on the marginal distribution of `merge_undrawn`, in float32."""
    log_p = merge_undrawn(logits.float(), drawn).log_softmax(1)
    # torch's own mean adds in any order on CUDA
    cross_entropy = F.nll_loss(log_p, labels.long(), reduction="none").mean()
    return 1 - soft_dice(log_p.exp(), labels, drawn, total) + cross_entropy


def segmentation_loss(
    outputs: Tensor | list[Tensor], labels: Tensor, drawn: Tensor, total: Total = alone
) -> Tensor:
    """`dice_cross_entropy` of the logits; of a list of them, the mean with weights 1, 1/2, 1/4, ..."""
    if isinstance(outputs, Tensor):
        return dice_cross_entropy(outputs, labels, drawn, total)
    weights = [0.5**level for level in range(len(outputs))]
    terms = [
        weight * dice_cross_entropy(logits, _nearest(labels, logits.shape[2:]), drawn, total)
        for weight, logits in zip(weights, outputs, strict=True)
    ]
    return torch.stack(terms).sum() / sum(weights)


def _nearest(labels: Tensor, size: torch.Size) -> Tensor:
    if labels.shape[1:] == size:
        return labels
    return F.interpolate(labels[:, None].float(), size=tuple(size), mode="nearest-exact")[:, 0].to(
        labels.dtype
    )
