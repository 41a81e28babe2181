"""Attention methods compared on one data set: the same config, budget and seeds for each, one table of all.

    python pipelines/benchmarks/attention_methods.py configs/hn_ct.yaml runs/methods training.max_minutes=10
    python pipelines/benchmarks/attention_methods.py configs/hn_ct.yaml runs/methods training.steps=1500 \\
        training.max_minutes=null --seeds 0 1 2 --methods unet unet_block unet_psa

The first method is what the others are set against. Runs that are complete are kept and those that were
interrupted go on, so the same command finishes what a killed one began. The table says of each method:

  Dice         per organ and their mean, over the validation cases; with several seeds the mean of the runs
  training     of the optimisation as it ran, and of one step with the steps of all methods interleaved
  inference    `medattn predict` on one case without loading the model, and the most memory that it held
  parameters, FLOPs    counted; FLOPs of a forward pass of one patch

Steps and inference are timed after the trainings, in turn, so that other work hits all methods alike.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from training_step import step_seconds

import medattn_kernels.flops  # noqa: F401  the counter knows our operators from here on
from medattn.atomic import write_text
from medattn.data.cases import read_cases
from medattn.errors import InputError
from medattn.networks.registry import builder
from medattn.segmenter import ModelCard, load_card
from medattn_pipelines.config import Config
from medattn_pipelines.configfile import dump, load
from medattn_pipelines.progress import print_table
from medattn_pipelines.runs import choose_device, choose_precision

METHODS = ("unet", "unet_block", "unet_axial", "unet_lambda", "unet_crosscov")
MEDATTN = (sys.executable, "-m", "medattn_pipelines.cli")


@dataclass(frozen=True)
class Cost:
    """What one method takes: seconds per training step, seconds and bytes per case, FLOPs per patch."""

    parameters: int
    flops: int
    step_s: float
    case_s: float
    case_bytes: int


def run_folder(out: Path, method: str, seed: int) -> Path:
    """Where a method is trained with a seed."""
    return out / f"{method}-seed{seed}"


def train(config_file: Path, overrides: Sequence[str], run: Path, method: str, seed: int) -> Config:
    """Train to the end what is not complete yet. Raises InputError where the folder holds another run."""
    given = [*overrides, f"network.name={method}", f"seed={seed}", f"run.dir={run}"]
    config = load(config_file, given)
    kept = run / "config.yaml"
    if kept.is_file() and kept.read_text(encoding="utf-8") != dump(config):
        raise InputError(f"{run}: trained with another config; choose another folder, or delete this one")
    if not (run / "report/metrics.json").is_file():
        going_on = ["--resume"] if (run / "checkpoints/last").exists() else []
        print(f"== {method}, seed {seed}: {run}", flush=True)
        done = subprocess.run([*MEDATTN, "train", str(config_file), *given, *going_on], check=False)
        if done.returncode or not (run / "report/metrics.json").is_file():
            raise InputError(f"{run}: training ended with code {done.returncode}; the same command goes on")
    return config


def dice_of(run: Path) -> dict[str, float]:
    """Organ -> mean Dice of a run's report, and their mean first."""
    report = json.loads((run / "report/metrics.json").read_text(encoding="utf-8"))
    organs = {name: scores["dice"]["mean"] for name, scores in report["per_organ"].items()}
    return {"mean": report["mean"]["dice"]["mean"]} | organs


def minutes_of(run: Path) -> float:
    """Wall-clock minutes that the optimisation took."""
    seconds: float = load_card(run / "model").provenance["seconds"]
    return seconds / 60


