"""`medattn reproduce`: train again from what a run folder records, and compare."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medattn.errors import InputError

if TYPE_CHECKING:
    from medattn.training.runrecord import RunRecord
    from medattn_pipelines.configfile import AnyConfig
    from medattn_pipelines.runcompare import Row

EXAMPLES = (
    "medattn reproduce runs/hn_ct",
    "medattn reproduce runs/hn_ct --output /scratch/again --tolerance 1e-4",
)
NOTES = """\
A run folder records what its training came from: config.yaml, and in run.json digests of the data, versions,
git commit, device, precision and threads. All of that is compared first. Other data or starting weights end
the command: that would be another experiment. Other versions are warnings: the numbers tell whether they
matter. Device, precision and the number of threads are taken over from the run.

Then the training is repeated into a folder of its own, and metrics.jsonl line by line, the weights of the
final model and the means of the report are compared, all but clock times.

On a CPU the same versions and threads give the same bits, and --tolerance is 0. On a GPU sums run in another
order each time; give the tolerance that you accept. With training.max_minutes the learning rate follows the
clock, and the end does too: such a run is repeated under the same limit, and differs.

exit code: 0 equal within the tolerance, 1 not, 2 if the run cannot be repeated here"""
CODE = ("version.", "mlflow.source.git.commit", "git.dirty")  # tags of run.json about what ran
SPELLED = {"float32": "fp32", "bfloat16": "bf16"}  # torch's names -> the config's
CALLED = {"mlflow.source.git.commit": "git commit", "git.dirty": "changes beside the commit"}


def arguments(parser: ArgumentParser) -> None:
    """RUN --output --tolerance"""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a complete run, such as runs/hn_ct")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the new run (default: RUN_reproduced beside RUN)",
    )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=0.0,
        metavar="X",
        help="largest difference of any number that still counts as equal (default: 0, to the bit)",
    )


def reproduce(args: Namespace) -> int:
    """Repeat a training and print how far the results differ; 0 if equal within the tolerance, else 1."""
    from medattn.atomic import require_new_folder
    from medattn.training.runrecord import read_record
    from medattn_pipelines.runcompare import compare_runs

    run: Path = args.run
    output: Path = args.output or Path(f"{run.resolve()}_reproduced")
    record = read_record(run)
    if record.status != "finished":
        raise InputError(
            f"{run}: the run is {record.status}, expected finished; complete it with --resume first"
        )
    require_new_folder(output)
    config = recorded_config(run, record, output)
    require_same_data(config, record, run)
    for warning in differences(record, config):
        print(f"warning: {warning}")
    reason = train_again(config, record)
    if reason.startswith("SIG"):
        print(f"stopped by {reason}; remove {output} and reproduce again")
        return 2
    rows = compare_runs(run, output)
    return _tell(rows, run, output, args.tolerance)


def recorded_config(run: Path, record: RunRecord, output: Path) -> AnyConfig:
    """The config of a run, for a new folder, with the device and precision that it ran in; not for MLflow."""
    from medattn_pipelines.configfile import load_any

    overrides = ["run.tracking=false"]
    for name in ("device", "precision"):
        if value := record.parameters.get(f"machine.{name}"):
            overrides.append(f"training.{name}={SPELLED.get(value, value)}")
    config = load_any(run / "config.yaml", overrides)
    fields = {"dir": output, "parent": None}
    return config.model_copy(update={"run": config.run.model_copy(update=fields)})


def require_same_data(config: AnyConfig, record: RunRecord, run: Path) -> None:
    """Raise InputError where data or starting weights are others than the run's."""
    from medattn_pipelines.datawatch import watch_data

    before = {one.name: one.digest for one in record.data}
    now = watch_data(config, run, resume=False).data_sets
    problems = [
        f"{one.source}: not what {run} was trained on (found {one.digest[:8]}, "
        f"{'recorded ' + before[one.name][:8] if one.name in before else 'nothing recorded'}); "
        "give it the old data back, or train anew with `medattn train`"
        for one in now
        if before.get(one.name) != one.digest
    ]
    if problems:
        raise InputError(*problems)


def differences(record: RunRecord, config: AnyConfig) -> list[str]:
    """Sentences about what is not as it was when the run was trained, and what is never the same."""
    from medattn.training.runrecord import provenance

    now = provenance()
    names = sorted(name for name in record.tags.keys() | now.keys() if name.startswith(CODE))
    found = [
        f"{CALLED.get(name, name.removeprefix('version.'))}: {record.tags.get(name, 'not known')} in the "
        f"run, {now.get(name, 'not known')} here"
        for name in names
        if record.tags.get(name) != now.get(name)
    ]
    if record.tags.get("git.dirty") == "true" == now.get("git.dirty"):
        found.append(
            "the run's code had changes beside its commit, which are not recorded; so has this one's"
        )
    for name, value in sorted(record.tags.items()):
        if name.startswith("resumed."):
            found.append(f"the run was resumed with another {name.removeprefix('resumed.')}, {value}")
    if (processes := record.parameters.get("machine.processes", "1")) != "1":
        found.append(f"the run had {processes} processes; start this under torchrun with as many")
    if record.parameters.get("machine.device") == "cuda" and not config.training.deterministic:
        found.append("the run was on CUDA without training.deterministic: equal bits are not to be expected")
    if config.training.max_minutes is not None:
        found.append(
            "training.max_minutes: the learning rate and the end followed the clock, so equal bits are not "
            "to be expected; a training to be reproduced has training.steps alone"
        )
    return found


def train_again(config: AnyConfig, record: RunRecord) -> str:
    """Train with as many threads as the run had; returns why it ended."""
    import torch

    from medattn_pipelines.training import train_config

    threads = torch.get_num_threads()
    torch.set_num_threads(int(record.parameters.get("machine.threads", threads)))
    try:
        return train_config(config).reason
    finally:
        torch.set_num_threads(threads)


def _tell(rows: Sequence[Row], run: Path, output: Path, tolerance: float) -> int:
    from medattn_pipelines.progress import print_table
    from medattn_pipelines.runcompare import largest

    header = ("what", "numbers", "equal", "largest difference", "where")
    cells = [
        (r.what, r.compared, r.equal, f"{r.difference:.3g}" if r.difference else "0", r.where) for r in rows
    ]
    print_table(f"{run} and {output}", header, cells)
    worst = largest(rows)
    if worst.difference == 0:
        print("equal to the bit")
        return 0
    inside = worst.difference <= tolerance
    size = "one of them lacks a number" if math.isinf(worst.difference) else f"{worst.difference:.3g}"
    print(
        f"{'equal within' if inside else 'different beyond'} the tolerance {tolerance:g}: "
        f"{worst.what} at {worst.where}: {size}"
    )
    return 0 if inside else 1


def _tolerance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < math.inf:
        raise ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


COMMAND: tuple[
    str, tuple[str, ...], Callable[[ArgumentParser], None], Callable[[Namespace], int], Callable[[], str]
]
COMMAND = (
    "Repeat a training from its run folder and compare the results.",
    EXAMPLES,
    arguments,
    reproduce,
    lambda: NOTES,
)
