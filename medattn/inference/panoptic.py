"""From the maps of a panoptic network to segments: centres, groups, majority votes, the area rule.

The rules are those of Panoptic-DeepLab (Cheng et al., CVPR 2020), for whole batches, on the device of the
maps and without a loop over images or instances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medattn.errors import InputError
from medattn.inference.panoptic_centres import Centres, find_centres, group
from medattn.panoptic import IGNORED, Categories, PanopticOutput, Segment, measure

LOGIT_BYTES = 32 * 2**20  # of logits whose exponentials exist at once


@dataclass(frozen=True)
class PanopticRules:
    """How maps become segments.

    threshold: a centre's heat is above it. nms_kernel: side, in pixels, of the square around a centre that
    has no warmer pixel; odd. top_k: most instances of an image. strict_top_k: keep only centres warmer than
    the top_k-th, one fewer than top_k, as the published code does. stuff_area, thing_area: segments of fewer
    pixels become VOID. The defaults are published for COCO; Cityscapes has nms_kernel 7 or 13, stuff_area
    2048.
    """

    threshold: float = 0.1
    nms_kernel: int = 41
    top_k: int = 200
    strict_top_k: bool = False
    stuff_area: int = 4096
    thing_area: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if not 0 <= self.threshold < float("inf"):
            wrong.append(f"rules: threshold {self.threshold}, expected at least 0; 0.1 is published")
        if self.nms_kernel < 1 or self.nms_kernel % 2 == 0:
            wrong.append(
                f"rules: nms_kernel {self.nms_kernel}, expected an odd number of at least 1; take one"
            )
        if self.top_k < 1:
            wrong.append(f"rules: top_k {self.top_k}, expected at least 1; 200 is published")
        for name in ("stuff_area", "thing_area"):
            if getattr(self, name) < 0:
                wrong.append(
                    f"rules: {name} {getattr(self, name)}, expected at least 0; 0 keeps all segments"
                )
        if wrong:
            raise InputError(*wrong)


class SegmentMaps(NamedTuple):
    """The segments of a batch, with a place for every segment that could be: S = K + C of them.

    ids: [B, H, W] int64, 0 (VOID) to S; 1 ... K are instances in the order of their centres' pixels,
    K + 1 + c is the stuff of class index c. classes: [B, S + 1] int64 class indices, IGNORED where there is
    no such segment. scores: [B, S + 1] float32, 0 there. areas: [B, S + 1] int64 pixels; place 0 counts VOID.
    """

    ids: Tensor
    classes: Tensor
    scores: Tensor
    areas: Tensor


@torch.no_grad()
def segment(output: PanopticOutput, things: Tensor, rules: PanopticRules) -> SegmentMaps:
    """The segments of a batch of images from maps at the images' resolution.

    output: `semantic` is [B, C, H, W] logits, or [B, H, W] class indices where they are known, IGNORED for
    none. things: [C] bool. An instance has the class most of its pixels have (of equally many, the smallest).
    Its score is the heat of its centre times the mean probability of that class in its pixels; that of stuff
    is the mean probability. Class indices are certain. Pixels of things where no centre is found are VOID.
    """
    things = things.to(output.centre.device)
    _check(output, things)
    pixel_class, normaliser = _most_probable(output.semantic)
    centres = find_centres(
        output.centre[:, 0],
        threshold=rules.threshold,
        kernel=rules.nms_kernel,
        top_k=rules.top_k,
        strict=rules.strict_top_k,
    )
    is_thing = torch.cat([things.new_zeros(1), things])[pixel_class + 1]
    slots = group(output.offset, centres, is_thing)
    ids, classes, areas = merged(slots, pixel_class, things, rules)
    scores = _scores(output.semantic, normaliser, ids, classes, areas, centres)
    return SegmentMaps(ids, classes, scores, areas)


def annotate(
    maps: SegmentMaps, n: int, categories: Categories
) -> tuple[npt.NDArray[np.int32], tuple[Segment, ...]]:
    """Image n of a batch as the COCO format has it: [H, W] ids 1, 2, ... without gaps, and their segments."""
    classes = maps.classes[n].cpu().numpy()
    present = np.flatnonzero(classes != IGNORED)
    renumbered = np.zeros(len(classes), np.int32)
    renumbered[present] = np.arange(1, len(present) + 1)
    ids = renumbered[maps.ids[n].cpu().numpy()]
    scores = maps.scores[n].cpu().numpy()
    segments = [
        Segment(number, categories[int(classes[place])].id, score=float(scores[place]))
        for number, place in enumerate(present, start=1)
    ]
    return ids, measured(ids, segments)


def measured(ids: npt.NDArray[np.int32], segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Segments of ids 1, 2, ... with areas and boxes in a picture; those without a pixel are left out."""
    found = measure(ids)
    return tuple(
        replace(segment, area=found[segment.id][0], box=found[segment.id][1])
        for segment in segments
        if segment.id in found
    )


