"""Figures of a report: box plots that follow the page's colours, and contours over the worst slices.

Slices are shown as radiologists expect: seen from the feet, the patient's right on the viewer's left,
anterior up.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from PIL import Image

from medattn.geometry import Array, Geometry
from medattn.metrics.scores import Score

WINDOW_HU = (-160.0, 240.0)  # soft tissue: level 40, width 400
REFERENCE_COLOR, PREDICTION_COLOR = "#38bdf8", "#ff9f1c"
MARGIN_MM, SMALLEST_VIEW_MM = 20.0, 70.0
# stand-ins that the SVG's text replaces by the page's CSS variables
INK, SOFT, ACCENT, PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
VARIABLES = {INK: "var(--ink)", SOFT: "var(--line)", ACCENT: "var(--accent)", PAPER: "var(--accent-soft)"}


@dataclass(frozen=True)
class Overlay:
    """A slice with both contours. png: a data URI. slice_index: along `axis` of the file's own grid."""

    score: Score
    png: str
    axis: int
    slice_index: int
    has_image: bool


def overlay(
    score: Score,
    prediction: Array,
    reference: Array,
    geometry: Geometry,
    *,
    others: Array | None = None,
    hu: Array | None = None,
) -> Overlay:
    """The transverse slice where two masks differ most, with both outlines.

    prediction, reference: bool [i, j, k] on `geometry`. hu: CT numbers on the same grid, shown in a
    soft-tissue window; without them `others`, the mask of all organs, gives a faint background.
    """
    axis = geometry.patient_axes().index(2)
    in_plane = tuple(a for a in range(3) if a != axis)
    worst = int(np.argmax((prediction ^ reference).sum(axis=in_plane)))
    canonical, turn = geometry.canonical()
    slab: list[slice] = [slice(None)] * 3
    slab[axis] = slice(worst, worst + 1)

    def plane(array: Array) -> Array:
        """Rows run from anterior to posterior, columns from the patient's right to left."""
        return np.asarray(turn.apply(array[tuple(slab)])[:, :, 0].T)

    background = plane(hu).astype(float) if hu is not None else None
    faint = plane(others) if others is not None else None
    x_mm, y_mm, _ = canonical.spacing_mm()
    png = _draw(plane(prediction), plane(reference), (x_mm, y_mm), background, faint)
    return Overlay(score, png, axis, worst, hu is not None)


def jpeg(image: Image.Image) -> str:
    """An RGB picture as the data URI of a JPEG."""
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=85)
    return _data_uri("jpeg", file)


def box_plots(organs: Sequence[str], panels: Sequence[tuple[str, Sequence[Sequence[float]]]]) -> str:
    """Horizontal box plots as one SVG element: a panel per (title, values per organ), organs from top down.

    Boxes span the quartiles, whiskers reach 1.5 times their distance, dots are cases.
    """
    figure = Figure(
        figsize=(9.6, 0.9 + 0.3 * max(2, len(organs))), layout=ConstrainedLayoutEngine(wspace=0.06)
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, values) in zip(axes, panels, strict=True):
        _box_panel(ax, title, values)
    axes[0].set_yticks(range(len(organs)), organs)
    axes[0].set_ylim(len(organs) - 0.4, -0.6)
    return to_svg(figure)


def _box_panel(ax: Axes, title: str, values: Sequence[Sequence[float]]) -> None:
    filled = [n for n, organ in enumerate(values) if len(organ)]
    if filled:
        line = {"color": INK, "linewidth": 0.9}
        ax.boxplot(
            [values[n] for n in filled],
            positions=filled,
            orientation="horizontal",
            widths=0.55,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": PAPER, "edgecolor": INK, "linewidth": 0.9},
            whiskerprops=line,
            capprops=line,
            medianprops={"color": ACCENT, "linewidth": 2},
            manage_ticks=False,
        )
    for n in filled:
        # a fixed pattern instead of a random jitter: the same scores give the same figure
        height = n + 0.2 * (np.arange(len(values[n])) % 5 - 2) / 2
        ax.plot(values[n], height, ".", color=INK, markersize=5, alpha=0.5, markeredgewidth=0)
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    ax.grid(axis="x", color=SOFT, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=9, length=0)
    ax.spines[:].set_visible(False)
    everything = [value for organ in values for value in organ]
    if everything and "mm" not in title:
        ax.set_xlim(min(0.5, min(everything) - 0.02), 1.005)
    elif everything:
        ax.set_xlim(0, max(everything) * 1.03 or 1.0)


