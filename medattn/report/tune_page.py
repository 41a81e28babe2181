"""The HTML page of a search: one file that needs nothing else, as `page` makes it for segmentations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from medattn.report.figures import ACCENT, INK, PAPER, SOFT, to_svg
from medattn.report.page import template
from medattn.report.tune import UNITS, SearchResult, Trial


def render(result: SearchResult) -> str:
    """The page as HTML text without any reference to another file or address."""
    curves = [trial for trial in result.trials if trial.curve]
    return template("tune.html.j2").render(
        result=result,
        shown=shown,
        short=short,
        axis_name=axis_name,
        histories={
            name: Markup(history(result, name)) for name in result.objectives if _values(result, name)
        },
        importances={name: Markup(importance(shares)) for name, shares in result.importances.items()},
        curves=Markup(learning_curves(curves)) if curves else None,
        front=Markup(front(result)) if len(result.objectives) == 2 and result.best else None,
    )


def shown(name: str, value: float | None) -> str:
    """A measure for people, without its unit."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if name == "parameters" else f"{value:.3f}" if name == "score" else f"{value:.1f}"


def short(value: float | str) -> str:
    """A value for people: four digits of a number.

    >>> short(0.00618212), short("unet"), short(8)
    ('0.006182', 'unet', '8')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def axis_name(name: str) -> str:
    """A measure with its unit.

    >>> axis_name("latency"), axis_name("score")
    ('latency, ms', 'score')
    """
    return f"{name}, {UNITS[name]}" if UNITS.get(name) else name


def history(result: SearchResult, name: str) -> str:
    """A measure over the trials as one SVG element, with a line of the best so far among those that count."""
    figure, ax = _figure(2.8)
    complete = _values(result, name)
    for feasible, color in ((True, INK), (False, SOFT)):
        points = [(t.number, t.measures[name]) for t in complete if t.feasible == feasible]
        if points:
            ax.plot(*zip(*points, strict=True), "o", color=color, markersize=4.5, markeredgewidth=0)
    better = max if result.objectives[name] == "maximize" else min
    counted = [trial for trial in complete if trial.feasible]
    steps = [better(t.measures[name] for t in counted[: n + 1]) for n in range(len(counted))]
    ax.step([t.number for t in counted], steps, where="post", color=ACCENT, linewidth=1.8)
    ax.set_xlabel("trial", color=INK, fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(axis_name(name), fontsize=10, color=INK, loc="left")
    return to_svg(figure)


def importance(shares: Mapping[str, float]) -> str:
    """Bars from the most important field down, as one SVG element."""
    figure, ax = _figure(0.7 + 0.32 * len(shares))
    ax.barh(range(len(shares)), list(shares.values()), color=PAPER, edgecolor=ACCENT, height=0.62)
    for n, share in enumerate(shares.values()):
        ax.text(share + 0.01, n, f"{share:.2f}", va="center", fontsize=9, color=INK)
    ax.set_yticks(range(len(shares)), list(shares))
    ax.set_ylim(len(shares) - 0.4, -0.6)
    ax.set_xlim(0, max(shares.values()) * 1.12 or 1)
    return to_svg(figure)


def learning_curves(trials: Sequence[Trial]) -> str:
    """The score of every trial at its validations, as one SVG element; the best one's stands out.

    A pruned one is dashed and ends in a cross, which is all of it where it had a single validation.
    """
    figure, ax = _figure(2.8)
    for trial in sorted(trials, key=lambda trial: trial.best):
        steps, scores = zip(*trial.curve, strict=True)
        color, width = (ACCENT, 2.2) if trial.best else (INK, 0.8)
        style, mark = ("--", "x") if trial.state == "pruned" else ("-", "o")
        last = [len(steps) - 1]
        ax.plot(
            steps, scores, style, marker=mark, markevery=last, markersize=4.5,
            color=color, linewidth=width, alpha=1 if trial.best else 0.45,
        )  # fmt: skip
    ax.set_xlabel("step", color=INK, fontsize=9)
    ax.set_title("score", fontsize=10, color=INK, loc="left")
    return to_svg(figure)


def front(result: SearchResult) -> str:
    """Both objectives against each other as one SVG element; a line joins the trials that none beats."""
    first, second = result.objectives
    figure, ax = _figure(3.2)
    complete = [t for t in result.trials if first in t.measures and second in t.measures]
    points = [(t.measures[second], t.measures[first]) for t in complete if not t.best]
    if points:
        ax.plot(*zip(*points, strict=True), "o", color=INK, alpha=0.5, markersize=4.5, markeredgewidth=0)
    best = sorted((t.measures[second], t.measures[first]) for t in result.best)
    ax.plot(*zip(*best, strict=True), "o-", color=ACCENT, markersize=5.5, linewidth=1.4)
    ax.set_xlabel(axis_name(second), color=INK, fontsize=9)
    ax.set_title(axis_name(first), fontsize=10, color=INK, loc="left")
    return to_svg(figure)


def _values(result: SearchResult, name: str) -> list[Trial]:
    return [trial for trial in result.trials if trial.state == "complete" and name in trial.measures]


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.6, height), layout=ConstrainedLayoutEngine())
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.grid(color=SOFT, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=9, length=0)
    ax.spines[:].set_visible(False)
    return figure, ax
