"""A panoptic network with our axial attention against the same with maps of all pairs, as published code has.

    python pipelines/benchmarks/axial_deeplab.py --size 641
    python pipelines/benchmarks/axial_deeplab.py --network axial_deeplab_l --span 0 --modes inference

Both have the same weights; in evaluation their outputs are compared before anything is timed. Dense: logits
of every pair of positions of a line, stacked and batch-normalised as three maps per head, masked to the span,
then a softmax, all kept for the backward pass. A training step is a forward and a backward pass without
optimizer. Passes take turns and the median over rounds of the ratio counts. Memory is the peak of a pass
beyond weights and input: on a GPU as the allocator counts it, on a CPU that of a process of its own, in which
nothing else ran.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from medattn.errors import InputError
from medattn.layers.axial import AxialAttention2d
from medattn.networks import create
from medattn.panoptic import PanopticOutput
from medattn_pipelines.progress import print_table
from medattn_pipelines.runs import choose_device, choose_precision

MODES = ("inference", "training")
KINDS = ("ours", "dense")
TOLERANCE = 1e-4  # of the largest value of a map: two dozen layers in float32


class DenseAxialAttention(nn.Module):
    """The arithmetic of the authors' layer on the parameters of ours: [B, C, h, w] -> [B, C', h, w]."""

    def __init__(self, layer: AxialAttention2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """As `AxialAttention2d.forward`."""
        layer, axis = self.layer, self.layer.axis
        heads, g = layer.heads, layer.value_size
        lines = x.movedim(1, -1).movedim(1 + axis, 2)  # [B, other, L, C]
        batch, other, length, channels = lines.shape
        flat = nn.functional.linear(lines.reshape(-1, channels), layer.qkv_transform.weight[..., 0])
        qkv = layer.bn_qkv(flat).view(batch * other, length, heads, 2 * g).transpose(1, 2)
        q, k, v = torch.split_with_sizes(qkv, [g // 2, g // 2, g], -1)  # [lines, heads, L, ...]
        rel_q, rel_k, rel_v = self._tables(length)
        logits = torch.cat(
            [
                q @ k.mT,
                torch.einsum("nhid,ijd->nhij", q, rel_q),
                torch.einsum("nhjd,ijd->nhij", k, rel_k),
            ],
            1,
        )
        logits = layer.bn_similarity(logits).view(-1, 3, heads, length, length).sum(1)
        if layer.span is not None:
            place = torch.arange(length, device=x.device)
            far = (place[:, None] - place).abs() > layer.span // 2
            logits = logits.masked_fill(far, float("-inf"))
        weights = logits.softmax(-1)
        content, position = weights @ v, torch.einsum("nhij,ijd->nhid", weights, rel_v)
        both = torch.stack([content, position], -1).transpose(1, 2).reshape(batch * other * length, -1)
        out = layer.bn_output(both).view(batch, other, length, -1, 2).sum(-1)
        return cast(Tensor, out.movedim(2, 1 + axis).movedim(-1, 1))

    def _tables(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """[L, L, ...] each: the rows of queries, keys and values for every pair."""
        g, rows = self.layer.value_size, self.layer.relative.shape[1]
        place = torch.arange(length, device=self.layer.relative.device)
        column = (place[:, None] - place + rows // 2).clamp(0, rows - 1)
        rel_q, rel_k, rel_v = torch.split_with_sizes(self.layer.relative, [g // 2, g // 2, g])
        return rel_q.T[column], rel_k.T[rows - 1 - column], rel_v.T[column]


def made_dense(network: nn.Module) -> nn.Module:
    """A copy with every axial layer dense."""
    dense = copy.deepcopy(network)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, AxialAttention2d):
            parent, _, own = name.rpartition(".")
            setattr(dense.get_submodule(parent), own, DenseAxialAttention(layer))
    return dense


def build(args: argparse.Namespace) -> dict[str, nn.Module]:
    """Both networks, with the same weights."""
    torch.manual_seed(0)
    device = choose_device("auto")
    options = {"span": args.span or None, "image_size": args.size}
    network = create(args.network, **options).to(device)
    return {"ours": network, "dense": made_dense(network)}


def passes(network: nn.Module, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A pass in each mode."""
    device = choose_device("auto")
    low = choose_precision(args.precision, device) == torch.bfloat16
    image = torch.randn(args.batch, 3, args.size, args.size, device=device)

    def forward() -> PanopticOutput:
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return cast(PanopticOutput, network(image))

    @torch.inference_mode()
    def infer() -> None:
        network.eval()
        forward()

    def train() -> None:
        network.train()
        output = forward()
        torch.stack([part.float().square().mean() for part in output]).sum().backward()  # type: ignore[no-untyped-call]
        network.zero_grad()

    return {"inference": infer, "training": train}