def to_svg(figure: Figure) -> str:
    """An SVG element to put into HTML: real text, no XML prologue, colours from the page."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "medattn", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg


def _draw(
    prediction: Array,
    reference: Array,
    spacing_mm: tuple[float, float],
    background: Array | None,
    faint: Array | None,
) -> str:
    """A square view around both outlines, [y, x] arrays, as the data URI of a PNG."""
    x_mm, y_mm = spacing_mm
    rows, columns = reference.shape
    extent = (0.0, columns * x_mm, rows * y_mm, 0.0)
    figure = Figure(figsize=(2.8, 2.8), dpi=150, facecolor="black")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_facecolor("black")
    if background is not None:
        low, high = WINDOW_HU
        ax.imshow(background, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bilinear")
    elif faint is not None:
        ax.imshow(faint, cmap="gray", vmin=0, vmax=5, extent=extent, interpolation="nearest")
    for mask, color, width, style in (
        (reference, REFERENCE_COLOR, 2.0, "solid"),
        (prediction, PREDICTION_COLOR, 1.5, "dashed"),
    ):
        if mask.any():
            ax.contour(
                *_outline(mask, spacing_mm), levels=[0.5], colors=color, linewidths=width, linestyles=style
            )
    (left, right), (top, bottom) = _view(prediction | reference, spacing_mm)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_axis_off()
    _annotate(ax, right - left)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    return _data_uri("png", png)


def _data_uri(kind: str, file: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _outline(mask: Array, spacing_mm: tuple[float, float]) -> tuple[Array, Array, Array]:
    """x, y in mm and values of a finer mask, whose contour follows the voxels' edges unrounded."""
    fine = 8
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    top, left = rows[0], columns[0]
    inside = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    dense = np.kron(inside, np.ones((fine, fine)))
    x_mm = ((np.arange(dense.shape[1]) + 0.5) / fine - 1 + left) * spacing_mm[0]
    y_mm = ((np.arange(dense.shape[0]) + 0.5) / fine - 1 + top) * spacing_mm[1]
    return x_mm, y_mm, dense


def _view(mask: Array, spacing_mm: tuple[float, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """A square around the mask in mm, with a margin: (left, right), (top, bottom)."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    x = (columns[0] * spacing_mm[0], (columns[-1] + 1) * spacing_mm[0])
    y = (rows[0] * spacing_mm[1], (rows[-1] + 1) * spacing_mm[1])
    half = max(x[1] - x[0] + 2 * MARGIN_MM, y[1] - y[0] + 2 * MARGIN_MM, SMALLEST_VIEW_MM) / 2
    return (sum(x) / 2 - half, sum(x) / 2 + half), (sum(y) / 2 - half, sum(y) / 2 + half)


def _annotate(ax: Axes, width_mm: float) -> None:
    """The patient's sides and a scale bar of a round length."""
    outlined = [withStroke(linewidth=2, foreground="black")]
    for x, letter in ((0.03, "R"), (0.97, "L")):
        ax.text(
            *(x, 0.5, letter),
            transform=ax.transAxes,
            color="white",
            fontsize=10,
            ha="center",
            va="center",
            path_effects=outlined,
        )
    length_mm = 20 if width_mm < 140 else 50
    start, end = 0.05, 0.05 + length_mm / width_mm
    ax.plot(
        (start, end),
        (0.05, 0.05),
        transform=ax.transAxes,
        color="white",
        linewidth=2.5,
        path_effects=outlined,
    )
    ax.text(
        *(start, 0.07, f"{length_mm} mm"),
        transform=ax.transAxes,
        color="white",
        fontsize=8,
        va="bottom",
        path_effects=outlined,
    )
