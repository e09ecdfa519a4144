"""Rows for people, and for spreadsheets with the tutorial's columns."""

from __future__ import annotations

import pytest

from arctic_trt.report.bench.plan import Case
from arctic_trt.report.bench.run import BatchResult, OnlineResult, Watch, run_batches
from arctic_trt.report.bench.stats import OnlineRow, Spread, Trace, batch_row
from arctic_trt.report.bench.table import (
    BATCH_CSV,
    BATCH_HEADER,
    ONLINE_CSV,
    ONLINE_HEADER,
    batch_csv,
    batch_memory_table,
    batch_table,
    online_csv,
    online_memory_table,
    online_table,
)
from tests.report.bench.clockwork import Clockwork, batches, memory

TUTORIAL_BATCH = (
    "framework, num_prompts, avg_input, max_input, min_input, avg_output, max_output, min_output, latency(s), throughput, "
    "throughput_output, tensor_parallel"
)
"""The line that ``benchmark_batch.py`` prints above its rows."""
TUTORIAL_ONLINE = (
    "framework, qps, avg_token_input, avg_token_output, avg_time_to_first_token, avg_latency, p50_latency, p90_latency, "
    "p95_latency, p99_latency, throughput, throughput_output"
)
"""The line that ``benchmark_tools.py`` prints above a row of ``benchmark_online.py``."""
ONLINE = OnlineRow(
    qps=0.5,
    asked_tokens=64,
    num_requests=9,
    failed=1,
    input_tokens=64,
    output_tokens=31.5,
    seconds=10.0,
    requests_per_s=0.8,
    output_tokens_per_s=25.2,
    total_tokens_per_s=76.4,
    ttft_s=Spread(mean=0.2, p50=0.1, p90=0.2, p95=0.3, p99=0.4),
    itl_s=Spread(mean=0.02, p50=0.01, p90=0.02, p95=0.03, p99=0.04),
    latency_s=Spread(mean=2.0, p50=1.0, p90=2.5, p95=3.0, p99=4.0),
)


@pytest.fixture
def result() -> BatchResult:
    return run_batches(Clockwork(), batches(1, 2), memory(bandwidth=1e9), Watch())


def test_the_columns_are_the_tutorials() -> None:
    assert list(BATCH_CSV) == TUTORIAL_BATCH.split(", ") and list(ONLINE_CSV) == TUTORIAL_ONLINE.split(", ")


def test_a_batch_as_csv() -> None:
    unequal = [
        Trace(arrival_s=0.0, input_tokens=tokens, token_times_s=(1.0, 2.0), output_tokens=2 * tokens) for tokens in (10, 20)
    ]
    row = batch_row(Case(num_prompts=2, input_tokens=None), unequal)
    assert batch_csv([row], "ours", 8) == [BATCH_CSV, ("ours", 2, 15, 20, 10, 30, 40, 20, 2.0, 45.0, 30.0, 8)]
    assert batch_csv([row], "theirs", None)[1][-1] is None


def test_a_rate_as_csv() -> None:
    header, row = online_csv([ONLINE], "ours")
    assert len(header) == len(row) and header[: len(ONLINE_CSV)] == ONLINE_CSV
    value = dict(zip(header, row, strict=True))
    assert (value["framework"], value["qps"], value["avg_token_input"], value["avg_token_output"]) == ("ours", 0.5, 64, 31.5)
    assert [value[f"p{share}_latency"] for share in (50, 90, 95, 99)] == [1.0, 2.5, 3.0, 4.0]
    assert (value["avg_time_to_first_token"], value["avg_latency"]) == (0.2, 2.0)
    assert (value["throughput"], value["throughput_output"]) == (76.4, 25.2)
    assert [value[f"p{share}_time_to_first_token"] for share in (50, 95, 99)] == [0.1, 0.3, 0.4]
    assert [value[f"p{share}_inter_token_latency"] for share in (50, 95, 99)] == [0.01, 0.03, 0.04]
    assert (value["num_requests"], value["failed"]) == (9, 1)


def test_a_batch_for_people(result: BatchResult) -> None:
    rows = batch_table(result.rows)
    assert all(len(row) == len(BATCH_HEADER) for row in rows)
    assert rows[0][:8] == ("1", "16", "11", "2.000", "1.000", "16.0", "10.0", "13.5")
    assert rows[0][8] == f"{result.rows[0].roofline_share:.1%}"


def test_what_is_unknown_is_a_dash() -> None:
    row = batch_row(
        Case(num_prompts=1, input_tokens=9), [Trace(arrival_s=0, input_tokens=9, token_times_s=(1.0,), output_tokens=1)]
    )
    assert batch_table([row])[0][6] == batch_table([row])[0][8] == "-"


def test_memory_for_people(result: BatchResult) -> None:
    lines = dict(batch_memory_table(result))
    assert lines["read bandwidth"] == "1.00 GB/s, measured"
    assert lines["decode at most"] == f"{1e9 / result.rows[0].bytes_per_step:.1f} tokens/s at batch 1"
    assert lines["decode reached"] == f"10.0 tokens/s, {result.rows[0].roofline_share:.1%} of it"
    assert batch_memory_table(BatchResult(rows=result.rows, memory=None)) == []


def test_a_rate_for_people() -> None:
    (row,) = online_table([ONLINE])
    assert len(row) == len(ONLINE_HEADER)
    assert row == ("0.5", "64", "8", "1", "25.2", "100.0 / 300.0 / 400.0", "10.0 / 30.0 / 40.0", "1.00 / 3.00 / 4.00")


def test_memory_beside_a_rate_for_people() -> None:
    allowed = memory(bandwidth=1e9)
    lines = dict(online_memory_table(OnlineResult(rows=[ONLINE], memory=allowed)))
    least = allowed.bytes_per_token(ONLINE) / 1e9
    assert lines["ITL at least"] == f"{1000 * least:.2f} ms, for one sequence alone"
    assert lines["ITL reached"] == f"10.00 ms, p50 at 0.5 requests/s: memory needs {least / 0.01:.1%} of it"
    assert online_memory_table(OnlineResult(rows=[ONLINE], memory=None)) == []
