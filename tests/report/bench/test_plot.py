"""Pictures: of the promised size and kind, on white, and with what they name."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.report.bench import plot
from arctic_trt.report.bench.plot import check_ending, draw_batches, draw_online
from arctic_trt.report.bench.run import Watch, run_batches
from arctic_trt.report.bench.stats import BatchRow, OnlineRow, Spread
from tests.report.bench.clockwork import Clockwork, batches
from tests.report.bench.test_table import ONLINE


def slower(row: OnlineRow, qps: float, asked: int) -> OnlineRow:
    latency = Spread(mean=2.0 * qps, p50=qps, p90=2.0 * qps, p95=3.0 * qps, p99=4.0 * qps)
    return replace(row, qps=qps, asked_tokens=asked, latency_s=latency, output_tokens_per_s=25 * qps)


@pytest.fixture(scope="module")
def batch_rows() -> list[BatchRow]:
    return [row for length in (16, 64) for row in run_batches(Clockwork(), batches(1, 4, length=length), None, Watch()).rows]


@pytest.fixture(scope="module")
def online_rows() -> list[OnlineRow]:
    return [slower(ONLINE, qps, asked) for asked in (64, 128) for qps in (1.0, 2.0, 4.0)]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_a_png_is_readable_at_800_pixels_on_white(batch_rows: list[BatchRow], online_rows: list[OnlineRow]) -> None:
    for png in (draw_batches(batch_rows, "png"), draw_online(online_rows, "png")):
        image = pixels(png)
        assert image.shape == (800, 1600, 3)
        assert (image == 255).all(-1).mean() > 0.8 and (image[0] == 255).all() and (image[:, -1] == 255).all()
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50  # lines and text in colours


def words(svg: bytes) -> str:
    """Text that is drawn, of which an SVG keeps the words as comments."""
    return " | ".join(re.findall(r"<!-- (.*?) -->", svg.decode()))


def test_axes_have_names_and_units(batch_rows: list[BatchRow], online_rows: list[OnlineRow]) -> None:
    said = words(draw_batches(batch_rows, "svg"))
    for text in ("latency of the batch, s", "output tokens/s", "16 tokens a prompt", "64 tokens a prompt", "| 4 |"):
        assert text in said
    said = words(draw_online(online_rows, "svg"))
    for text in (
        "latency of a request, s",
        "output tokens/s",
        "time to first token, ms",
        "requests/s",
        "2/s",
        "p99, 128 tokens a prompt",
    ):
        assert text in said
    assert "| p50 |" in words(draw_online(online_rows[:3], "svg")) + " |"


def test_one_point_is_a_picture_too(batch_rows: list[BatchRow], online_rows: list[OnlineRow]) -> None:
    alone = replace(batch_rows[0], asked_tokens=None)
    assert "prompts of the file" in words(draw_batches([alone], "svg"))
    assert draw_online(online_rows[:1], "png").startswith(b"\x89PNG")


def test_the_same_rows_give_the_same_bytes(batch_rows: list[BatchRow]) -> None:
    for kind in ("png", "svg"):
        assert draw_batches(batch_rows, kind) == draw_batches(batch_rows, kind)


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.PNG.txt"])
def test_other_endings_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"--plot .* has the ending .*expected one of \.png, \.svg"):
        check_ending(Path(name))
    check_ending(Path("a.svg"))
    check_ending(None)


def test_without_matplotlib_a_plot_is_refused(monkeypatch: pytest.MonkeyPatch, batch_rows: list[BatchRow]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RefusedError, match="matplotlib is not installed"):
        plot.draw_batches(batch_rows, "png")
