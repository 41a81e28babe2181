"""What the processes of one training tell each other, and the batch from which 64 GPUs are 90% efficient.

    python pipelines/benchmarks/scaling.py

On paper: networks are built without memory, their arithmetic is counted, and docs/scaling.md says what is
assumed of the GPUs and links and derives the formulas. `communication.py` measures the bytes.

The batch is found twice: by the closed form, and by replaying the backward pass, in which gradients arrive
as their layers are passed and buckets of them cross the link one after another.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from step_messages import BUCKET, HALVES, Message, Work, buckets, messages, read_work, sharded_messages

from medattn_pipelines.progress import print_table

WORKLOADS = (
    "hn_ct network.name=unet",
    "hn_ct",
    "hn_ct network.name=unet_axial",
    "imagenet/halonet_h1",
    "imagenet/xcit_small_12_p16",
    "imagenet/lambda_resnet50",
    *(f"cityscapes/axial_deeplab_{size}" for size in ("s", "m", "l", "xl")),
    "cityscapes/panoptic_deeplab_resnet50",
)
WORLD, GOAL = 64, 0.9
PEAK_FLOPS = 990e12  # H200, dense bfloat16, the vendor's figure
BACKWARD = 2 / 3  # of the arithmetic of a step

Row = Sequence[str | int | float | None]


@dataclass(frozen=True)
class Cluster:
    """Machines of eight GPUs. Bandwidths in bytes per second and GPU, one way.

    latency: seconds of a collective however small.
    """

    name: str
    inside: float
    between: float
    latency: float
    node: int = 8

    def seconds(self, message: Message, world: int) -> float:
        """Reduced inside the machines, between them, and back."""
        if world == 1:
            return 0.0
        g = min(self.node, world)
        m = world // g
        half = message.size * ((g - 1) / g / self.inside + (m - 1) / m / g / self.between)
        return message.times * (self.latency + HALVES[message.kind] * half)


ACHIEVED = 0.8  # of line rate
CLUSTERS = (
    Cluster("400 Gb/s per GPU", ACHIEVED * 450e9, ACHIEVED * 50e9, 50e-6),
    Cluster("400 Gb/s per machine", ACHIEVED * 450e9, ACHIEVED * 50e9 / 8, 50e-6),
    Cluster("100 Gb/s Ethernet per machine", ACHIEVED * 450e9, ACHIEVED * 12.5e9 / 8, 200e-6),
)


@dataclass(frozen=True)
class Setting:
    """How a network is trained. speed: FLOPs per second that a GPU sustains."""

    work: Work
    cluster: Cluster
    speed: float = 0.4 * PEAK_FLOPS
    accumulate: int = 1
    synced: bool = False
    cap: int = BUCKET
    world: int = WORLD

    @property
    def sample_seconds(self) -> float:
        """Of a forward and a backward pass of one sample."""
        return self.work.flops / (1 - BACKWARD) / self.speed

    def blocked(self) -> float:
        """Seconds of a step in which the GPU waits for messages that nothing hides."""
        sent = messages(self.work, synced=self.synced, accumulate=self.accumulate)
        return sum(self.cluster.seconds(one, self.world) for one in sent if one.about != "gradients")

    def transfers(self) -> list[tuple[float, float]]:
        """Of each bucket, the share of the backward pass after which it is full, and its seconds."""
        return [
            (share, self.cluster.seconds(Message("all-reduce", "gradients", size), self.world))
            for share, size in buckets(self.work.gradients, self.cap)
        ]


def closed_seconds(setting: Setting, goal: float = GOAL) -> float:
    """How long the passes of a batch must take for a GPU to compute the share `goal` of the time; a formula.

    The last bucket is full when the backward pass ends, so it always waits; the others hide behind that pass.
    """
    seconds = [seconds for _, seconds in setting.transfers()]
    room, blocked = setting.accumulate * (1 / goal - 1), setting.blocked()
    return max((seconds[-1] + blocked) / room, (sum(seconds) + blocked) / (BACKWARD + room))


def efficiency(setting: Setting, seconds: float) -> float:
    """Share of a step in which a GPU computes, by replaying it. seconds: of the passes of a batch."""
    backward = BACKWARD * seconds
    free = 0.0  # when the link is, from the start of the last backward pass of the step
    for share, transfer in setting.transfers():
        free = max(free, share * backward) + transfer
    busy = setting.accumulate * seconds
    return busy / (busy + max(0.0, free - backward) + setting.blocked())


def replayed_seconds(setting: Setting, goal: float = GOAL) -> float:
    """What `closed_seconds` estimates, from `efficiency`, which grows with the seconds; to 0.01%."""
    low, high = 0.0, 2 * closed_seconds(setting, goal)
    while efficiency(setting, high) < goal:
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if efficiency(setting, middle) >= goal else (middle, high)
    return high


def smallest_batch(setting: Setting, goal: float = GOAL) -> int:
    """Samples per GPU and pass from which efficiency is `goal`."""
    return ceil(replayed_seconds(setting, goal) / setting.sample_seconds)


def print_bytes(works: Sequence[Work]) -> None:
    """What a process sends in a step."""
    rows: list[Row] = []
    for work in works:
        plain, synced = messages(work), messages(work, synced=True)

        def mb(sent: Sequence[Message], about: str, world: int) -> str:
            return f"{sum(one.sent(world) for one in sent if one.about == about) / 1e6:.2f}"

        rows.append(
            (
                work.name,
                work.size // 4,
                f"{work.flops / 2e9:.2f}",
                len(buckets(work.gradients)),
                *(mb(plain, "gradients", world) for world in (2, 4, WORLD)),
                mb(plain, "buffers", WORLD),
                4 * len(work.norms),
                mb(synced, "norms", WORLD),
                *(mb(sharded_messages(work, WORLD), about, WORLD) for about in ("weights", "gradients")),
            )
        )
    columns = ["network", "parameters", "GMAC", "buckets", *(f"DDP at {n}" for n in (2, 4, WORLD))]
    columns += ["buffers", "norm messages", "norms", "FSDP gathers", "FSDP scatters"]
    print_table(f"MB (10^6 bytes) sent per process and step; the right half at {WORLD} GPUs", columns, rows)


def print_batches(works: Sequence[Work], speed: float) -> None:
    """How long a GPU must compute on each cluster, and the samples that this takes."""
    rows: list[Row] = []
    for work in works:
        settings = [Setting(work, cluster, speed) for cluster in CLUSTERS]
        row: list[str | int | float | None] = [
            work.name,
            f"{work.batch / WORLD:g}",
            1e3 * settings[0].sample_seconds,
        ]
        for setting in settings:
            row += [f"{1e3 * seconds(setting):.1f}" for seconds in (closed_seconds, replayed_seconds)]
            row.append(smallest_batch(setting))
        rows.append(row)
    columns = ["network", "config's", "ms a sample"]
    for cluster in CLUSTERS:
        columns += [f"{cluster.name}: ms, formula", "replayed", "samples"]
    print_table(f"What a GPU must compute per pass for {GOAL:.0%} at {WORLD} GPUs", columns, rows)


def print_causes(works: Sequence[Work], speed: float) -> None:
    """What the smallest batch depends on."""
    cluster = CLUSTERS[0]
    rows: list[Row] = []
    for work in works:
        base = Setting(work, cluster, speed)
        changed = (
            base,
            replace(base, cap=25 * 2**20),
            replace(base, accumulate=4),
            replace(base, accumulate=16),
            replace(base, synced=True),
            replace(base, synced=True, accumulate=4),
            replace(base, speed=speed / 2),
        )
        rows.append((work.name, *(smallest_batch(setting) for setting in changed)))
    columns = ["network", "as is", "25 MiB buckets", "accumulate 4", "accumulate 16"]
    columns += ["norms synced", "synced, accumulate 4", "half the speed"]
    print_table(f"Samples per GPU and pass, {cluster.name}, replayed", columns, rows)


def print_efficiency(works: Sequence[Work], speed: float) -> None:
    """Efficiency against batch."""
    batches = [2**power for power in range(10)]
    rows = [
        (
            work.name,
            cluster.name,
            *(f"{efficiency(setting, b * setting.sample_seconds):.0%}" for b in batches),
        )
        for work in works
        for cluster in CLUSTERS
        for setting in [Setting(work, cluster, speed)]
    ]
    columns = ("network", "between machines", *map(str, batches))
    print_table(f"Efficiency of {WORLD} GPUs at samples per GPU, replayed", columns, rows)


def main() -> None:
    """Count the networks and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.4, metavar="SHARE", help="of peak that a GPU sustains"
    )
    args = parser.parse_args()
    works = [read_work(line) for line in WORKLOADS]
    speed = args.utilisation * PEAK_FLOPS
    print_bytes(works)
    print_batches(works, speed)
    print_causes(works, speed)
    shown = ("unet_block", "halonet_h1", "axial_deeplab_l")
    print_efficiency([work for work in works if work.name in shown], speed)


if __name__ == "__main__":
    main()
