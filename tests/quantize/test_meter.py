"""The figures of a running quantization."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arctic_trt.quantize import meter as module
from arctic_trt.quantize.meter import Meter

SOURCE: Any = SimpleNamespace(bytes_read=100)
FILES: Any = SimpleNamespace(bytes_written=40)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [50.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_it_reads_reader_writer_and_clock(clock: list[float]) -> None:
    meter = Meter(SOURCE, FILES, 1000, 35, 3)
    clock[0] += 7.5
    assert (meter.bytes_read, meter.bytes_written, meter.totals(), meter.seconds) == (100, 40, (100, 40), 7.5)
    assert (meter.layer, meter.expert, meter.output_bytes, meter.num_layers, meter.resumed_layers) == (3, 0, 1000, 35, 3)
    meter.at(4, 17)
    assert (meter.layer, meter.expert) == (4, 17)


@pytest.mark.parametrize(("resumed", "layer", "left"), [(0, 0, 340.0), (0, 9, 25.0), (10, 14, 40.0), (0, 34, 0.0), (34, 34, 0.0)])
def test_the_time_left_follows_from_the_layers_of_this_run(resumed: int, layer: int, left: float, clock: list[float]) -> None:
    meter = Meter(SOURCE, FILES, 1000, 35, resumed)
    clock[0] += 10
    assert meter.seconds_left(layer) == pytest.approx(left)


def test_peak_memory_is_this_programs_own() -> None:
    """However large the process was that started it."""
    ballast = bytearray(b"x" * (256 << 20))
    script = "from arctic_trt.quantize.meter import Meter; print(Meter.peak_rss_bytes())"
    words = [sys.executable, "-c", script]
    small = int(subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True).stdout)
    assert 50 << 20 < small < Meter.peak_rss_bytes() - len(ballast) // 2