def flops_of(card: ModelCard) -> int:
    """FLOPs of a forward pass of one patch, counted on shapes alone."""
    with torch.device("meta"):
        network, patch = card.build().eval(), torch.empty(1, 1, *card.plan.patch_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(patch)
    return int(counter.get_total_flops())


def predict_case(run: Path, image: Path) -> tuple[float, int]:
    """Seconds of `medattn predict` on one case, and the peak of its memory in bytes.

    On a GPU that of the device; else the resident memory of the process, libraries and all.
    """
    with tempfile.TemporaryDirectory() as out:
        command = [*MEDATTN, "predict", str(run / "model"), str(image), "--output", out]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise InputError(f"{' '.join(command)}: ended with code {os.waitstatus_to_exitcode(status)}")
        report = json.loads((Path(out) / "report.json").read_text(encoding="utf-8"))
    return report["cases"][0]["seconds"], report.get("gpu_peak_bytes", 1024 * usage.ru_maxrss)


def measure(config: Config, runs: dict[str, Path], image: Path, repeats: int) -> dict[str, Cost]:
    """The cost of each method; what is timed is timed in turn."""
    device = choose_device(config.training.device)
    low = choose_precision(config.training.precision, device) == torch.bfloat16
    cards = {method: load_card(run / "model") for method, run in runs.items()}
    networks = {method: card.build().to(device).train() for method, card in cards.items()}
    plan = next(iter(cards.values())).plan
    patch = torch.randn(config.training.batch_size, 1, *plan.patch_size, device=device)
    steps = step_seconds(networks, patch, len(plan.organs), low=low, repeats=repeats)
    cases: dict[str, list[tuple[float, int]]] = {method: [] for method in runs}
    for _ in range(max(1, repeats // 4)):
        for method, run in runs.items():
            cases[method].append(predict_case(run, image))
    return {
        method: Cost(
            parameters=sum(p.numel() for p in network.parameters()),
            flops=flops_of(cards[method]),
            step_s=median(steps[method]),
            case_s=median(seconds for seconds, _ in cases[method]),
            case_bytes=max(peak for _, peak in cases[method]),
        )
        for method, network in networks.items()
    }


def table(out: Path, methods: Sequence[str], seeds: Sequence[int], costs: dict[str, Cost]) -> list[list[str]]:
    """Header and a row per method; in brackets what it is of the first method's."""
    scores = {m: [dice_of(run_folder(out, m, seed)) for seed in seeds] for m in methods}
    minutes = {m: fmean(minutes_of(run_folder(out, m, seed)) for seed in seeds) for m in methods}
    organs = list(scores[methods[0]][0])
    cost_columns = ["training min", "step ms", "inference s", "memory GiB", "parameters", "GFLOPs a patch"]
    rows = [["method", *("mean Dice" if organ == "mean" else organ for organ in organs), *cost_columns]]
    first = costs[methods[0]]
    for method in methods:
        cost = costs[method]
        dice = [_dice([s[o] for s in scores[method]], [s[o] for s in scores[methods[0]]]) for o in organs]
        pairs = (
            (minutes[method], minutes[methods[0]], ".1f"),
            (1e3 * cost.step_s, 1e3 * first.step_s, ".0f"),
            (cost.case_s, first.case_s, ".2f"),
            (cost.case_bytes / 2**30, first.case_bytes / 2**30, ".2f"),
            (cost.parameters, first.parameters, ",d"),
            (cost.flops / 1e9, first.flops / 1e9, ".2f"),
        )
        rows.append([method, *dice, *(_relative(*pair) for pair in pairs)])
    return rows


def _dice(values: Sequence[float], base: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread} ({fmean(values) - fmean(base):+.3f})"


def _relative(value: float, base: float, form: str) -> str:
    return f"{value:{form}} ({value / base:.3f})"


def write(out: Path, title: str, rows: Sequence[Sequence[str]]) -> None:
    """The table as Markdown and as CSV; on the terminal, where it would be too wide, Dice and then ratios."""
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    write_text(out / "methods.md", "\n".join([title, "", *lines, ""]))
    with (out / "methods.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    cut = rows[0].index("training min")
    dice = [[cell.split(" (")[0] for cell in row[:cut]] for row in rows]
    ratios = [[cell.split("(")[-1].rstrip(")") for cell in row[cut:]] for row in rows[1:]]
    print_table(title, dice[0], dice[1:])
    first = f"of {rows[1][0]}'s"
    print_table(
        "", [first, *rows[0][cut:]], [[row[0], *cells] for row, cells in zip(rows[1:], ratios, strict=True)]
    )
    print(f"table: {out / 'methods.md'} and methods.csv")


def compare(args: Any) -> None:
    """Train, measure, write."""
    for method in args.methods:  # a typo shows now, not after the first trainings
        builder(method)
    for seed in args.seeds:
        for method in args.methods:
            run = run_folder(args.out, method, seed)
            config = train(args.config, args.overrides, run, method, seed)
    cases = read_cases(config.data.root)
    image = (cases.split("validation") or cases.cases)[0].image
    runs = {method: run_folder(args.out, method, args.seeds[0]) for method in args.methods}
    costs = measure(config, runs, image, args.repeats)
    title = f"{args.config.name} {' '.join(args.overrides)}, seeds {' '.join(map(str, args.seeds))}"
    write(args.out, title, table(args.out, args.methods, args.seeds, costs))


def main() -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, such as configs/hn_ct.yaml")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the runs and the table")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="fields of the config, for all methods")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="M", help="network names")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="K", help="a run for each")
    parser.add_argument("--repeats", type=int, default=12, metavar="N", help="timed steps per method")
    args = parser.parse_intermixed_args()
    try:
        compare(args)
    except InputError as error:
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
