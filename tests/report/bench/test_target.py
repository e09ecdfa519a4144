"""An engine under arrivals: joins while others run, waits its turn, and counts from the arrival."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from arctic_trt.engine.config import BuildConfig
from arctic_trt.report.bench.plan import Arrival
from arctic_trt.report.bench.stats import Trace
from arctic_trt.report.bench.target import EngineTarget
from arctic_trt.report.bench.workload import BenchPrompt
from arctic_trt.runtime.batcher import Batcher
from arctic_trt.runtime.outcome import Logits
from arctic_trt.runtime.step import Step

LIMITS = BuildConfig(max_batch_size=8, max_input_len=50, max_seq_len=99, max_num_tokens=64, max_beam_width=1)
STEP_S = 0.01


class SlowEngine:
    """Stands in for an open engine: every step takes a while, and every token is 2, which ends other engines' texts."""

    def __init__(self) -> None:
        self.together: list[int] = []

    @contextmanager
    def batcher(self, **options: Any) -> Iterator[Batcher]:
        yield Batcher(self.execute, LIMITS, **options)

    def execute(self, step: Step) -> Logits:
        time.sleep(STEP_S)
        self.together.append(len(step.chunks))
        return Logits(torch.nn.functional.one_hot(torch.full((step.num_logits,), 2), 9).float())


def serve(*times: float, concurrency: int = 8, tokens: int = 5) -> tuple[list[Trace], SlowEngine, list[Trace]]:
    engine, ended = SlowEngine(), []
    arrivals = [
        Arrival(at_s=at_s, prompt=BenchPrompt((1,) * (3 + index)), max_new_tokens=tokens) for index, at_s in enumerate(times)
    ]
    traces = EngineTarget(engine).serve(arrivals, concurrency=concurrency, on_done=ended.append)  # type: ignore[arg-type]
    return traces, engine, ended


def test_all_tokens_come_and_traces_keep_the_order_of_the_arrivals() -> None:
    traces, engine, ended = serve(0.0, 0.0, 0.0)
    assert [trace.input_tokens for trace in traces] == [3, 4, 5]
    assert all(trace.output_tokens == len(trace.token_times_s) == 5 for trace in traces)
    assert engine.together == [3] * 5 and len(ended) == 3
    assert all(trace.gaps_s and min(trace.gaps_s) >= STEP_S for trace in traces)


def test_a_request_joins_those_that_run() -> None:
    traces, engine, _ = serve(0.0, 2.5 * STEP_S, tokens=8)
    assert engine.together[0] == 1 and 2 in engine.together
    assert traces[1].arrival_s == 2.5 * STEP_S
    assert traces[1].token_times_s[0] >= traces[1].arrival_s + STEP_S


def test_between_requests_the_engine_does_nothing() -> None:
    traces, engine, _ = serve(0.0, 0.2, tokens=2)
    assert engine.together == [1] * 4 and traces[1].token_times_s[0] >= 0.2


@pytest.mark.parametrize("concurrency", [1, 2])
def test_no_more_than_allowed_run_and_waiting_counts(concurrency: int) -> None:
    traces, engine, _ = serve(*[0.0] * 4, concurrency=concurrency)
    assert set(engine.together) == {concurrency}
    assert traces[3].ttft_s >= 5 * STEP_S * (4 / concurrency - 1)
