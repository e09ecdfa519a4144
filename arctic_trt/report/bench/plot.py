"""Pictures of a result: throughput against latency, as PNG or SVG on white."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_trt.errors import UsageError
from arctic_trt.report.bench.stats import BatchRow, OnlineRow
from arctic_trt.report.page.canvas import CSS_DPI, DENSITY, caption, quiet_matplotlib, style
from arctic_trt.report.page.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
WIDTH, HEIGHT = 800, 400
"""CSS pixels; a PNG has two dots for each."""
SHOWN = ("p50", "p95", "p99")
SALT = "arctic-trt"
"""Of the names within an SVG, so that the same rows give the same file."""


def check_ending(path: Path | None) -> None:
    """Raise :class:`UsageError` for a file that is neither PNG nor SVG."""
    if path is not None and path.suffix not in ENDINGS:
        raise UsageError(f"--plot {path} has the ending {path.suffix!r}, expected one of {', '.join(ENDINGS)}.")


def draw_batches(rows: Sequence[BatchRow], kind: str) -> bytes:
    """Output throughput against the time to the last token, a line a prompt length, points named by the batch."""
    lengths = _lengths(rows)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for length, colour in zip(lengths, _colours(len(lengths)), strict=True):
            line = [row for row in rows if row.asked_tokens == length]
            xs, ys = [row.latency_s for row in line], [row.output_tokens_per_s for row in line]
            axes.plot(xs, ys, "o-", color=colour, label=_name_length(length))
            for row, x, y in zip(line, xs, ys, strict=True):
                _name_point(axes, str(row.num_prompts), x, y, colour, above=length == lengths[0])
        _finish(axes, "latency of the batch, s", "output tokens/s", "throughput against latency; points: prompts at once")
        _explain(figure, axes, columns=3)

    return _render(draw, kind)


def draw_online(rows: Sequence[OnlineRow], kind: str) -> bytes:
    """On the left output throughput against latency, on the right the time to the first token over the rate of arrivals."""
    lengths = _lengths(rows)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for length, line_style in zip(lengths, _dashes(len(lengths)), strict=True):
            line = sorted((row for row in rows if row.asked_tokens == length), key=lambda row: row.qps)
            ys, rates = [row.output_tokens_per_s for row in line], [row.qps for row in line]
            for share, colour in zip(SHOWN, LIGHT.series, strict=False):
                name = share if len(lengths) == 1 else f"{share}, {_name_length(length)}"
                how: dict[str, Any] = {"color": colour, "linestyle": line_style, "marker": "o", "label": name}
                left.plot([getattr(row.latency_s, share) for row in line], ys, **how)
                right.plot(rates, [1000 * getattr(row.ttft_s, share) for row in line], **how)
            for row, y in zip(line if length == lengths[0] else [], ys, strict=False):
                _name_point(left, f"{row.qps:g}/s", row.latency_s.p50, y, LIGHT.series[0])
        _finish(left, "latency of a request, s", "output tokens/s", "throughput against latency; points: requests/s")
        _finish(right, "requests/s", "time to first token, ms", "time to first token, from the arrival")
        _explain(figure, left, columns=len(SHOWN))

    return _render(draw, kind)


def _render(draw: Callable[[Figure], None], kind: str) -> bytes:
    with quiet_matplotlib() as matplotlib, matplotlib.rc_context(style(LIGHT) | {"svg.hashsalt": SALT}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH / CSS_DPI, HEIGHT / CSS_DPI), dpi=CSS_DPI * DENSITY, layout="constrained")
        draw(figure)
        data = io.BytesIO()
        figure.savefig(data, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return data.getvalue()


def _finish(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xlim(left=0, right=1.12 * axes.get_xlim()[1])
    axes.set_ylim(bottom=0, top=1.12 * axes.get_ylim()[1])
    axes.grid()
    caption(axes, title, LIGHT)


def _explain(figure: Figure, axes: Axes, columns: int) -> None:
    """The names of the lines below everything, a row of ``columns`` after the other."""
    lines = axes.get_lines()
    across = [line for column in range(columns) for line in lines[column::columns]]
    figure.legend(handles=across, loc="outside lower center", ncols=columns, frameon=False)


def _name_point(axes: Axes, name: str, x: float, y: float, colour: str, *, above: bool = True) -> None:
    """To the upper left or the lower right, where a line that rises leaves room."""
    side, ha, va = ((-6, 3), "right", "bottom") if above else ((6, -3), "left", "top")
    axes.annotate(name, (x, y), side, textcoords="offset points", ha=ha, va=va, color=colour)


def _lengths(rows: Sequence[BatchRow] | Sequence[OnlineRow]) -> list[int | None]:
    """The lengths that were asked for, in their order."""
    return list(dict.fromkeys(row.asked_tokens for row in rows))


def _name_length(length: int | None) -> str:
    return "prompts of the file" if length is None else f"{length} tokens a prompt"


def _colours(count: int) -> list[str]:
    return [LIGHT.series[index % len(LIGHT.series)] for index in range(count)]


def _dashes(count: int) -> list[str]:
    return [("-", "--", ":", "-.")[index % 4] for index in range(count)]
