"""The loop: schedules, limits, signals, divergence; each with a network small enough to follow by hand."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medattn.errors import InputError
from medattn.training.loop import Clock, Limits, Schedule, State, averaged_model, fit, training_step


@dataclass
class Number:
    """A batch of one number."""

    value: float
    cases: tuple[str, ...] = ("case_7",)


def numbers() -> Iterator[Number]:
    return (Number(float(n % 3)) for n in itertools.count())


def squared_error(model: nn.Module, batch: Number) -> Tensor:
    output: Tensor = model(torch.tensor([[batch.value]]))
    return ((output - 1) ** 2).mean()


def run(
    limits: Limits, *, batches: Iterator[Any] | None = None, score: Any = None, **events: Any
) -> tuple[str, State]:
    torch.manual_seed(0)
    model, state = nn.Linear(1, 1), State()
    scores = iter(score or [])
    reason = fit(
        model,
        batches or numbers(),
        squared_error,
        torch.optim.SGD(model.parameters(), 0.01),
        Schedule(0.01, 0, "cosine"),
        averaged=averaged_model(model, 0.9),
        state=state,
        limits=limits,
        clip=1.0,
        on_step=events.get("on_step", lambda values: None),
        validate=lambda: next(scores, 0.0),
        keep_best=events.get("keep_best", lambda: None),
        save=events.get("save", lambda: None),
        started=time.monotonic(),
    )
    return reason, state


def limits(**changes: Any) -> Limits:
    usual: dict[str, Any] = {
        "steps": 10,
        "max_seconds": None,
        "patience": None,
        "validate_every": 4,
        "save_every": 3,
    }
    return Limits(**(usual | changes))


def test_schedules_follow_their_formulas() -> None:
    cosine, poly = Schedule(2.0, 0, "cosine"), Schedule(2.0, 0, "poly")
    for progress in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert cosine.rate(99, progress) == pytest.approx(1 + math.cos(math.pi * progress))
        assert poly.rate(99, progress) == pytest.approx(2 * (1 - progress) ** 0.9)
    warm = Schedule(1.0, 10, "poly")
    assert [warm.rate(step, 0.0) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert cosine.rate(0, 1.7) == 0.0


def test_a_schedule_ends_at_its_floor() -> None:
    schedule = Schedule(2.0, 0, "cosine", floor=0.5)
    assert [schedule.rate(0, share) for share in (0.0, 0.5, 1.0)] == [2.0, pytest.approx(1.25), 0.5]


def test_accumulated_batches_are_one_step_with_their_mean_gradient() -> None:
    """Three batches of one number against one of all three, whose loss is the mean of theirs."""

    def weights(accumulate: int) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        batches = iter([Number(0.0), Number(1.0), Number(2.0)])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if accumulate > 1:
            training_step(model, list(batches), squared_error, optimizer, None, 0)
        else:
            loss = sum(squared_error(model, batch) for batch in batches) / 3
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
        return list(model.parameters())

    for ours, expected in zip(weights(3), weights(1), strict=True):
        torch.testing.assert_close(ours, expected)


def test_progress_is_the_larger_of_steps_and_time() -> None:
    state = State(step=25)
    clock = Clock(state, limits(steps=100, max_seconds=100.0), time.monotonic() - 48.5, 3.0)
    assert clock.progress() == pytest.approx(48.5 / 97, abs=0.01)
    state.step = 80
    assert clock.progress() == pytest.approx(0.8)
    clock.reserve(20)
    state.step = 0
    assert clock.progress() == pytest.approx(48.5 / 74, abs=0.01)


def test_time_already_spent_counts_after_a_resume() -> None:
    clock = Clock(State(seconds=90.0), limits(max_seconds=100.0), time.monotonic(), 0.0)
    assert clock.progress() > 0.9


def test_everything_happens_when_it_should() -> None:
    saved, seen = [], []
    reason, state = run(
        limits(),
        score=[0.5, 0.7, 0.6],
        save=lambda: saved.append(len(seen)),
        on_step=lambda values: seen.append(values),
    )
    assert (reason, state.step) == ("steps", 10)
    assert saved == [3, 6, 9, 10]
    assert (state.best, state.best_step, state.stale) == (0.7, 8, 1)
    assert all(0 <= values["data_wait_share"] <= 1 for values in seen)
    assert seen[0]["learning_rate"] == pytest.approx(0.01)


def test_the_best_is_kept_only_when_it_improves() -> None:
    kept = []
    run(limits(validate_every=2), score=[0.1, 0.3, 0.2, 0.3, 0.4], keep_best=lambda: kept.append(1))
    assert len(kept) == 3


def test_patience_counts_validations_without_a_better_one() -> None:
    reason, state = run(limits(steps=100, validate_every=1, patience=3), score=[0.5, 0.6, 0.1, 0.2, 0.6, 0.9])
    assert (reason, state.step) == ("patience", 5)


def test_the_time_limit_ends_a_run_that_has_steps_left() -> None:
    reason, state = run(limits(steps=10**9, max_seconds=0.3))
    assert reason == "time"
    assert state.seconds < 5


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_returns(name: str) -> None:
    before = signal.getsignal(signal.Signals[name])
    saved = []

    def on_step(values: object) -> None:
        os.kill(os.getpid(), signal.Signals[name])

    reason, state = run(limits(save_every=1000), on_step=on_step, save=lambda: saved.append(1))
    assert (reason, state.step, saved) == (name, 1, [1])
    assert signal.getsignal(signal.Signals[name]) is before


def test_a_second_interrupt_is_not_held_back() -> None:
    def on_step(values: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(limits(), on_step=on_step)


def test_a_loss_that_is_not_finite_names_step_and_cases() -> None:
    batches = iter([Number(1.0), Number(math.nan, ("hn_04", "hn_11"))])
    with pytest.raises(InputError, match=r"loss is not finite at step 1 on cases hn_04, hn_11"):
        run(limits(), batches=batches)


def test_a_gradient_that_is_not_finite_names_step_and_cases() -> None:
    def loss_with_infinite_slope(model: nn.Module, batch: Number) -> Tensor:
        return model(torch.zeros(1, 1)).sub(model.bias).abs().sqrt().sum()  # type: ignore[no-any-return]

    model = nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"a gradient is not finite at step 0 on cases case_7"):
        fit(
            model,
            numbers(),
            loss_with_infinite_slope,
            torch.optim.SGD(model.parameters(), 0.1),
            Schedule(0.1, 0, "poly"),
            averaged=averaged_model(model, 0.0),
            state=State(),
            limits=limits(),
            clip=1.0,
            on_step=lambda values: None,
            validate=lambda: 0.0,
            keep_best=lambda: None,
            save=lambda: None,
            started=time.monotonic(),
        )


def test_averaged_weights_follow_the_recursion() -> None:
    model = nn.Linear(1, 1, bias=False)
    averaged = averaged_model(model, 0.5)
    mean = None
    for count, value in enumerate((3.0, 5.0, 11.0, 2.0)):
        nn.init.constant_(model.weight, value)
        averaged.update_parameters(model)
        rate = 0.0 if count == 0 else min(0.5, (1 + count) / (10 + count))
        mean = value if mean is None else rate * mean + (1 - rate) * value
    assert averaged.module.weight.item() == pytest.approx(mean)


def test_decay_zero_means_the_weights_themselves() -> None:
    model = nn.Linear(2, 2)
    averaged = averaged_model(model, 0.0)
    for _ in range(3):
        nn.init.normal_(model.weight)
        averaged.update_parameters(model)
    assert torch.equal(averaged.module.weight, model.weight)