@torch.inference_mode()
def require_equal(networks: Mapping[str, nn.Module], size: int) -> None:
    """Raises InputError where the outputs differ; the norms have other statistics than at their start."""
    device = next(networks["ours"].parameters()).device
    networks["ours"].train()(torch.randn(2, 3, size, size, device=device))
    networks["dense"].load_state_dict(_renamed(networks["ours"].state_dict(), networks["dense"].state_dict()))
    image = torch.randn(1, 3, size, size, device=device)
    found, expected = (networks[kind].eval()(image) for kind in KINDS)
    for name, one, other in zip(PanopticOutput._fields, found, expected, strict=True):
        difference = float((one - other).abs().max() / other.abs().max())
        if not difference <= TOLERANCE:
            raise InputError(f"{name}: ours and dense differ by {difference:.1e} of the largest value")


def _renamed(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """By the names of the dense network, in whose layers ours is called `layer`."""
    return {name: weights[name.replace(".layer.", ".")] for name in names}


def timed(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round, taken in turn; the first pass of each is not counted."""
    cuda = torch.cuda.is_available()
    found: dict[str, list[float]] = {kind: [] for kind in runs}
    for number in range(rounds + 1):
        for kind, run in runs.items():
            begun = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            if number:
                found[kind].append(1e3 * (time.perf_counter() - begun))
    return found


def peak_mib(kind: str, mode: str, args: argparse.Namespace) -> float:
    """What a pass holds at most beyond what was held before it."""
    if torch.cuda.is_available():
        run = passes(build(args)[kind], args)[mode]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_of_process, (kind, mode, args))


def _peak_of_process(kind: str, mode: str, args: argparse.Namespace) -> float:
    run = passes(build(args)[kind], args)[mode]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _peak_kib()
    run()
    return (_peak_kib() - before) / 2**10


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def row(mode: str, networks: Mapping[str, nn.Module], args: argparse.Namespace) -> tuple[Any, ...]:
    """A row of the table."""
    ms = timed({kind: passes(networks[kind], args)[mode] for kind in KINDS}, args.rounds)
    memory = [peak_mib(kind, mode, args) for kind in KINDS]
    faster = median(b / a for a, b in zip(ms["ours"], ms["dense"], strict=True))
    return (
        mode,
        *(f"{median(ms[kind]):.0f}" for kind in KINDS),
        f"{faster:.2f}",
        *(f"{mib:.0f}" for mib in memory),
        f"{memory[1] / memory[0]:.2f}",
    )


COLUMNS = ("pass", "ms ours", "ms dense", "dense / ours", "MiB ours", "MiB dense", "dense / ours")


def main() -> None:
    """Compare and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="axial_deeplab_s", metavar="NAME")
    parser.add_argument("--size", type=int, default=641, metavar="PIXELS", help="side of the images")
    parser.add_argument("--span", type=int, default=65, metavar="N", help="keys per query; 0: whole lines")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="images per pass")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed passes of each")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    args = parser.parse_args()
    networks = build(args)
    require_equal(networks, min(args.size, 129))
    table = [row(mode, networks, args) for mode in args.modes]
    title = (
        f"{args.network}, {args.batch} x {args.size} x {args.size} pixels, "
        f"span {args.span or 'whole lines'}, {args.precision}, "
        f"{choose_device('auto').type}, {torch.get_num_threads()} threads"
    )
    print_table(title, COLUMNS, table)


if __name__ == "__main__":
    main()
