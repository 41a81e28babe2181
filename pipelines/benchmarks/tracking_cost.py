"""What tracking costs a training: seconds per step without MLflow, with its SQLite file, and with a server.

    OMP_NUM_THREADS=1 python pipelines/benchmarks/tracking_cost.py --steps 100 --rounds 3

A step is one of `make demo`: the network of configs/hn_ct.yaml on 2 patches of 40 x 40 x 40, with AdamW;
every step is shown to the record as in a training, which logs every LOG_EVERY steps. Blocks of steps take
turns, so that whatever else the machine does hits all alike, and a block ends when MLflow has all of it:

  on record  microseconds of the processor per step that the training's own thread spends on the record
  beside     those that all other threads of the process spend, which are MLflow's where torch has one thread
  tracking   both, less what runs beside without MLflow, as a share of a step

The clock is for orientation: on a busy machine it varies by more than tracking costs.

Starting MLflow costs once, and is timed apart: its import and the run's entry, for SQLite with its tables.

Predicted: 0.3% of a step. Measured in 3 blocks of 60 steps, one thread: 0.035% with SQLite, 0.009% with a
server.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from medattn.losses import segmentation_loss
from medattn.networks import create
from medattn.training import mirror
from medattn.training.loop import State
from medattn.training.tracking import Tracker
from medattn_pipelines.configfile import flatten, load_any
from medattn_pipelines.progress import print_table
from medattn_pipelines.record import Record

CONFIG = Path(__file__).resolve().parents[2] / "configs/hn_ct.yaml"
ORGANS, PATCH, BATCH = 7, (40, 40, 40), 2
LOG_EVERY = 20  # training.log_every's default
START_SECONDS = 300


@dataclass
class Mode:
    """One way of tracking, and what its blocks took per step."""

    name: str
    tracker: Tracker
    record: Record
    start_cpu_s: float
    step_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)
    inside_s: list[float] = field(default_factory=list)
    clock_s: list[float] = field(default_factory=list)


def demo_step() -> Callable[[], float]:
    """A training step, which returns its loss."""
    torch.manual_seed(0)
    config = load_any(CONFIG)
    options = dict(config.network.options)
    network = create(config.network.name, spatial_dims=3, in_channels=1, out_channels=1 + ORGANS, **options)
    optimizer = torch.optim.AdamW(network.parameters())
    image = torch.randn(BATCH, 1, *PATCH)
    label = torch.randint(0, 1 + ORGANS, (BATCH, *PATCH))
    drawn = torch.ones(BATCH, ORGANS, dtype=torch.bool)

    def step() -> float:
        loss = segmentation_loss(network(image), label, drawn)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A real MLflow server on loopback, with SQLite."""
    folder.mkdir()
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = os.environ | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    silent = subprocess.DEVNULL
    process = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, stdout=silent, stderr=silent
    )
    try:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def open_mode(name: str, folder: Path, uri: str | None) -> Mode:
    """A record of a run in a folder of its own. uri: of MLflow, None where nothing follows."""
    run = folder / name / "run"
    run.mkdir(parents=True)
    if uri is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    else:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    begun = time.process_time()
    parameters = flatten(load_any(CONFIG))
    tracker = Tracker(run, name=name, parameters=parameters, mirror=name != "off", experiment="cost")
    state = State()
    record = Record(tracker, lambda *done, **shown: None, state, LOG_EVERY, "Dice")
    mode = Mode(name, tracker, record, 0.0)
    drain(mode)
    mode.start_cpu_s = time.process_time() - begun
    return mode


def drain(mode: Mode) -> None:
    """Wait until MLflow has every line."""
    follower = mode.tracker._mirror
    until = time.monotonic() + START_SECONDS
    while follower is not None and not follower.idle() and time.monotonic() < until:
        time.sleep(0.05)


def block(mode: Mode, step: Callable[[], float], steps: int) -> None:
    """Time a block of steps."""
    inside, begun, own, clock = 0.0, time.process_time(), time.thread_time(), time.perf_counter()
    for _ in range(steps):
        values = {"loss": step(), "gradient_norm": 1.0, "learning_rate": 1e-3, "seconds_left": 1.0}
        before = time.thread_time()
        mode.record.state.step += 1
        mode.record.step(values)
        inside += time.thread_time() - before
    mode.clock_s.append((time.perf_counter() - clock) / steps)
    mode.step_s.append((time.thread_time() - own - inside) / steps)
    drain(mode)
    others = (time.process_time() - begun) - (time.thread_time() - own)
    mode.beside_s.append(others / steps)
    mode.inside_s.append(inside / steps)


def main() -> None:
    """Time the steps and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of a block")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="blocks of each way of tracking")
    args = parser.parse_args()
    step = demo_step()
    for _ in range(3):
        step()  # the first ones allocate
    mirror.CLOSE_SECONDS = START_SECONDS
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # a busy machine answers late
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        uri = stack.enter_context(server(folder / "store"))
        modes = [
            open_mode(*one)
            for one in (("off", folder, None), ("SQLite", folder, None), ("server", folder, uri))
        ]
        for number in range(args.rounds):
            for mode in modes[number % 3 :] + modes[: number % 3]:
                block(mode, step, args.steps)
                print(f"block {number + 1} of {args.rounds}: {mode.name}", file=sys.stderr, flush=True)
        for mode in modes:
            mode.tracker.close("finished")
    off = modes[0]
    step_s = median([seconds for mode in modes for seconds in mode.step_s])
    rows = []
    for mode in modes:
        inside, beside, clock = median(mode.inside_s), median(mode.beside_s), median(mode.clock_s)
        rows.append(
            (
                mode.name,
                f"{1000 * median(mode.step_s):.1f}",
                f"{1e6 * inside:.0f}",
                f"{1e6 * beside:.0f}",
                f"{(inside + beside - median(off.beside_s)) / step_s:.3%}",
                f"{1000 * clock:.1f}",
                f"{mode.start_cpu_s:.1f}",
            )
        )
    header = ("MLflow", "step ms", "on record us", "beside us", "tracking", "clock ms", "start s")
    title = f"{args.rounds} blocks of {args.steps} steps, {torch.get_num_threads()} threads, "
    print_table(f"{title}load {os.getloadavg()[0]:.1f}", header, rows)


if __name__ == "__main__":
    main()
