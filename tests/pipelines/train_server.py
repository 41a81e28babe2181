"""Runs `medattn` commands in processes that need not import torch again, and kills them on demand.

Reads a JSON object per line: argv; folder, whose changes are counted; log, for output; kill, after how many
changes the process is to kill itself with SIGKILL, or null; at, a part of the name that the change must have.
after, the seconds after which it is killed whatever it does, or null. Answers a line: its exit code and how
many changes it made.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from importlib import import_module
from typing import Any

import torch

from medattn.networks import names
from medattn_pipelines.cli import main

PIPELINES = ("volumes", "classification", "panoptic", "image_evaluation")
LAZY = (
    *(f"medattn_pipelines.{name}" for name in PIPELINES),
    *("matplotlib.pyplot", "medattn.report.classification_page", "medattn.report.page", "torch._dynamo"),
)
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def count_changes(folder: str, counter: Any, kill: int | None, at: str) -> None:
    """Before each change of a file in `folder`, by whichever thread: count, and die at number `kill`."""
    owner, lock = os.getpid(), threading.Lock()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or os.getpid() != owner or not arguments:
            return
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        name = str(arguments[1] if event == "os.rename" else arguments[0])
        if folder in name and at in name:
            with lock:
                counter.value += 1
                if counter.value == kill:
                    os.kill(owner, signal.SIGKILL)

    sys.addaudithook(hook)


def run(request: dict[str, Any], counter: Any) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    count_changes(request["folder"], counter, request["kill"], request["at"])
    code = 70
    try:
        code = main(request["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(**values: int) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def wait(child: int, after: float | None) -> int:
    """Its status. Killed by the one process that waits for it: its number cannot be another's by then."""
    until = math.inf if after is None else time.monotonic() + after
    while time.monotonic() < until:
        done, status = os.waitpid(child, 0 if after is None else os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def serve() -> None:
    torch.set_num_threads(1)
    names()  # loads what networks need
    for module in LAZY:
        import_module(module)
    counter = multiprocessing.RawValue("i", 0)
    for line in sys.stdin:
        request = json.loads(line)
        counter.value = 0
        child = os.fork()
        if child == 0:
            run(request, counter)
        status = wait(child, request["after"])
        answer(code=os.waitstatus_to_exitcode(status), changes=counter.value)


if __name__ == "__main__":
    serve()