def _check(output: PanopticOutput, things: Tensor) -> None:
    semantic, centre, offset = (tuple(part.shape) for part in output)
    images, *size = semantic[0], *semantic[-2:]
    wrong = []
    if output.semantic.is_floating_point():
        if len(semantic) != 4 or semantic[1] != len(things):
            wrong.append(f"semantic logits {list(semantic)}, expected [B, {len(things)}, H, W]")
    elif len(semantic) != 3:
        wrong.append(f"semantic class indices {list(semantic)}, expected [B, H, W]")
    if centre != (images, 1, *size):
        wrong.append(f"centre {list(centre)}, expected {[images, 1, *size]}, as many pixels as semantic")
    if offset != (images, 2, *size):
        wrong.append(f"offset {list(offset)}, expected {[images, 2, *size]}, as many pixels as semantic")
    if wrong:
        raise ValueError("; ".join(wrong))


def _most_probable(semantic: Tensor) -> tuple[Tensor, Tensor | None]:
    """[B, H, W] class indices, and of logits the logarithm of the softmax's sum."""
    if not semantic.is_floating_point():
        return semantic.long(), None
    classes, normaliser = [], []
    step = max(1, LOGIT_BYTES // (4 * semantic[:, :, :1].numel()))
    for rows in torch.split(semantic, step, 2):
        largest, index = rows.float().max(1)
        classes.append(index)
        normaliser.append((rows.float() - largest[:, None]).exp_().sum(1).log_().add_(largest))
    return torch.cat(classes, 1), torch.cat(normaliser, 1)


def merged(
    slots: Tensor, pixel_class: Tensor, things: Tensor, rules: PanopticRules
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, classes and areas of `SegmentMaps`, all from one count of pixels per place and class."""
    images, places, kinds = len(slots), rules.top_k + 1, len(things) + 1  # with none of both
    device = slots.device
    image = torch.arange(images, device=device)[:, None, None]
    key = (image * places + slots).mul_(kinds).add_(pixel_class).add_(1).flatten()
    count = torch.zeros(images * places * kinds, dtype=torch.int64, device=device)
    count.scatter_add_(0, key, torch.ones((), dtype=torch.int64, device=device).expand(len(key)))
    count = count.view(images, places, kinds)
    votes = count[:, 1:, 1:]
    thing_areas, stuff_areas = votes.sum(2), count[:, 0, 1:].masked_fill(things, 0)
    areas = torch.cat([thing_areas, stuff_areas], 1)
    least = torch.full((areas.shape[1],), max(1, rules.thing_area), device=device)
    least[rules.top_k :] = max(1, rules.stuff_area)
    exists = areas >= least
    stuff_classes = torch.arange(len(things), device=device).expand(images, -1)
    classes = torch.cat([votes.argmax(2), stuff_classes], 1).masked_fill(~exists, IGNORED)
    areas = areas.masked_fill(~exists, 0)
    void = count.sum((1, 2)) - areas.sum(1)
    # the segment of every place and class: an instance in all its classes, stuff in its own
    number = torch.arange(1, areas.shape[1] + 1, device=device).masked_fill(~exists, 0)
    segments = torch.zeros_like(count)
    segments[:, 1:] = number[:, : rules.top_k, None]
    segments[:, 0, 1:] = number[:, rules.top_k :]
    ids = segments.flatten().index_select(0, key).view_as(slots)
    none = torch.full((images, 1), IGNORED, device=device)
    return ids, torch.cat([none, classes], 1), torch.cat([void[:, None], areas], 1)


def _scores(
    semantic: Tensor, normaliser: Tensor | None, ids: Tensor, classes: Tensor, areas: Tensor, centres: Centres
) -> Tensor:
    """[B, S + 1] float32: mean probability of the segment's class, for instances times the centre's heat."""
    if normaliser is None:
        scores = (classes != IGNORED).float()
    else:
        key = (ids + classes.shape[1] * torch.arange(len(ids), device=ids.device)[:, None, None]).flatten()
        own = classes.flatten().index_select(0, key).view_as(ids)
        logit = semantic.gather(1, own.clamp(min=0)[:, None])[:, 0].float()
        probability = (logit - normaliser).exp_().flatten().double()
        total = torch.zeros(classes.numel(), dtype=torch.float64, device=ids.device)
        total.scatter_add_(0, key, probability)
        mean = total.view_as(classes) / areas.clamp(min=1)
        scores = mean.masked_fill(classes == IGNORED, 0).float()
    instances = slice(1, 1 + centres.heat.shape[1])
    scores[:, instances] *= centres.heat
    return scores
