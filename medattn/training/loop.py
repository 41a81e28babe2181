"""The training loop: one page that reads top to bottom."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from medattn.errors import InputError
from medattn.training.distributed import ALONE, Processes, held_gradients


class Batch(Protocol):
    """What the loop needs to know of a batch."""

    @property
    def cases(self) -> tuple[str, ...]:
        """Names for error messages."""


@dataclass
class State:
    """Where a run stands; saved with every checkpoint.

    seconds: monotonic clock over all sessions of the run. best: highest validation score. stale: validations
    since then. validated: the step of the last one. logged: lines in the journal. recent: measurements that
    are not in it yet.
    """

    step: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    best_step: int = 0
    stale: int = 0
    validated: int = -1
    logged: int = 0
    recent: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """When to stop and how often to do what, in steps; max_seconds in seconds, patience in validations."""

    steps: int
    max_seconds: float | None
    patience: int | None
    validate_every: int
    save_every: int


@dataclass(frozen=True)
class Schedule:
    """Learning rate: cosine or poly (exponent 0.9) to `floor` at progress 1, after a linear warm-up.

    The warm-up takes warmup_steps, but at most a tenth of the run.
    """

    peak: float
    warmup_steps: int
    shape: str
    floor: float = 0.0

    def rate(self, step: int, progress: float) -> float:
        """The rate of step `step` (from 0) when a share `progress` of the run is over."""
        left = 1 - min(1.0, progress)
        fall = 0.5 * (1 - math.cos(math.pi * left)) if self.shape == "cosine" else left**0.9
        warmth = max((step + 1) / max(1, self.warmup_steps), 10 * progress)
        return (self.floor + (self.peak - self.floor) * fall) * min(1.0, warmth)


SIGNALS = (signal.SIGTERM, signal.SIGINT)
RESERVE = 1.3  # times the last validation: the next one may find a busier machine

BatchT = TypeVar("BatchT", bound=Batch)
Tensors = list[Tensor] | tuple[Tensor, ...]


def fit(
    model: nn.Module,
    batches: Iterator[BatchT],
    loss_of: Callable[[nn.Module, BatchT], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    averaged: AveragedModel,
    state: State,
    limits: Limits,
    clip: float | None,
    on_step: Callable[[Mapping[str, float]], None],
    validate: Callable[[], float],
    keep_best: Callable[[], None],
    save: Callable[[], None],
    started: float,
    reserve_seconds: float = 0.0,
    accumulate: int = 1,
    processes: Processes = ALONE,
) -> str:
    """Train until `limits` say stop; returns why: "steps", "time", "patience", "SIGTERM" or "SIGINT".

    started: `time.monotonic()` at the start of the command, which max_seconds counts from. reserve_seconds:
    how much of that the last validation is expected to take; each validation measures it anew.
    batches: from `state.step` on, `accumulate` of them for each step. validate: a score, higher is better, of
    `averaged`. `save` is called every `save_every` steps and once at the end, also after SIGTERM or Ctrl-C,
    so that a run can go on from there.
    processes: those that train together, each with its share of every batch and the same score; they stop at
    the same step, by the main process's clock and by a signal to any of them.

    Raises InputError with step and case names for a loss or gradient that is not finite.
    """
    clock = Clock(state, limits, started, reserve_seconds)
    with caught_signals() as caught:
        stop, _ = clock.agree(processes, caught)
        while not (reason := _reason(state, limits, clock, stop)):
            begun = time.perf_counter()
            parts = [next(batches) for _ in range(accumulate)]
            waited = time.perf_counter() - begun
            rate = schedule.rate(state.step, clock.progress())
            for group in optimizer.param_groups:
                group["lr"] = rate
            own_loss, norm = training_step(model, parts, loss_of, optimizer, clip, state.step, processes)
            averaged.update_parameters(model)
            state.step += 1
            clock.tick()
            stop, loss = clock.agree(processes, caught, own_loss)
            seconds = time.perf_counter() - begun
            measured = {"loss": loss, "gradient_norm": norm, "learning_rate": rate, "step_seconds": seconds}
            on_step(measured | {"data_wait_share": waited / seconds, "seconds_left": clock.seconds_left()})
            if state.step % limits.validate_every == 0:
                clock.reserve(_validate(state, validate, keep_best))
            if state.step % limits.save_every == 0:
                save()
            if processes.world == 1 or state.validated == state.step:  # else the next step tells
                stop, _ = clock.agree(processes, caught)
        # not again where a killed run goes on from its last step
        if not stop and state.validated != state.step:
            _validate(state, validate, keep_best)
        clock.tick()
        if state.step:  # before the first step torch would make up what an optimizer has seen
            save()
        stop, _ = clock.agree(processes, caught)
        return signal.Signals(stop).name if stop else reason


def training_step(
    model: nn.Module,
    parts: Sequence[BatchT],
    loss_of: Callable[[nn.Module, BatchT], Tensor],
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    step: int,
    processes: Processes = ALONE,
) -> tuple[float, float]:
    """One update from the mean gradient of some batches; returns loss and gradient norm before clipping.

    model: as `processes.wrap` gives it. The gradient is the mean over the processes, whose shares of a batch
    are equal; the loss is this process's.
    """
    total = 0.0
    for number, batch in enumerate(parts, start=1):
        with held_gradients(model, number < len(parts)):
            loss = loss_of(model, batch) / len(parts)
            if not math.isfinite(loss.item()):
                raise InputError(_diverged("the loss", step, batch.cases))
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if not math.isfinite(norm.item()):
        # the gradient is everyone's, so anyone's cases may be the cause
        cases = [case for several in processes.gathered(parts[-1].cases) for case in several]
        raise InputError(_diverged("a gradient", step, cases))
    optimizer.step()
    optimizer.zero_grad()
    return total, norm.item()


class Clock:
    """Wall clock of a run over all its sessions, and how far the run is: by steps or by time."""

    def __init__(self, state: State, limits: Limits, started: float, reserve_seconds: float) -> None:
        self._state, self._limits = state, limits
        self._offset = started - state.seconds
        self.tick()
        self._reserve = reserve_seconds
        self._first = (state.step, state.seconds)

    def tick(self) -> None:
        """Write the seconds so far into the state."""
        self._state.seconds = time.monotonic() - self._offset

    def reserve(self, seconds: float) -> None:
        """Keep this long free before the limit, for the last validation."""
        self._reserve = RESERVE * seconds

    def agree(self, processes: Processes, caught: Sequence[int], loss: float = 0.0) -> tuple[int, float]:
        """The signal that a process caught, 0 if none, and the mean loss; the clock becomes the main one's.

        All in one message, because every step waits for it.
        """
        first = caught[0] if caught else 0
        if processes.world == 1:
            return first, loss
        mine = (self._state.seconds, self._reserve) if processes.main else (0.0, 0.0)
        heard = [float(first == number) for number in SIGNALS]
        *heard, self._state.seconds, self._reserve, total = processes.sums(*heard, *mine, loss)
        return next((n for n, count in zip(SIGNALS, heard, strict=True) if count), 0), total / processes.world

    def progress(self) -> float:
        """Share of the run that is over."""
        by_steps = self._state.step / self._limits.steps
        if self._limits.max_seconds is None:
            return by_steps
        return max(by_steps, self._state.seconds / max(1e-9, self._limits.max_seconds - self._reserve))

    def seconds_left(self) -> float:
        """Expected seconds until the end of training, from the pace since this session began."""
        step, seconds = self._first
        pace = (self._state.seconds - seconds) / max(1, self._state.step - step)
        left = (self._limits.steps - self._state.step) * pace
        if self._limits.max_seconds is None:
            return left
        return max(0.0, min(left, self._limits.max_seconds - self._reserve - self._state.seconds))


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGTERM and the first Ctrl-C only note themselves in the list; a second Ctrl-C interrupts as usual."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers; a notebook's worker keeps its own
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights; the decay grows at first, so that the start is forgotten."""

    def update(mean: Tensors, current: Tensors, count: Tensor | int) -> None:
        rate = 1 - min(decay, (1 + int(count)) / (10 + int(count))) if decay else 1.0
        torch._foreach_lerp_(mean, current, rate)

    return AveragedModel(model, multi_avg_fn=torch.no_grad()(update))


def _validate(state: State, validate: Callable[[], float], keep_best: Callable[[], None]) -> float:
    """Score the averaged model, keep it if it is the best; returns the seconds it took."""
    started = time.monotonic()
    score = validate()
    state.validated = state.step
    state.stale += 1
    if score > state.best:
        state.best, state.best_step, state.stale = score, state.step, 0
        keep_best()
    return time.monotonic() - started


def _reason(state: State, limits: Limits, clock: Clock, stop: int) -> str:
    if stop:
        return signal.Signals(stop).name
    if state.step >= limits.steps:
        return "steps"
    if limits.max_seconds is not None and clock.progress() >= 1:
        return "time"
    return "patience" if limits.patience is not None and state.stale >= limits.patience else ""


def _diverged(what: str, step: int, cases: Sequence[str]) -> str:
    return (
        f"training stopped: {what} is not finite at step {step} on cases {', '.join(cases)}; "
        "look at these cases with `medattn check`, or lower training.learning_rate, then --resume"
    )
