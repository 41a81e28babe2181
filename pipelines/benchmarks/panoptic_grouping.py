"""Seconds from a panoptic network's maps to segments, against a loop over instances as published code has it.

    python pipelines/benchmarks/panoptic_grouping.py --threads 1 2 --repeats 5

The loop is the post-processing of Panoptic-DeepLab's authors and of Detectron2 with the same torch
operations: max pooling with the whole square, a map of distances [instances, pixels], masks instance by
instance, then class by class. Both get the same maps of one image, 1025 x 1025 pixels with 100 instances of
80 classes of things over 53 of stuff, and the classes of its pixels (`segment` also takes logits; the last
row is that, with the loop's argmax, softmax and scores). Segments are compared pixel by pixel before anything
is timed. By turns, so that whatever else the machine does hits both alike; medians, of the processor's
seconds with one thread and of the clock's with more. The parts: centres (pooling and top k),
grouping (pixels to centres), merging (votes, areas, ids).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from medattn.inference.panoptic import PanopticRules, SegmentMaps, merged, segment
from medattn.inference.panoptic_centres import find_centres, group
from medattn.panoptic import PanopticOutput
from medattn_pipelines.progress import print_table

THINGS, STUFF = 80, 53
RULES = PanopticRules()
DIVISOR = 1000
COLUMNS = ("part", "threads", "loop ms", "ours ms", "times faster")


def scene(side: int, instances: int, noise: float, seed: int) -> tuple[PanopticOutput, Tensor]:
    """Maps as a good network gives them, with class indices, and which classes are things.

    Instances are discs around centres that keep a distance; offsets have an error of `noise` pixels, and a
    tenth of the pixels of things a wrong class. The rest is bands of stuff.
    """
    generator = torch.Generator().manual_seed(seed)
    random = torch.rand(20 * instances, 2, generator=generator).mul(side - 1).round()
    kept: list[Tensor] = []
    for point in random:
        if all(float((point - other).norm()) > 45 for other in kept) and len(kept) < instances:
            kept.append(point)
    centres = torch.stack(kept)
    assert len(centres) == instances, "too many instances for the image"
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    distance = torch.full((side, side), float("inf"))
    owner = torch.zeros(side, side, dtype=torch.int64)
    for number, (cy, cx) in enumerate(centres):
        own = (y - cy).square() + (x - cx).square()
        owner[own < distance] = number
        distance = torch.minimum(distance, own)
    heat = torch.exp(-distance / (2 * 8**2)) * (0.5 + 0.5 * torch.rand(instances, generator=generator))[owner]
    offset = centres[owner].movedim(-1, 0) - torch.stack([y, x])
    offset += noise * torch.randn(offset.shape, generator=generator)
    kinds = torch.randint(THINGS, (instances,), generator=generator)[owner]
    wrong = torch.rand(side, side, generator=generator) < 0.1
    kinds[wrong] = torch.randint(THINGS, (int(wrong.sum()),), generator=generator)
    bands = THINGS + (y // (side / STUFF)).long()
    semantic = torch.where(distance < 40**2, kinds, bands)
    things = torch.arange(THINGS + STUFF) < THINGS
    return PanopticOutput(semantic[None], heat[None, None], offset[None]), things


def loop_centres(heat: Tensor) -> Tensor:
    """[K, 2] pixels of centres; heat: [1, H, W]."""
    heat = F.threshold(heat, RULES.threshold, -1)
    pooled = F.max_pool2d(heat, RULES.nms_kernel, 1, (RULES.nms_kernel - 1) // 2)
    heat = torch.where(heat == pooled, heat, -1)[0]
    last = heat.flatten().topk(RULES.top_k).values[-1].clamp(min=0)
    return (heat > last).nonzero()


def loop_groups(centres: Tensor, offset: Tensor, thing: Tensor) -> Tensor:
    """[H, W] ids of instances, 0 on stuff; offset: [2, H, W]."""
    height, width = thing.shape
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    places = (torch.stack([y, x]) + offset).flatten(1).T[None]
    distance = torch.norm(centres[:, None] - places, dim=-1)
    return (distance.argmin(0).view(height, width) + 1) * thing


def loop_merged(semantic: Tensor, ids: Tensor, things: Tensor) -> Tensor:
    """[H, W] class * DIVISOR + number of the instance in its class; -1 void."""
    result = torch.full_like(semantic, -1)
    numbers: dict[int, int] = {}
    thing = things[semantic]
    for instance in ids.unique():
        mask = (ids == instance) & thing
        if instance == 0 or not mask.any():
            continue
        kind = int(semantic[mask].mode().values)
        numbers[kind] = numbers.get(kind, 0) + 1
        result[mask] = kind * DIVISOR + numbers[kind]
    for kind in semantic.unique().tolist():
        mask = (semantic == kind) & (ids == 0)
        if not things[kind] and int(mask.sum()) >= RULES.stuff_area:
            result[mask] = kind * DIVISOR
    return result


def loop(output: PanopticOutput, things: Tensor) -> Tensor:
    """All of it for one image; `semantic` has class indices."""
    semantic = output.semantic[0]
    ids = loop_groups(loop_centres(output.centre[0]), output.offset[0], things[semantic])
    return loop_merged(semantic, ids, things)


def loop_with_scores(logits: Tensor, output: PanopticOutput, things: Tensor) -> Tensor:
    """From logits, with the mean probability of every segment's class, which Detectron2 has for instances."""
    semantic = logits[0].argmax(0)
    result = loop(output._replace(semantic=semantic[None]), things)
    probability = logits[0].softmax(0)
    scores = [
        probability[value // DIVISOR][result == value].mean()
        for value in result.unique().tolist()
        if value >= 0
    ]
    return torch.stack(scores)


def ours_as_loop(maps: SegmentMaps, things: Tensor) -> Tensor:
    """Segments in the loop's numbering: class * DIVISOR + number in the class, in the order of the places."""
    numbers: dict[int, int] = {}
    values = [-1]
    for kind in maps.classes[0, 1:].tolist():
        if kind >= 0 and things[kind]:
            numbers[kind] = numbers.get(kind, 0) + 1
        values.append(-1 if kind < 0 else kind * DIVISOR + numbers.get(kind, 0) * int(things[kind]))
    return torch.tensor(values)[maps.ids[0]]


def medians(
    loop: Callable[[], object], ours: Callable[[], object], repeats: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Milliseconds of both, by turns; the first turn is left out."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for run, times in zip((loop, ours), seconds, strict=True):
            begun = clock()
            run()
            if repeat:
                times.append(clock() - begun)
    return 1e3 * median(seconds[0]), 1e3 * median(seconds[1])


def parts(
    output: PanopticOutput, things: Tensor, logits: Tensor
) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """What is timed: name, the loop's, ours."""
    semantic, heat, offset = output
    thing = things[semantic]
    found = find_centres(heat[:, 0], threshold=0.1, kernel=41, top_k=200, strict=False)
    points, slots = loop_centres(heat[0]), group(offset, found, thing)
    yield "all, from classes", lambda: loop(output, things), lambda: segment(output, things, RULES)
    yield (
        "  centres",
        lambda: loop_centres(heat[0]),
        lambda: find_centres(heat[:, 0], threshold=0.1, kernel=41, top_k=200, strict=False),
    )
    yield (
        "  grouping",
        lambda: loop_groups(points, offset[0], thing[0]),
        lambda: group(offset, found, thing),
    )
    yield (
        "  merging",
        lambda: loop_merged(semantic[0], slots[0], things),
        lambda: merged(slots, semantic, things, RULES),
    )
    whole = output._replace(semantic=logits)
    yield (
        "all, from logits, with scores",
        lambda: loop_with_scores(logits, output, things),
        lambda: segment(whole, things, RULES),
    )


def main() -> None:
    """Compare, time and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=1025, metavar="PIXELS", help="of the square image")
    parser.add_argument("--instances", type=int, default=100, metavar="N", help="in the image")
    parser.add_argument("--noise", type=float, default=5.0, metavar="PIXELS", help="error of offsets")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of each")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2), metavar="T", help="of torch")
    args = parser.parse_args()
    output, things = scene(args.side, args.instances, args.noise, seed=0)
    logits = torch.zeros(1, THINGS + STUFF, args.side, args.side).scatter_(1, output.semantic[:, None], 5.0)
    table = []
    with torch.no_grad():
        for form in (output, output._replace(semantic=logits)):
            maps = segment(form, things, RULES)
            assert torch.equal(ours_as_loop(maps, things), loop(output, things)), (
                "other segments than the loop's"
            )
        found = int((maps.classes[0, 1 : RULES.top_k + 1] >= 0).sum())
        for threads in args.threads:
            torch.set_num_threads(threads)
            clock = time.process_time if threads == 1 else time.perf_counter
            for name, theirs, ours in parts(output, things, logits):
                slow, fast = medians(theirs, ours, args.repeats, clock)
                table.append((name, str(threads), f"{slow:.0f}", f"{fast:.1f}", f"{slow / fast:.1f}"))
    print_table(
        f"{args.side} x {args.side} pixels, {found} instances, identical segments, {args.repeats} runs",
        COLUMNS,
        table,
    )


if __name__ == "__main__":
    main()
