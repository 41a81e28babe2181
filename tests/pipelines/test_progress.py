"""What a terminal and a log file see of long commands."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pytest
from rich.console import Console

from medattn.metrics.scores import METRICS, OrganSummary, Statistic
from medattn_pipelines.progress import case_progress, clock, print_scores, print_table, training_progress


def screen(*, terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=120, color_system=None), text


def test_a_log_gets_the_first_and_the_last_step_and_no_flood() -> None:
    console, text = screen(terminal=False)
    with training_progress(1000, console=console) as update:
        for step in range(1, 1001):
            update(step, loss=1 / step, seconds_left=1000.0 - step, note="Dice [0.8]")
    assert text.getvalue().splitlines() == [
        "Training 1/1000  loss 1.0000  16:39 left  Dice [0.8]",
        "Training 1000/1000  loss 0.0010  0:00 left  Dice [0.8]",
    ]


def test_a_log_gets_every_line_when_they_are_slow_and_the_last_one_once() -> None:
    console, text = screen(terminal=False)
    with case_progress("Reading", console=console, plain_seconds=0) as tick:
        tick("a")
        tick("b", 2)
    assert text.getvalue().splitlines() == ["Reading 1  a", "Reading 2/2  b"]


def test_an_error_still_shows_how_far_it_came() -> None:
    console, text = screen(terminal=False)

    def fails() -> None:
        with case_progress("Reading", 3, console=console) as tick:
            tick("a")
            tick("b")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert text.getvalue().splitlines()[-1] == "Reading 2/3  b"


def test_a_terminal_gets_a_live_bar() -> None:
    console, text = screen(terminal=True)
    with training_progress(20, console=console) as update:
        update(20, loss=0.25, seconds_left=0, note="Dice 0.8")
    shown = text.getvalue()
    assert "20/20" in shown
    assert "loss 0.2500" in shown
    assert "Dice 0.8" in shown


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (-3, "0:00"), (61, "1:01"), (7199.6, "2:00:00")])
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_a_table_prints_numbers_and_gaps_and_takes_brackets_literally() -> None:
    console, text = screen(terminal=False)
    print_table("[Title]", ("case", "n", "Dice"), [("a [1]", 3, 0.5), ("b", 0, None)], console=console)
    shown = text.getvalue()
    assert "[Title]" in shown
    assert "a [1]" in shown
    assert "0.500" in shown
    assert " - " in shown


def summary(n: int, means: Mapping[str, Statistic]) -> OrganSummary:
    return OrganSummary(
        organ="x",
        n=n,
        n_present=n,
        n_empty=0,
        n_missed=0,
        n_false=0,
        n_not_contoured=0,
        tolerance_mm=2.0,
        metrics={metric: means.get(metric, Statistic(0)) for metric in METRICS},
    )


def test_every_mean_says_over_how_many_cases() -> None:
    console, text = screen(terminal=False)
    scores = {
        "Brainstem": summary(5, {"dice": Statistic(5, 0.8), "hd95_mm": Statistic(4, 3.25)}),
        "Mandible": summary(3, {"dice": Statistic(3, 0.9), "hd95_mm": Statistic(3, 1.5)}),
    }
    print_scores("Scores", scores, console=console)
    rows = {line.split("│")[1].strip(): line for line in text.getvalue().splitlines() if line.startswith("│")}
    cells = {name: [cell.strip() for cell in line.split("│")[2:-1]] for name, line in rows.items()}
    assert cells["Brainstem"] == ["5", "0.800", "-", "3.250 (4)", "-"]
    assert cells["Mandible"] == ["3", "0.900", "-", "1.500", "-"]
    assert cells["mean of organs"] == ["2", "0.850", "-", "2.375", "-"]
