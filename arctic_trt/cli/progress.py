"""Progress of a quantization: a live line on a terminal, one plain line a layer in a log."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING

from arctic_trt.output import Output, duration, gigabytes

if TYPE_CHECKING:
    from arctic_trt.quantize.layer_pass import LayerSummary
    from arctic_trt.quantize.meter import Meter

REFRESH_S = 0.5


class LayerProgress:
    """Context manager around the pass; :meth:`begin` and :meth:`layer_done` are its callbacks."""

    def __init__(self, output: Output, num_experts: int) -> None:
        self._output = output
        self._num_experts = num_experts
        self._meter: Meter | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> LayerProgress:
        if self._output.terminal:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def begin(self, meter: Meter) -> None:
        """The pass has begun; ``meter`` knows where it is."""
        self._meter = meter

    def layer_done(self, summary: LayerSummary, meter: Meter) -> None:
        """A layer is finished."""
        self._output.note(layer_line(summary, meter))

    def _refresh(self) -> None:
        from rich.console import Console
        from rich.status import Status

        with Status("starting", console=Console(stderr=True)) as status:
            while not self._over.wait(REFRESH_S):
                if self._meter:
                    status.update(live_line(self._meter, self._num_experts))


def live_line(meter: Meter, num_experts: int) -> str:
    """Where the pass is and how fast it goes, at this moment."""
    return (
        f"layer {meter.layer + 1}/{meter.num_layers}  expert {meter.expert + 1}/{num_experts}  "
        f"read {rate(meter.bytes_read, meter.seconds)}  written {rate(meter.bytes_written, meter.seconds)}  "
        f"rss {gigabytes(meter.peak_rss_bytes())}"
    )


def layer_line(summary: LayerSummary, meter: Meter) -> str:
    """A finished layer, with what a person watching a long job wants to know."""
    tokens = summary.tokens_per_expert
    seen = len(tokens) - len(summary.experts_without_tokens)
    experts = f"  experts {seen}/{len(tokens)} (min {min(tokens)} tok)" if tokens else ""
    return (
        f"layer {summary.layer + 1}/{meter.num_layers}  read {rate(meter.bytes_read, meter.seconds)}  "
        f"written {rate(meter.bytes_written, meter.seconds)}{experts}  rss {gigabytes(meter.peak_rss_bytes())}  "
        f"eta {duration(meter.seconds_left(summary.layer))}"
    )


def rate(num_bytes: int, seconds: float) -> str:
    """An amount and how fast it came, ``25.90 GB at 1.10 GB/s``."""
    return f"{gigabytes(num_bytes)} at {gigabytes(num_bytes / seconds)}/s"
