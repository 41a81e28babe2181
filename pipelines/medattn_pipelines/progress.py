"""What a terminal shows during long commands and at their end; plain lines where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from medattn.metrics.scores import OrganSummary, Statistic

PLAIN_SECONDS = 10.0


class Update(Protocol):
    """Tells the progress line where the training is."""

    def __call__(
        self, step: int, *, loss: float | None = None, seconds_left: float | None = None, note: str = ""
    ) -> None: ...


@contextmanager
def training_progress(
    total_steps: int, *, console: Console | None = None, plain_seconds: float = PLAIN_SECONDS
) -> Iterator[Update]:
    """A line with steps, loss, time left and a note: live on a terminal, else printed now and then.

    plain_seconds: shortest time between two plain lines; the first and the last update are always printed.
    """
    with _progress("Training", total_steps, console, plain_seconds) as show:

        def update(
            step: int, *, loss: float | None = None, seconds_left: float | None = None, note: str = ""
        ) -> None:
            parts = ["" if loss is None else f"loss {loss:.4f}"]
            parts += ["" if seconds_left is None else f"{clock(seconds_left)} left", note]
            show(step, "  ".join(part for part in parts if part), total_steps)

        yield update


class Tick(Protocol):
    """Says that one more case is done, which one, and the number of all cases where that is news."""

    def __call__(self, name: str = "", total: int | None = None) -> None: ...


@contextmanager
def case_progress(
    title: str,
    total: int | None = None,
    *,
    processes: int = 1,
    console: Console | None = None,
    plain_seconds: float = PLAIN_SECONDS,
) -> Iterator[Tick]:
    """Counts cases; `total` is None where nobody knows yet. Threads may call what it yields.

    processes: how many share the cases, each counting its own; the first one shows.
    """
    title = title if processes == 1 else f"{title} (first of {processes} processes)"
    with _progress(title, total, console, plain_seconds) as show:
        count, known, lock = 0, total, Lock()

        def tick(name: str = "", total: int | None = None) -> None:
            nonlocal count, known
            with lock:
                count, known = count + 1, total or known
                show(count, name, known)

        yield tick


@contextmanager
def _progress(
    title: str, total: int | None, console: Console | None, plain_seconds: float
) -> Iterator[Callable[[int, str, int | None], None]]:
    console = console or Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
            task = progress.add_task(title, total=total, note="")
            yield lambda done, note, total: progress.update(task, completed=done, total=total, note=note)
        return
    printed_at, pending = float("-inf"), ""

    def show(done: int, note: str, total: int | None) -> None:
        nonlocal printed_at, pending
        pending = f"{title} {done}{f'/{total}' if total else ''}  {note}".rstrip()
        if time.monotonic() - printed_at >= plain_seconds:
            _line(console, pending)
            printed_at, pending = time.monotonic(), ""

    try:
        yield show
    finally:
        if pending:
            _line(console, pending)


def _line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss.

    >>> clock(59.6), clock(3725)
    ('1:00', '1:02:05')
    """
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | int | float | None]],
    *,
    console: Console | None = None,
) -> None:
    """A table on standard output: text left, numbers right, fractions with three digits, None as a dash."""
    console = console or Console()
    rows = [tuple(row) for row in rows]
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        text = all(isinstance(row[number], str) for row in rows)
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)


def print_scores(title: str, summary: Mapping[str, OrganSummary], *, console: Console | None = None) -> None:
    """A row per organ and one for the mean over organs: n, then the mean of each metric.

    n: cases behind the mean Dice. A mean over another number of cases carries that number in brackets.
    """
    from medattn.metrics.scores import METRICS, mean_over_organs

    rows = [
        (organ, *_means([scores.metrics[metric] for metric in METRICS])) for organ, scores in summary.items()
    ]
    rows.append(("mean of organs", *_means([mean_over_organs(summary, metric) for metric in METRICS])))
    print_table(title, ("organ", "n", *METRICS), rows, console=console)


def _means(statistics: Sequence[Statistic]) -> tuple[int | str | float | None, ...]:
    n = statistics[0].n
    shown = (s.mean if s.n in (0, n) else f"{s.mean:.3f} ({s.n})" for s in statistics)
    return (n, *shown)


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
