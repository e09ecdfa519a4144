"""What ``/metrics`` says about the ranks and the requests, beside what Triton counts itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

GAUGE, COUNTER, HISTOGRAM = "GAUGE", "COUNTER", "HISTOGRAM"
SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0]


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric; ``source`` names the figure it follows."""

    name: str
    kind: str
    source: str
    meaning: str


FIGURES = (
    Measure("arctic_trt_requests_waiting", GAUGE, "waiting", "Sequences that wait within the ranks"),
    Measure("arctic_trt_requests_active", GAUGE, "active", "Sequences that the ranks compute"),
    Measure("arctic_trt_batch_size", GAUGE, "batch_size", "Sequences in the last step"),
    Measure("arctic_trt_kv_blocks", GAUGE, "blocks", "Blocks of the KV cache"),
    Measure("arctic_trt_kv_blocks_in_use", GAUGE, "blocks_in_use", "Blocks that sequences under way use"),
    Measure("arctic_trt_kv_blocks_cached", GAUGE, "blocks_cached", "Blocks kept for prompts that begin alike"),
    Measure("arctic_trt_steps_total", COUNTER, "steps", "Steps computed"),
    Measure("arctic_trt_computed_tokens_total", COUNTER, "computed_tokens", "Tokens computed, prompts included"),
    Measure("arctic_trt_reused_tokens_total", COUNTER, "reused_tokens", "Tokens of prompts found in the KV cache"),
    Measure("arctic_trt_preemptions_total", COUNTER, "preemptions", "Sequences that had to make room for others"),
    Measure("arctic_trt_generated_tokens_total", COUNTER, "generated_tokens", "Tokens generated"),
    Measure("arctic_trt_tokens_per_second", GAUGE, "tokens_per_second", "Tokens generated, over the last seconds"),
    Measure("arctic_trt_restarts_total", COUNTER, "restarts", "Times that the ranks were started again"),
    Measure("arctic_trt_up", GAUGE, "up", "1 while the ranks take requests, else 0"),
)
FIRST_TOKEN = Measure("arctic_trt_time_to_first_token_seconds", HISTOGRAM, "", "From a request's arrival to its first token")
LATENCY = Measure("arctic_trt_request_seconds", HISTOGRAM, "", "From a request's arrival to its end")
WINDOW_S = 5.0


class Metrics:
    """``triton`` is the module ``triton_python_backend_utils``; figures that have not changed are not told again."""

    def __init__(self, triton: Any) -> None:
        self._triton = triton
        self._families: list[Any] = []  # a metric does not outlive its family
        self._metrics = {measure.source: self._metric(measure) for measure in FIGURES}
        self._told: dict[str, float] = dict.fromkeys(self._metrics, 0.0)
        self._first_token, self._latency = (self._metric(measure, buckets=SECONDS) for measure in (FIRST_TOKEN, LATENCY))
        self._rate = Rate(WINDOW_S)

    def update(self, figures: dict[str, float]) -> None:
        """Tell ``figures``, by their sources; counts are totals that never fall."""
        rate = self._rate.update(time.monotonic(), figures["generated_tokens"])
        for measure in FIGURES:
            value = {**figures, "tokens_per_second": rate}[measure.source]
            told = self._told[measure.source]
            if value == told:
                continue
            self._told[measure.source] = value
            if measure.kind == COUNTER:
                self._metrics[measure.source].increment(value - told)
            else:
                self._metrics[measure.source].set(value)

    def ended(self, first_token_s: float | None, total_s: float | None) -> None:
        """A request came to its end."""
        if first_token_s is not None:
            self._first_token.observe(first_token_s)
        if total_s is not None:
            self._latency.observe(total_s)

    def _metric(self, measure: Measure, **more: Any) -> Any:
        kind = getattr(self._triton.MetricFamily, measure.kind)
        family = self._triton.MetricFamily(name=measure.name, description=measure.meaning, kind=kind)
        self._families.append(family)
        return family.Metric(labels={}, **more)


class Rate:
    """How fast a count grows, a second, over the last ``window_s``."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._points: list[tuple[float, float]] = []

    def update(self, now: float, count: float) -> float:
        """The rate up to ``now``, in seconds, when the count is ``count``."""
        self._points = [point for point in self._points if now - point[0] <= self._window_s]
        self._points.append((now, count))
        (begin, first), (end, last) = self._points[0], self._points[-1]
        return (last - first) / (end - begin) if end > begin else 0.0
