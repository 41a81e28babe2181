"""What a trial costs: the time of a forward pass, the peak of memory, the number of weights."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from medattn.classifier import load_classifier
from medattn.errors import InputError
from medattn.panoptic_segmenter import load_panoptic
from medattn.segmenter import load_model
from medattn_pipelines.configfile import AnyConfig
from medattn_pipelines.runs import choose_device, choose_precision

PASSES, WARM_PASSES = 7, 2
MIB = 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def count_parameters(network: nn.Module) -> int:
    """Weights that training changes."""
    return sum(weight.numel() for weight in network.parameters())


def measure_model(config: AnyConfig, model: Path) -> dict[str, float]:
    """Parameters, and latency in ms: the median of forward passes of one patch or image.

    Of the size that is trained on, on the device and in the precision of the config.
    """
    network, size = _network(config, model)
    device = choose_device(config.training.device)
    precision = choose_precision(config.training.precision, device)
    network = network.eval().to(device)
    image = torch.zeros(1, *size, device=device)
    seconds = []
    with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision == torch.bfloat16):
        for _ in range(WARM_PASSES + PASSES):
            begun = time.perf_counter()
            network(image)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
    return {
        "parameters": float(count_parameters(network)),
        "latency": 1000 * median(seconds[WARM_PASSES:]),
    }


def _network(config: AnyConfig, model: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """The network of a model folder and the size of its input, [C, *size]."""
    card: Any
    if config.task == "classification":
        card, network = load_classifier(model)
        return network, (3, config.inference.image_size, config.inference.image_size)
    if config.task == "panoptic":
        card, network = load_panoptic(model)
        return network, (3, *config.crop_size)
    card, network = load_model(model)
    return network, (1, *card.plan.patch_size)


@contextmanager
def peak_memory(wanted: str) -> Iterator[dict[str, float]]:
    """Fills in "memory" at the end, in MiB: the peak of the device's memory or, on a CPU, of the process's.

    wanted: the device, as a config names it. Left out where the system does not tell.
    """
    device, found = choose_device(wanted), dict[str, float]()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            CLEAR.write_text("5", encoding="ascii")  # Linux: the peak starts anew
        except OSError:
            yield found
            return
    yield found
    if device.type == "cuda":
        found["memory"] = torch.cuda.max_memory_allocated(device) / MIB
    elif peak := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="ascii")):
        found["memory"] = int(peak[1]) / 1024


def require_memory(wanted: str) -> None:
    """Raise InputError where the peak of memory cannot be measured."""
    if choose_device(wanted).type != "cuda" and not CLEAR.exists():
        raise InputError(
            "memory: found neither a CUDA device nor Linux's /proc, expected one of them to measure it with; "
            "leave memory out of objectives and constraints"
        )
