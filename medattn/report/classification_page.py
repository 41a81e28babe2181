"""The HTML report of a classifier: one file that needs nothing else, as `page` makes it for segmentations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from medattn.report.classification import Bin, ImageEvaluation
from medattn.report.figures import ACCENT, INK, PAPER, SOFT, jpeg, to_svg
from medattn.report.page import template

THUMBNAIL = 192  # pixels of the longer side
PAIRS = 20  # confusions on the page


@dataclass(frozen=True)
class Mistake:
    """An image and what was said of it. picture: a data URI, empty where the image cannot be read."""

    name: str
    true: str
    said: str
    confidence: float
    picture: str


def render(evaluation: ImageEvaluation, mistakes: Sequence[int], pictures: Mapping[int, str]) -> str:
    """The report as HTML text without any reference to another file or address.

    mistakes: the images to show. pictures: data URIs of those that can be read.
    """
    titles = [
        wnid if name == wnid else f"{name} ({wnid})"
        for wnid, name in zip(evaluation.classes.wnids, evaluation.classes.names, strict=True)
    ]
    html = template("classification.html.j2").render(
        evaluation=evaluation,
        titles=titles,
        worst=sorted(evaluation.per_class, key=lambda score: (score.top1, score.top5, score.index)),
        pairs=evaluation.confusions[:PAIRS],
        reliability=Markup(reliability_diagram(evaluation.bins)),
        mistakes=[
            Mistake(
                evaluation.names[i],
                evaluation.classes.names[evaluation.target[i]],
                evaluation.classes.names[evaluation.best[i, 0]],
                float(evaluation.probability[i, 0]),
                pictures.get(i, ""),
            )
            for i in mistakes
        ],
    )
    return html.encode("utf-8", "replace").decode("utf-8")  # names of files may hold bytes that are no text


def thumbnail(image: Image.Image) -> str:
    """A small copy as the data URI of a JPEG. image: RGB."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    return jpeg(small)


def reliability_diagram(bins: Sequence[Bin]) -> str:
    """Accuracy over confidence, and how the images spread over it, side by side as one SVG element."""
    figure = Figure(figsize=(9.6, 3.6), layout=ConstrainedLayoutEngine(wspace=0.06))
    FigureCanvasAgg(figure)
    accuracy, spread = figure.subplots(1, 2)
    filled = [entry for entry in bins if entry.accuracy is not None]
    accuracy.plot((0, 1), (0, 1), color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    _bars(accuracy, filled, [entry.accuracy or 0.0 for entry in filled])
    accuracy.plot(
        [entry.confidence or 0.0 for entry in filled],
        [entry.accuracy or 0.0 for entry in filled],
        "o",
        color=ACCENT,
        markersize=5,
    )
    accuracy.set_title("Accuracy", fontsize=10, color=INK, loc="left")
    accuracy.set_ylim(0, 1.02)
    total = sum(entry.n for entry in bins) or 1
    _bars(spread, filled, [entry.n / total for entry in filled])
    spread.set_title("Share of images", fontsize=10, color=INK, loc="left")
    return to_svg(figure)


def _bars(ax: Axes, bins: Sequence[Bin], heights: Sequence[float]) -> None:
    """A bar per bin over the whole range of confidence."""
    ax.bar(
        [entry.low for entry in bins],
        np.array(heights),
        [entry.high - entry.low for entry in bins],
        align="edge",
        facecolor=PAPER,
        edgecolor=INK,
        linewidth=0.9,
    )
    ax.set_xlim(0, 1)
    ax.set_xlabel("confidence: probability of the best class", fontsize=9, color=INK)
    ax.grid(color=SOFT, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=9, length=0, pad=6)
    ax.spines[:].set_visible(False)
