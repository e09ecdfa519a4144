"""Figures of a running quantization: bytes, seconds, memory, and how long it will still take."""

from __future__ import annotations

import time
from pathlib import Path

from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.checkpoint.writer import RankFiles


class Meter:
    """Reads its figures from the reader and the writer it is given; starts counting when constructed."""

    def __init__(self, source: HfCheckpoint, files: RankFiles, output_bytes: int, num_layers: int, resumed_layers: int) -> None:
        self.output_bytes = output_bytes
        self.num_layers = num_layers
        self.resumed_layers = resumed_layers
        self._source = source
        self._files = files
        self._began = time.perf_counter()
        self.layer = resumed_layers
        self.expert = 0

    def at(self, layer: int, expert: int) -> None:
        """Say where the pass is now, for whoever looks."""
        self.layer, self.expert = layer, expert

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    @property
    def bytes_written(self) -> int:
        return self._files.bytes_written

    def seconds_left(self, layer: int) -> float:
        """By the mean of this run's layers, ``layer`` being the last one finished."""
        done = layer + 1 - self.resumed_layers
        return self.seconds / done * (self.num_layers - layer - 1)

    def totals(self) -> tuple[int, int]:
        """Bytes read and written by this process."""
        return self.bytes_read, self.bytes_written

    @staticmethod
    def peak_rss_bytes() -> int:
        """Highest resident size of this program so far; getrusage would count the process that started it, too."""
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
