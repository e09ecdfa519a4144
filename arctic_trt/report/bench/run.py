"""A benchmark from its cases to its rows; what is measured is behind :class:`arctic_trt.report.bench.target.Target`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from arctic_trt.errors import ArcticTrtError
from arctic_trt.report.bench.plan import Arrival, Case, arrive_at_random, arrive_together
from arctic_trt.report.bench.roofline import Traffic, mean_context
from arctic_trt.report.bench.stats import BatchRow, OnlineRow, Trace, batch_row, online_row
from arctic_trt.report.bench.target import Target
from arctic_trt.report.bench.workload import Workload

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One case: its requests, once a repetition, and how many may be under way."""

    case: Case
    repetitions: tuple[list[Arrival], ...]
    concurrency: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who is told while a benchmark runs: of each case as it begins, and of each request that ends (how many, of how many)."""

    on_case: Callable[[Case], None] = lambda case: None
    on_request: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What bounds an engine's decoding: its reads, bytes a second that memory delivers, and sequences of a step at most."""

    traffic: Traffic
    bandwidth: float
    max_batch_size: int

    def bytes_per_token(self, row: BatchRow | OnlineRow) -> float:
        """What a decode step of one sequence reads, at the context of ``row``."""
        return self.traffic.step_bytes(1, mean_context(row.input_tokens, row.output_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """Rows, and how far the smallest batch is from what memory allows; without ``memory`` only rows."""

    rows: list[BatchRow]
    memory: Memory | None

    @property
    def smallest(self) -> BatchRow:
        return min(self.rows, key=lambda row: row.num_prompts)

    def as_dict(self) -> dict[str, Any]:
        return _as_dict(self.rows, self.memory, self.smallest, self.smallest.roofline_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineResult:
    """Rows, and how far the median time between tokens is from what memory allows one sequence, at the lowest rate."""

    rows: list[OnlineRow]
    memory: Memory | None

    @property
    def slowest(self) -> OnlineRow:
        return min(self.rows, key=lambda row: row.qps)

    @property
    def least_itl_s(self) -> float | None:
        """The time in which memory delivers what a step of one sequence reads."""
        return self.memory.bytes_per_token(self.slowest) / self.memory.bandwidth if self.memory else None

    @property
    def roofline_share(self) -> float | None:
        """Of the time between tokens, the part that memory needs."""
        least, found = self.least_itl_s, self.slowest.itl_s
        return least / found.p50 if least and found else None

    def as_dict(self) -> dict[str, Any]:
        return _as_dict(self.rows, self.memory, self.slowest, self.roofline_share)


def _as_dict(
    rows: Sequence[BatchRow | OnlineRow], memory: Memory | None, reference: BatchRow | OnlineRow, share: float | None
) -> dict[str, Any]:
    return {
        "rows": [asdict(row) for row in rows],
        "bandwidth_gb_s": memory and memory.bandwidth / 1e9,
        "bytes_per_token": memory and memory.bytes_per_token(reference),
        "roofline_share": share,
    }


def plan_batch_rounds(workload: Workload, cases: Sequence[Case], *, max_new_tokens: int, repeat: int) -> list[Round]:
    """All prompts of a case at once, ``repeat`` times, with other prompts each time."""
    return [
        Round(
            case=case,
            repetitions=tuple(
                arrive_together(workload.take(case.num_prompts, case.input_tokens), max_new_tokens) for _ in range(repeat)
            ),
            concurrency=case.num_prompts,
        )
        for case in cases
    ]


def plan_online_rounds(
    workload: Workload, cases: Sequence[Case], *, max_new_tokens: int, concurrency: int, seed: int
) -> list[Round]:
    """The requests of a case at random times, the same times for each rate but for its scale."""
    rounds = []
    for case in cases:
        assert case.qps is not None
        prompts = workload.take(case.num_prompts, case.input_tokens)
        arrivals = arrive_at_random(prompts, max_new_tokens, qps=case.qps, seed=seed)
        rounds.append(Round(case=case, repetitions=(arrivals,), concurrency=concurrency))
    return rounds


def warm_up(target: Target, arrivals: Sequence[Arrival]) -> None:
    """Serve requests that no figure counts; raises :class:`ArcticTrtError` if one fails."""
    if arrivals:
        _refuse_failures(target.serve(arrivals, concurrency=len(arrivals), on_done=lambda trace: None))


def run_batches(target: Target, rounds: Sequence[Round], memory: Memory | None, watch: Watch) -> BatchResult:
    """Measure batches; raises :class:`ArcticTrtError` if a request fails, because its batch then has no figures."""
    rows = []
    for round in rounds:
        watch.on_case(round.case)
        repeated = []
        for traces in _serve(target, round, watch):
            _refuse_failures(traces)
            repeated.append(batch_row(round.case, traces))
        rows.append(_beside_memory(median_row(repeated), memory))
    return BatchResult(rows=rows, memory=memory)


def run_online(target: Target, rounds: Sequence[Round], memory: Memory | None, watch: Watch) -> OnlineResult:
    """Measure rates; a row counts the requests that failed, and :class:`ArcticTrtError` is raised if all of one have."""
    rows = []
    for round in rounds:
        watch.on_case(round.case)
        (traces,) = _serve(target, round, watch)
        errors = [trace.error for trace in traces if trace.error]
        if len(errors) == len(traces):
            _refuse_failures(traces)
        if errors:
            logger.warning("%d of %d requests failed; the first: %s", len(errors), len(traces), errors[0])
        rows.append(online_row(round.case, traces))
    return OnlineResult(rows=rows, memory=memory)


def median_row(repeated: Sequence[BatchRow]) -> BatchRow:
    """The repetition with the median latency, the lower one of two."""
    ordered = sorted(repeated, key=lambda row: row.latency_s)
    return replace(ordered[(len(ordered) - 1) // 2], latencies_s=tuple(row.latency_s for row in repeated))


def _serve(target: Target, round: Round, watch: Watch) -> Iterator[list[Trace]]:
    for arrivals in round.repetitions:
        ended: list[Trace] = []

        def on_done(trace: Trace, ended: list[Trace] = ended) -> None:
            ended.append(trace)
            watch.on_request(len(ended), round.case.num_prompts)

        yield target.serve(arrivals, concurrency=round.concurrency, on_done=on_done)


def _refuse_failures(traces: Sequence[Trace]) -> None:
    errors = [trace.error for trace in traces if trace.error]
    if errors:
        raise ArcticTrtError(
            f"{len(errors)} of {len(traces)} requests failed, the first because: {errors[0]}",
            "Is the server running, with this model, and large enough for these requests?",
        )


def _beside_memory(row: BatchRow, memory: Memory | None) -> BatchRow:
    """The row with the bytes that a decode step of its batch reads, and their rate as a share of the bandwidth."""
    if memory is None:
        return row
    batch = min(row.num_prompts, memory.max_batch_size)
    step_bytes = memory.traffic.step_bytes(batch, mean_context(row.input_tokens, row.output_tokens))
    steps_per_s = row.decode_tokens_per_s and row.decode_tokens_per_s / batch
    share = steps_per_s and step_bytes * steps_per_s / memory.bandwidth
    return replace(row, bytes_per_step=step_bytes, roofline_share=share)
