"""Multi-scale and flip testing: one answer from several views of an image (Panoptic-DeepLab, CVPR 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medattn.errors import InputError
from medattn.inference.panoptic_resize import Placement, enlargement, interpolated, restored
from medattn.panoptic import PanopticOutput

Predict = Callable[[Tensor], PanopticOutput]


@torch.no_grad()
def over_views(
    predict: Predict,
    image: Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    placement: Placement | None = None,
) -> PanopticOutput:
    """Mean of class probabilities, heat and offsets over views of an image, at the image's resolution.

    predict: [B, 3, h, w] -> maps of any resolution. image: [B, 3, H, W]. scales: factors of H - 1 and W - 1,
    so that 1025 halved is 513. flip: every scale mirrored left-right, too. placement: of the image in
    `image`; the result then has the original's resolution, by default that of `image`. `semantic` is the
    logarithm of the mean probabilities, which are its softmax; of a single view it is the network's own
    logits.

    Whatever the number of views, one map of probabilities exists at a time, beside a view at its own
    resolution.
    """
    size = (image.shape[2], image.shape[3])
    if not scales or not all(0 < scale < float("inf") for scale in scales):
        raise InputError(
            f"scales {list(scales)}, expected one or more factors above 0; [1.0] is the image alone"
        )
    placement = Placement(size, size, size) if placement is None else placement
    if placement.network != size:
        raise InputError(f"placement: an input of {placement.network}, expected that of the image, {size}")
    views = _views(predict, image, scales, flip)
    count = len(scales) * (1 + flip)
    if count == 1:
        return restored(next(views), placement)
    sums: PanopticOutput | None = None
    for view in views:
        if sums is None:
            sums = PanopticOutput(
                *(part.new_zeros(*part.shape[:2], *placement.original).float() for part in view)
            )
        for rows, logits in interpolated(view.semantic, placement):
            sums.semantic[:, :, rows] += logits.softmax(1)
        for total, part in ((sums.centre, view.centre), (sums.offset, view.offset)):
            for rows, values in interpolated(part, placement):
                total[:, :, rows] += values
    assert sums is not None
    tiny = torch.finfo(torch.float32).tiny  # a class of probability 0 has a finite logit
    return PanopticOutput(
        sums.semantic.div_(count).clamp_(min=tiny).log_(),
        sums.centre.div_(count),
        sums.offset.mul_(enlargement(placement, sums.offset) / count),
    )


def _views(predict: Predict, image: Tensor, scales: Sequence[float], flip: bool) -> Iterator[PanopticOutput]:
    """The maps of every view, seen from the image: unmirrored, offsets in its pixels."""
    for scale in scales:
        scaled = _scaled(image, scale)
        shrink = torch.tensor(
            [
                (b - 1) / (a - 1) if a > 1 else 1.0
                for a, b in zip(scaled.shape[2:], image.shape[2:], strict=True)
            ]
        ).to(image.device)[:, None, None]
        for mirrored in (False, True)[: 1 + flip]:
            view = predict(scaled.flip(3) if mirrored else scaled)
            if mirrored:
                view = unmirrored(view)
            yield view._replace(offset=view.offset.float() * shrink)


def unmirrored(output: PanopticOutput) -> PanopticOutput:
    """The maps for the left-right mirror image: columns reversed, offsets to the right negated."""
    sign = torch.tensor([1.0, -1.0], dtype=output.offset.dtype).to(output.offset.device)[:, None, None]
    return PanopticOutput(output.semantic.flip(3), output.centre.flip(3), output.offset.flip(3) * sign)


def _scaled(image: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return image
    size = [max(1, 1 + round((side - 1) * scale)) for side in image.shape[2:]]
    return F.interpolate(image, size=size, mode="bilinear", align_corners=True)
