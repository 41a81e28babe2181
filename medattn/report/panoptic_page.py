"""The HTML report of panoptic predictions: one file that needs nothing else, as `page` makes for volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from medattn.panoptic import Categories, Segment
from medattn.report.figures import ACCENT, INK, PAPER, SOFT, jpeg, to_svg
from medattn.report.page import template
from medattn.report.panoptic import ClassScore, ImageScore, PanopticEvaluation
from medattn.report.panoptic_overlay import overlay

THUMBNAIL = 420  # pixels of the longer side
ROW_INCHES = 0.155  # height of a class in the figure


@dataclass(frozen=True)
class Shown:
    """An image of the report as data URIs of JPEGs. photo: empty where there is none."""

    score: ImageScore
    photo: str
    reference: str
    prediction: str


def render(evaluation: PanopticEvaluation, shown: Sequence[Shown]) -> str:
    """The report as HTML text without any reference to another file or address. shown: images, in order."""
    counted = [score for score in evaluation.per_class if score.quality.n]
    html = template("panoptic.html.j2").render(
        evaluation=evaluation,
        counted=sorted(counted, key=lambda score: (score.quality.pq or 0.0, score.category.name)),
        totals=(("all", evaluation.all), ("things", evaluation.things), ("stuff", evaluation.stuff)),
        figure=Markup(quality_figure(counted)),
        shown=shown,
    )
    return html.encode("utf-8", "replace").decode("utf-8")  # names of files may hold bytes that are no text


def pictures(
    score: ImageScore,
    photo: Image.Image | None,
    reference: tuple[npt.NDArray[np.integer[Any]], Sequence[Segment]],
    prediction: tuple[npt.NDArray[np.integer[Any]], Sequence[Segment]],
    categories: Categories,
) -> Shown:
    """Both maps, each with its segments, over the photo or, without one, over grey; small.

    photo: RGB of the maps' size. Segments are painted once it is small, so that names are legible.
    """
    height, width = reference[0].shape
    scale = min(1.0, THUMBNAIL / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if photo is None:
        below = Image.new("RGB", size, (128, 128, 128))
    else:
        below = photo.resize(size, Image.Resampling.BICUBIC)
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.intp)
        for new, old in zip(size[::-1], (height, width), strict=True)
    )
    painted = [
        jpeg(overlay(below, ids[rows[:, None], columns], segments, categories))
        for ids, segments in (reference, prediction)
    ]
    return Shown(score, "" if photo is None else jpeg(below), *painted)


def quality_figure(scores: Sequence[ClassScore]) -> str:
    """PQ of classes as bars in one SVG element, the best on top, things beside stuff."""
    panels = [
        (title, sorted(found, key=lambda score: (-(score.quality.pq or 0.0), score.category.name)))
        for title, thing in (("Things", True), ("Stuff", False))
        if (found := [score for score in scores if score.category.thing is thing])
    ]
    if not panels:
        return ""
    rows = max(len(found) for _, found in panels)
    figure = Figure(figsize=(9.6, 0.9 + ROW_INCHES * rows), layout=ConstrainedLayoutEngine(wspace=0.06))
    FigureCanvasAgg(figure)
    for ax, (title, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _bars(ax, title, found, rows)
    return to_svg(figure)


def _bars(ax: Axes, title: str, scores: Sequence[ClassScore], rows: int) -> None:
    """A bar per class; a tick at its SQ, which PQ would be if every segment were found."""
    places = range(len(scores))
    ax.barh(
        places,
        [score.quality.pq or 0.0 for score in scores],
        0.7,
        facecolor=PAPER,
        edgecolor=INK,
        linewidth=0.6,
    )
    quality = [(n, score.quality.sq) for n, score in enumerate(scores) if score.quality.sq]
    ax.plot(
        [sq for _, sq in quality],
        [n for n, _ in quality],
        "|",
        color=ACCENT,
        markersize=6,
        markeredgewidth=1.5,
    )
    ax.set_yticks(places, [score.category.name for score in scores], parse_math=False)
    ax.set_ylim(max(rows, 2) - 0.4, -0.6)
    ax.set_xlim(0, 1)
    ax.set_title(title, fontsize=10, color=INK, loc="left", pad=16)
    ax.grid(axis="x", color=SOFT, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(axis="x", colors=INK, labelsize=8, length=0, labeltop=True)
    ax.tick_params(axis="y", colors=INK, labelsize=7, length=0)
    ax.spines[:].set_visible(False)
