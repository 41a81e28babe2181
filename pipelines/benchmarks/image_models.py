"""Our image networks against timm's implementation of the same ones: inference and training steps.

    OMP_NUM_THREADS=1 python pipelines/benchmarks/image_models.py --batch 8 --rounds 9
    python pipelines/benchmarks/image_models.py --models halonet26t lambda_resnet26t --compiled

Both have the same weights, and their outputs are compared (to 1e-5 of the largest logit) before anything is
timed. A training step is a forward and a backward pass; an optimizer would cost both the same. Each network
runs in both memory layouts, and of each library the faster layout counts. A pass of every candidate takes its
turn, so that whatever else the machine does hits all of them alike: the median over rounds of the ratio is
the result, milliseconds are for orientation. With one thread they are those of the processor, else of the
clock. On a GPU, networks are also compiled, and MiB are what a pass holds at its peak beyond what was there.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from image_input import load_torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from medattn.errors import InputError
from medattn.networks import create, resnet_weights, xcit
from medattn_pipelines.progress import print_table
from medattn_pipelines.runs import choose_device, choose_precision

CLASSES = 1000
TOLERANCE = 1e-5
WARMUP = 1  # the first passes allocate and compile
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
Pass = Callable[[], object]


@dataclass(frozen=True)
class Peer:
    """timm's name of a network, the image side that it is made for, and what ours needs to equal it."""

    name: str
    side: int
    options: Mapping[str, Any]


AS_TIMM = {"padding": "zero", "offsets": "queries"}
PEERS = {
    **{
        name: Peer(f"{name}_224", 224, {}) for name in (f"xcit_{n}_12_p16" for n in ("nano", "tiny", "small"))
    },
    **{name: Peer(name, 256, {}) for name in ("halonet26t", "halonet50ts", "eca_halonext26ts")},
    "halonet_h1": Peer("halonet_h1", 256, AS_TIMM),
    **{
        name: Peer(name, 256, {})
        for name in ("lambda_resnet26t", "lambda_resnet50ts", "lambda_resnet26rpt_256")
    },
    "resnet50": Peer("resnet50", 224, {}),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's network with the same weights, whose outputs are equal.

    Raises InputError where one of the two is not there or they differ.
    """
    peer = PEERS.get(name)
    if peer is None:
        raise InputError(f"no network of timm is known to be {name}")
    timm = importlib.import_module("timm")
    if peer.name not in timm.list_models():
        raise InputError(f"timm {timm.__version__} has no {peer.name}")
    ours, theirs = create(name, **peer.options), timm.create_model(peer.name)
    image = torch.randn(2, 3, peer.side, peer.side)
    _make_lifelike(theirs, image)
    family = xcit if name.startswith("xcit") else resnet_weights
    ours.load_state_dict(family.from_published(ours, theirs.state_dict()))
    with torch.inference_mode():
        expected, got = theirs.eval()(image), ours.eval()(image)
    difference = float((got - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise InputError(f"outputs differ by {difference:.1e} of the largest logit")
    return ours, theirs


@torch.no_grad()
def _make_lifelike(network: nn.Module, image: Tensor) -> None:
    """Batch norms with the statistics of noise, none of them zero; those that end a branch are weak.

    Means over many keys of noise hardly vary, and a norm that divided by that would amplify rounding.
    """
    norms = {name: m for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        weak = name.endswith(("bn3", "conv3_1x1.bn"))
        nn.init.uniform_(norm.weight, *((0.1, 0.3) if weak else (0.5, 1.5)))
        norm.momentum = 1.0
    network.train()(image)
    for norm in norms.values():
        assert norm.running_var is not None
        norm.running_var += 0.1
        norm.momentum = 0.1


@dataclass(frozen=True)
class Setting:
    """What is timed: images in a batch, the device, and whether products are in bfloat16."""

    batch: int
    device: torch.device
    low: bool
    rounds: int


def passes(
    network: nn.Module, side: int, setting: Setting, *, training: bool, compiled: bool
) -> dict[str, Pass]:
    """A pass in each memory layout, by the layout's name."""
    image = torch.randn(setting.batch, 3, side, side, device=setting.device)
    target = torch.randint(CLASSES, (setting.batch,), device=setting.device)

    def one(layout: torch.memory_format) -> Pass:
        placed = _placed(network, setting.device, layout).train(training)
        run = torch.compile(placed) if compiled else placed
        x = image.to(memory_format=layout)

        def step() -> None:
            with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.low):
                loss = F.cross_entropy(run(x), target)
            loss.backward()  # type: ignore[no-untyped-call]
            placed.zero_grad()

        @torch.inference_mode()
        def infer() -> None:
            with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.low):
                run(x)

        return step if training else infer

    return {name: one(layout) for name, layout in LAYOUTS.items()}


