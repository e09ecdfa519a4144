"""The report's pictures: numbers in, PNG out. What is drawn is what the tables beside it say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from arctic_trt.report.page.canvas import Box, Picture, caption, picture, place
from arctic_trt.report.page.coverage import FEW, Coverage
from arctic_trt.report.page.records import SiteQuality, Unit
from arctic_trt.report.page.theme import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Matrix = NDArray[np.float64]
COVERAGE, SQNR, SCALES, HIDDEN_ERROR, SENSITIVITY = PICTURES = (
    "tokens_per_expert",
    "sqnr",
    "activation_scales",
    "hidden_error",
    "sensitivity",
)
LIMIT = 1e30
"""Larger numbers are not drawn: matplotlib's arithmetic would overflow, and they are no measurements."""
HALF, FULL = 480, 1000
"""Widths: beside a table, and that of the page."""
MANY_LAYERS = 16
NOTICEABLE_DB = 6.0
"""Colours of a heatmap of SQNR span this much at least, so that small differences look small."""
NUMBERED_EXPERTS, SMALL_CELL = 16, 20
TOP_UNITS = 16


def draw_coverage(coverage: Coverage) -> Picture:
    """Tokens per expert, layers x experts; experts without tokens are crossed, those with few have a ring."""
    counts = np.array(coverage.tokens, dtype=np.float64)
    layers, experts = counts.shape
    row = max(12, min(28, 420 // layers))
    box = Box(max(HALF, min(FULL, 130 + 24 * experts)), 70 + row * layers, 44, 84)
    cell = min((box.width - box.left - box.right) / experts, row)

    def draw(figure: Figure, axes: Axes, theme: Theme) -> None:
        values = np.where(counts > 0, counts, np.nan)
        ends = _range(np.maximum(values, max(1.0, FEW * counts.mean())))
        shades = _heatmap(figure, axes, box, values, ends, (theme.low, theme.high), theme.paper, logarithmic=True)
        _mark(axes, coverage.without, "x", theme.bad, cell)
        _mark(axes, coverage.few, "o", theme.warn, cell)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        caption(axes, "calibration tokens that reached each expert", theme)
        if experts <= NUMBERED_EXPERTS and cell > SMALL_CELL:
            _number(axes, theme, values, shades, "{:.0f}")

    alt = f"Heatmap of calibration tokens, {layers} layers by {experts} experts: {coverage.summary()}"
    return picture(COVERAGE, alt, box, draw)


def draw_sqnr(qualities: Sequence[SiteQuality], sites: Sequence[str]) -> Picture:
    """The worst matrix of every site in every layer, in dB."""
    layers = 1 + max(quality.layer for quality in qualities)
    values = np.full((len(sites), layers), np.nan)
    for quality in qualities:
        if _drawable(quality.min_db):
            values[sites.index(quality.site), quality.layer] = quality.min_db
    box = Box(max(HALF, min(FULL, 230 + 40 * layers)), 70 + 24 * len(sites), 120, 84)
    low, high = _range(values)
    ends = min(low, high - NOTICEABLE_DB), high

    def draw(figure: Figure, axes: Axes, theme: Theme) -> None:
        shades = _heatmap(figure, axes, box, values, ends, (theme.warn, theme.low), theme.paper, unit=" dB")
        axes.set_yticks(range(len(sites)), sites)
        axes.set_xlabel("layer")
        caption(axes, "signal to quantization noise of the worst matrix, dB", theme)
        _number(axes, theme, values, shades, "{:.1f}" if layers <= MANY_LAYERS else "{:.0f}")

    alt = f"Heatmap of signal to quantization noise, {len(sites)} sites by {layers} layers, {low:.1f} to {high:.1f} dB."
    return picture(SQNR, alt, box, draw)


def draw_scales(scales: Mapping[str, Sequence[float]]) -> Picture:
    """The static scale of each site's input over depth; what is not a positive number is left out."""
    box = Box(HALF, 340, 48, 116)

    def draw(figure: Figure, axes: Axes, theme: Theme) -> None:
        axes.set_yscale("log")
        lines = {}
        for (site, values), colour in zip(scales.items(), theme.series * len(scales), strict=False):
            y = np.array([value if value > 0 and _drawable(value) else np.nan for value in values])
            axes.plot(y, color=colour, marker="o", markersize=_dot(y))
            lines[site] = colour, y
        _plain_log_ticks(axes)
        _depth_axis(axes, max((len(values) for values in scales.values()), default=0))
        _name_lines(axes, lines)
        caption(axes, "scale (largest magnitude / 448), logarithmic", theme)

    return picture(SCALES, f"Lines of activation scales over depth for {', '.join(scales)}.", box, draw)


def draw_hidden_error(errors: Sequence[float]) -> Picture:
    """How far the hidden states are from the reference's after each layer."""
    box = Box(HALF, 260, 52, 16)
    y = np.array([100 * error if _drawable(error) else np.nan for error in errors])

    def draw(figure: Figure, axes: Axes, theme: Theme) -> None:
        axes.plot(y, color=theme.accent, marker="o", markersize=_dot(y))
        axes.set_ylim(0, 1.08 * float(np.nanmax(y, initial=1e-6)))
        axes.yaxis.set_major_formatter("{x:g} %")
        axes.grid(axis="y")
        _depth_axis(axes, len(y))
        caption(axes, "hidden state after each layer, relative error, mean over tokens", theme)

    last = f"{y[-1]:.3g} % after the last layer" if len(y) and math.isfinite(y[-1]) else "unknown after the last layer"
    return picture(HIDDEN_ERROR, f"Line of the relative error of the hidden state over {len(y)} layers: {last}.", box, draw)


def draw_sensitivity(units: Sequence[Unit]) -> Picture:
    """The units that quantization hurts most, those that are kept in bf16 filled."""
    shown = [unit for unit in units if _drawable(unit.kl)][:TOP_UNITS][::-1]
    box = Box(HALF, 44 + 18 * len(shown), 148, 64, bottom=8)

    def draw(figure: Figure, axes: Axes, theme: Theme) -> None:
        names = [name_unit(unit) for unit in shown]
        colours = [theme.accent if unit.kept else theme.faint for unit in shown]
        bars = axes.barh(range(len(shown)), [unit.kl for unit in shown], color=colours, height=0.62)
        axes.bar_label(bars, [f"{unit.kl:.3g}" for unit in shown], padding=4, color=theme.muted)
        axes.set_yticks(range(len(shown)), names)
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.spines[["bottom"]].set_visible(False)
        axes.margins(x=0, y=0.02)
        caption(axes, "KL by site and layer, nats; filled: kept in bf16", theme)

    alt = f"Bars of the {len(shown)} most sensitive sites" + (f", first {name_unit(shown[-1])}." if shown else ".")
    return picture(SENSITIVITY, alt, box, draw)


def name_unit(unit: Unit) -> str:
    """What a unit is called in pictures and tables."""
    return f"{unit.site}, all layers" if unit.layer is None else f"layer {unit.layer} {unit.site}"


def _drawable(value: float) -> bool:
    return abs(value) < LIMIT  # and no NaN


def _heatmap(
    figure: Figure,
    axes: Axes,
    box: Box,
    values: Matrix,
    ends: tuple[float, float],
    colours: tuple[str, str],
    gap: str,
    *,
    logarithmic: bool = False,
    unit: str = "",
) -> Matrix:
    """Cells between ``colours``, and beside them the scale; returns what each was painted with, [rows, columns, 4]."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    low, high = ends
    shades = LinearSegmentedColormap.from_list("theme", colours)
    shades.set_bad(gap)
    norm = LogNorm(low, high) if logarithmic else Normalize(low, high)
    image = axes.imshow(values, norm=norm, cmap=shades, aspect="auto", interpolation="nearest")
    rows, columns = values.shape
    axes.hlines(np.arange(rows + 1) - 0.5, -0.5, columns - 0.5, colors=gap, linewidth=0.7)
    axes.vlines(np.arange(columns + 1) - 0.5, -0.5, rows - 0.5, colors=gap, linewidth=0.7)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(16, integer=True))
    middle = math.sqrt(low * high) if logarithmic else (low + high) / 2
    scale = place(figure, box, box.width - 68, box.width - 58)
    bar = figure.colorbar(image, cax=scale, ticks=[low, middle, high])
    names = [f"{tick:.{0 if high - low > 10 else 1}f}{unit}" for tick in (low, middle, high)]
    below = "≤ " if np.nanmin(values, initial=low) < low else ""
    bar.ax.set_yticklabels([below + names[0], *names[1:]])
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    painted: Matrix = image.to_rgba(np.ma.masked_invalid(values))
    return painted


def _range(values: Matrix) -> tuple[float, float]:
    """Both ends of a scale that has some length, also where all values are the same or there are none."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (1.0, 1.0)
    return low, max(high, low + max(1e-3, abs(low) * 1e-3))


def _mark(axes: Axes, cells: Sequence[tuple[int, int]], marker: str, colour: str, cell: float) -> None:
    """Marks that fit into cells of ``cell`` pixels."""
    points = 0.75 * min(0.62 * cell, 10)
    rows, columns = zip(*cells, strict=True) if cells else ((), ())
    axes.plot(columns, rows, marker, color=colour, markersize=points, markerfacecolor="none", markeredgewidth=1.2)


def _number(axes: Axes, theme: Theme, values: Matrix, shades: Matrix, form: str) -> None:
    """Write every cell's value into it, in the colour that can be read on its shade."""
    from matplotlib.colors import to_rgb

    inks = {colour: _brightness(np.array(to_rgb(colour))) for colour in (theme.ink, theme.paper)}
    size = 7 if values.shape[1] > MANY_LAYERS else 8
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            shade = _brightness(shades[row, column])
            ink = max(inks, key=lambda colour: abs(inks[colour] - shade))
            axes.text(column, row, form.format(value), ha="center", va="center_baseline", color=ink, fontsize=size)


def _brightness(colour: Matrix) -> float:
    return float(np.array([0.2126, 0.7152, 0.0722]) @ colour[:3])


def _dot(y: Matrix) -> float:
    return 2 if len(y) > MANY_LAYERS else 4


def _depth_axis(axes: Axes, layers: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer")
    axes.set_xlim(-0.5, max(layers - 0.5, 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.tick_params(length=0)


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="y")


def _name_lines(axes: Axes, lines: Mapping[str, tuple[str, Matrix]]) -> None:
    """Write each line's name at its right end, names pushed apart where lines end close to each other."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    ends = {site: float(y[np.isfinite(y)][-1]) for site, (_, y) in lines.items() if np.isfinite(y).any()}
    ordered = sorted(ends, key=ends.__getitem__)
    heights = spread([(math.log(ends[site]) - low) / (high - low) for site in ordered], 0.055)
    for site, height in zip(ordered, heights, strict=True):
        axes.annotate(
            site,
            (1, height),
            (4, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=lines[site][0],
            va="center",
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending ``heights`` as little as needed for ``gap`` between neighbours, and none above the last by more."""
    up = list(heights)
    for i in range(1, len(up)):
        up[i] = max(up[i], up[i - 1] + gap)
    top = max(1.0, up[0] + gap * (len(up) - 1)) if up else 1.0
    for i in reversed(range(len(up))):
        up[i] = min(up[i], top - gap * (len(up) - 1 - i))
    return up
