"""The loss of panoptic networks: cross entropy of the hardest pixels, errors of centres and offsets.

Panoptic-DeepLab (Cheng et al., CVPR 2020), after DeeperLab (Yang et al., 2019) in the choice of pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from medattn.panoptic import IGNORED, PanopticOutput, PanopticTargets


class PanopticWeights(NamedTuple):
    """Of the three parts of the loss; offsets are in pixels, hence their small weight."""

    semantic: float = 1.0
    centre: float = 200.0
    offset: float = 0.01


class PanopticLoss(NamedTuple):
    """Numbers in float32: the parts, each times its weight, and `total`, their sum."""

    total: Tensor
    semantic: Tensor
    centre: Tensor
    offset: Tensor


def panoptic_loss(
    output: PanopticOutput,
    targets: PanopticTargets,
    *,
    hardest: float = 0.2,
    weights: PanopticWeights = PanopticWeights(),  # noqa: B008 (immutable)
) -> PanopticLoss:
    """What a batch costs; maps of any resolution are resized to the targets' (bilinear, align_corners).

    hardest: share of the pixels in the cross entropy, see `hardest_cross_entropy`. Centre and offset losses
    are sums over pixels and channels divided by the sum of the pixels' weights in the batch, as in the
    published code. A part in which no pixel has a weight is 0, and so are its gradients.
    """
    size = targets.semantic.shape[-2:]
    semantic, centre, offset = (_resized(part, size) for part in output)
    cross_entropy = hardest_cross_entropy(semantic, targets.semantic, targets.semantic_weight, hardest)
    squared = _weighted((centre - targets.centre).square(), targets.centre_weight)
    absolute = _weighted((offset - targets.offset).abs(), targets.offset_weight)
    parts = [w * part for w, part in zip(weights, (cross_entropy, squared, absolute), strict=True)]
    return PanopticLoss(torch.stack(parts).sum(), *parts)


def hardest_cross_entropy(logits: Tensor, classes: Tensor, weight: Tensor, hardest: float) -> Tensor:
    """Mean weighted cross entropy of the pixels in which it is largest.

    logits: [B, C, H, W]. classes: [B, H, W], IGNORED for none. weight: [B, H, W], at least 0. hardest: share
    in (0, 1] of all pixels of the batch, also of the ignored ones, as in bowenc0221/panoptic-deeplab and
    Detectron2 (deeplab2 takes the share in each image); weights count in the ranking and in the sum. The mean
    is over the chosen pixels that have a class and a weight above 0, as in deeplab2, so that padding and
    unlabelled regions dilute nothing.
    """
    if not 0 < hardest <= 1:
        raise ValueError(f"hardest {hardest}, expected a share above 0 and at most 1")
    losses = F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="none") * weight
    counted = (classes != IGNORED) & (weight > 0)
    kept = max(1, int(hardest * losses.numel()))
    number = counted.sum().clamp(1, kept)
    flat = losses.flatten()
    if kept < len(flat):
        # pixels that do not count come last, even behind counted ones without loss
        order = flat.detach().masked_fill(~counted.flatten(), -1)
        flat = flat.gather(0, order.topk(kept, sorted=False).indices)
    return flat.sum() / number


def _weighted(losses: Tensor, weight: Tensor) -> Tensor:
    """Sum of losses [B, c, H, W] times weights [B, 1, H, W], by the sum of the weights; 0 if that is 0."""
    total = weight.sum()
    return (losses * weight).sum() / torch.where(total > 0, total, 1)


def _resized(maps: Tensor, size: torch.Size) -> Tensor:
    """In float32 at least, also under autocast: heat near 0 and offsets of hundreds of pixels need it."""
    maps = maps if maps.dtype == torch.float64 else maps.float()
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size=list(size), mode="bilinear", align_corners=True)