def _placed(network: nn.Module, device: torch.device, layout: torch.memory_format) -> nn.Module:
    """A copy with convolutions in the layout; `to` fails for weights of five axes, as in timm's lambdas."""
    placed = copy.deepcopy(network).to(device)
    for module in placed.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach().contiguous(memory_format=layout))
    return placed


def timed(candidates: Mapping[tuple[str, str], Pass], setting: Setting) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of every round of each candidate (library, layout), taken in turn."""
    clock = time.perf_counter
    if setting.device.type == "cpu" and torch.get_num_threads() == 1:
        clock = time.process_time
    found: dict[tuple[str, str], list[float]] = {name: [] for name in candidates}
    for number in range(WARMUP + setting.rounds):
        for name, run in candidates.items():
            begun = clock()
            run()
            if setting.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= WARMUP:
                found[name].append(1e3 * (clock() - begun))
    return found


def peak_mib(run: Pass, setting: Setting) -> float | None:
    """What a pass holds at most beyond what was held before it; None without a GPU."""
    if setting.device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def rows(
    name: str, setting: Setting, modes: Sequence[str], compiled: Sequence[bool]
) -> Iterator[tuple[Any, ...]]:
    """Rows of the table for a network. Raises InputError where there is nothing to compare."""
    ours, theirs = pair(name)
    count = sum(p.numel() for p in ours.parameters())
    for compile_, mode in ((c, m) for c in compiled for m in modes):
        candidates = {
            (library, layout): run
            for library, network in (("ours", ours), ("timm", theirs))
            for layout, run in passes(
                network, PEERS[name].side, setting, training=mode == "training", compiled=compile_
            ).items()
        }
        ms = timed(candidates, setting)
        best = {
            library: min(((library, layout) for layout in LAYOUTS), key=lambda one: median(ms[one]))
            for library in ("ours", "timm")
        }
        mine, others = best["ours"], best["timm"]
        ratio = median(b / a for a, b in zip(ms[mine], ms[others], strict=True))
        memory = [peak_mib(candidates[one], setting) for one in (mine, others)]
        yield (
            name,
            count,
            f"{mode}, compiled" if compile_ else mode,
            *(f"{median(ms[one]):.1f} {one[1]}" for one in (mine, others)),
            f"{ratio:.2f}",
            *(None if mib is None else f"{mib:.0f}" for mib in memory),
        )


COLUMNS = ("network", "parameters", "pass", "ms ours", "ms timm", "timm / ours", "MiB ours", "MiB timm")


def main() -> None:
    """Time the networks and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(PEERS), metavar="NAME")
    parser.add_argument(
        "--modes", nargs="+", choices=("inference", "training"), default=["inference", "training"]
    )
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="images per pass")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="timed passes of each candidate")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--compiled", action="store_true", help="networks compiled too, as always on a GPU")
    args = parser.parse_args()
    torch.manual_seed(0)
    load_torchvision()
    device = choose_device("auto")
    low = choose_precision(args.precision, device) == torch.bfloat16
    setting = Setting(args.batch, device, low, args.rounds)
    compiled = [False, True] if args.compiled or device.type == "cuda" else [False]
    table: list[tuple[Any, ...]] = []
    for name in args.models:
        try:
            for row in rows(name, setting, args.modes, compiled):
                print(*row, flush=True)  # the table comes at the end of what may be hours
                table.append(row)
        except InputError as error:
            print(f"{name}: skipped, {error}", flush=True)
    load = f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}" if device.type == "cpu" else ""
    print_table(
        f"{device}, {args.precision}, {args.batch} images, {args.rounds} rounds {load}", COLUMNS, table
    )


if __name__ == "__main__":
    main()
