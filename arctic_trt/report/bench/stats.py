"""From the times of single requests to the rows of a result. Seconds count from the beginning of a case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arctic_trt.report.bench.plan import Case

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What became of one request: when it arrived, when its tokens came, and why it failed if it did.

    ``token_times_s`` has one entry a token, or one a piece of a stream where a server sends several tokens in one;
    ``output_tokens`` is the number of tokens.
    """

    arrival_s: float
    input_tokens: int
    token_times_s: tuple[float, ...] = ()
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """From the arrival, so that time in a queue counts."""
        return self.token_times_s[0] - self.arrival_s

    @property
    def latency_s(self) -> float:
        return self.token_times_s[-1] - self.arrival_s

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next."""
        return [after - before for before, after in zip(self.token_times_s, self.token_times_s[1:], strict=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A quantity over many requests: mean and percentiles, with linear interpolation between neighbours."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


def spread(values: Sequence[float]) -> Spread | None:
    """None where there are no values."""
    if not values:
        return None
    p50, p90, p95, p99 = np.percentile(values, PERCENTILES).tolist()
    return Spread(mean=float(np.mean(values)), p50=p50, p90=p90, p95=p95, p99=p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of a case's prompts, or of its outputs."""

    mean: float
    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """A batch of prompts that arrive together. Tokens are those of one prompt and of its output, on average.

    ``ttft_s`` is the mean over prompts. Until the last prompt has its first token is *prefill*, what follows is *decode*: both
    rates count the tokens of all prompts, ``decode_tokens_per_s`` is None where there is but one token. ``latencies_s`` are
    those of all repetitions, of which the row is the one with the median. ``asked_tokens`` is the length that was asked for.
    """

    num_prompts: int
    asked_tokens: int | None
    input_tokens: float
    output_tokens: float
    latency_s: float
    ttft_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    total_tokens_per_s: float
    output_tokens_per_s: float
    input_lengths: Lengths
    output_lengths: Lengths
    latencies_s: tuple[float, ...]
    bytes_per_step: float | None = None
    roofline_share: float | None = None


def batch_row(case: Case, traces: Sequence[Trace]) -> BatchRow:
    """The figures of one batch, none of whose requests has failed."""
    first = max(trace.token_times_s[0] for trace in traces)
    end = max(trace.token_times_s[-1] for trace in traces)
    inputs, outputs = (sum(trace.input_tokens for trace in traces), sum(trace.output_tokens for trace in traces))
    decoded = sum(time > first for trace in traces for time in trace.token_times_s)
    pieces = sum(len(trace.token_times_s) for trace in traces)
    return BatchRow(
        num_prompts=len(traces),
        asked_tokens=case.input_tokens,
        input_tokens=_whole(inputs / len(traces)),
        output_tokens=_whole(outputs / len(traces)),
        latency_s=end,
        ttft_s=float(np.mean([trace.ttft_s for trace in traces])),
        prefill_tokens_per_s=inputs / first,
        decode_tokens_per_s=decoded * outputs / pieces / (end - first) if decoded else None,
        total_tokens_per_s=(inputs + outputs) / end,
        output_tokens_per_s=outputs / end,
        input_lengths=_lengths([trace.input_tokens for trace in traces]),
        output_lengths=_lengths([trace.output_tokens for trace in traces]),
        latencies_s=(end,),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRow:
    """Requests that arrived at ``qps``; figures are those of the requests that did not fail.

    Throughput counts from the first arrival to the last token. Times of first tokens and latencies count from the arrival.
    """

    qps: float
    asked_tokens: int | None
    num_requests: int
    failed: int
    input_tokens: float
    output_tokens: float
    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_s: Spread
    itl_s: Spread | None
    latency_s: Spread


def online_row(case: Case, traces: Sequence[Trace]) -> OnlineRow:
    """The figures of one rate; at least one request must have succeeded."""
    done = [trace for trace in traces if trace.error is None]
    seconds = max(trace.token_times_s[-1] for trace in done)
    inputs, outputs = (sum(trace.input_tokens for trace in done), sum(trace.output_tokens for trace in done))
    ttft, latency = spread([trace.ttft_s for trace in done]), spread([trace.latency_s for trace in done])
    assert case.qps and ttft and latency
    return OnlineRow(
        qps=case.qps,
        asked_tokens=case.input_tokens,
        num_requests=len(traces),
        failed=len(traces) - len(done),
        input_tokens=_whole(inputs / len(done)),
        output_tokens=_whole(outputs / len(done)),
        seconds=seconds,
        requests_per_s=len(done) / seconds,
        output_tokens_per_s=outputs / seconds,
        total_tokens_per_s=(inputs + outputs) / seconds,
        ttft_s=ttft,
        itl_s=spread([gap for trace in done for gap in trace.gaps_s]),
        latency_s=latency,
    )


def _lengths(counts: Sequence[int]) -> Lengths:
    return Lengths(mean=_whole(sum(counts) / len(counts)), least=min(counts), most=max(counts))


def _whole(value: float) -> float:
    """An int where it is one, so that 512 tokens are not written as 512.0."""
    return int(value) if value == int(value) else value
