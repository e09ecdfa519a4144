"""Drawing with matplotlib: one drawing in two themes, as PNG bytes that depend on nothing but the numbers.

The only place that knows matplotlib's machinery. Sizes are CSS pixels; a picture has two dots for each.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from arctic_trt.errors import RefusedError
from arctic_trt.report.page.theme import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CSS_DPI, DENSITY = 96, 2
FONT_POINTS = 9
PALETTE = 256
TOP = 30
"""Pixels above a plot, for its caption."""


@dataclass(frozen=True, slots=True)
class Box:
    """A picture's size, and what a plot leaves free of it, in pixels; ``bottom`` has room for an axis and its name."""

    width: int
    height: int
    left: int
    right: int
    bottom: int = 40


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture in both themes, PNG; ``alt`` says in words what it shows."""

    name: str
    alt: str
    width: int
    height: int
    light: bytes
    dark: bytes


Draw = Callable[["Figure", "Axes", Theme], None]


def picture(name: str, alt: str, box: Box, draw: Draw) -> Picture:
    """Have ``draw`` draw into the axes of ``box``, once a theme."""
    return Picture(name, alt, box.width, box.height, *(_render(box, draw, theme) for theme in (LIGHT, DARK)))


def _render(box: Box, draw: Draw, theme: Theme) -> bytes:
    with quiet_matplotlib() as matplotlib, matplotlib.rc_context(style(theme)):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(box.width / CSS_DPI, box.height / CSS_DPI), dpi=CSS_DPI * DENSITY)
        axes = place(figure, box, box.left, box.width - box.right)
        draw(figure, axes, theme)
        pixels = io.BytesIO()
        figure.savefig(pixels, format="rgba")
    size = (DENSITY * box.width, DENSITY * box.height)
    return _encode(pixels.getvalue(), size, theme.paper)


def _encode(rgba: bytes, size: tuple[int, int], paper: str) -> bytes:
    """PNG of opaque pixels in a few colours, which is a quarter as large, without dates or names of software."""
    from PIL import Image

    image = Image.frombytes("RGBA", size, rgba).convert("RGB")
    # an octree keeps colours that are rare, as those of a few marks are; a median cut does not
    image = image.quantize(PALETTE, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette = image.getpalette() or []
    at = 3 * image.tobytes()[0]  # the background became the mean of what is near it; it must be the page's
    palette[at : at + 3] = bytes.fromhex(paper.removeprefix("#"))
    image.putpalette(palette)
    data = io.BytesIO()
    image.save(data, "png", compress_level=9)
    return data.getvalue()


def place(figure: Figure, box: Box, left: float, right: float) -> Axes:
    """Axes between two pixel columns of the picture, as high as every plot."""
    width, height = box.width, box.height
    return figure.add_axes((left / width, box.bottom / height, (right - left) / width, (height - TOP - box.bottom) / height))


@contextmanager
def quiet_matplotlib() -> Iterator[Any]:
    """matplotlib, silent: where its cache lies, and glyphs that its font lacks, are nothing that a user must know."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                import matplotlib
            except ImportError:
                raise RefusedError("The package matplotlib is not installed.", "pip install matplotlib") from None
            yield matplotlib
    finally:
        logger.setLevel(level)


def style(theme: Theme) -> dict[str, Any]:
    """Settings of a quiet figure, over matplotlib's defaults: what a user's matplotlibrc says must not show."""
    import matplotlib

    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    colours = asdict(theme)
    return defaults | {
        "font.size": FONT_POINTS,
        "text.parse_math": False,
        "text.color": colours["ink"],
        "figure.facecolor": colours["paper"],
        "axes.facecolor": colours["paper"],
        "axes.edgecolor": colours["line"],
        "axes.labelcolor": colours["muted"],
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": colours["line"],
        "grid.linewidth": 0.6,
        "xtick.color": colours["line"],
        "ytick.color": colours["line"],
        "xtick.labelcolor": colours["muted"],
        "ytick.labelcolor": colours["muted"],
        "lines.linewidth": 1.4,
    }


def caption(axes: Axes, text: str, theme: Theme) -> None:
    """One line above the plot, aligned with its left edge."""
    axes.annotate(text, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", color=theme.muted, va="bottom")
