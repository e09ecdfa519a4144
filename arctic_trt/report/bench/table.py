"""Rows as people and spreadsheets read them."""

from __future__ import annotations

from collections.abc import Sequence

from arctic_trt.output import gigabytes
from arctic_trt.report.bench.run import BatchResult, Memory, OnlineResult
from arctic_trt.report.bench.stats import BatchRow, OnlineRow, Spread

BATCH_CSV = (
    *("framework", "num_prompts", "avg_input", "max_input", "min_input", "avg_output", "max_output", "min_output"),
    *("latency(s)", "throughput", "throughput_output", "tensor_parallel"),
)
"""The columns of ``benchmark_batch.py`` of Snowflake's tutorial."""
ONLINE_CSV = (
    *("framework", "qps", "avg_token_input", "avg_token_output", "avg_time_to_first_token", "avg_latency"),
    *("p50_latency", "p90_latency", "p95_latency", "p99_latency", "throughput", "throughput_output"),
)
"""The columns of ``benchmark_online.py`` of Snowflake's tutorial."""
MORE_ONLINE_CSV = tuple(f"p{share}_{what}" for what in ("time_to_first_token", "inter_token_latency") for share in (50, 95, 99))
"""Ours, after the tutorial's; then ``num_requests`` and ``failed``."""
BATCH_HEADER = ("prompts", "input", "output", "latency s", "TTFT s", "prefill tok/s", "decode tok/s", "total tok/s", "of memory")
ONLINE_HEADER = (
    *("qps", "input", "done", "failed", "output tok/s"),
    *(f"{what} p50 / p95 / p99" for what in ("TTFT ms", "ITL ms", "latency s")),
)
Cell = str | int | float | None


def batch_table(rows: Sequence[BatchRow]) -> list[tuple[str, ...]]:
    """A line a row, under ``BATCH_HEADER``; the last column is the share of the bandwidth that decoding uses."""
    return [
        (
            str(row.num_prompts),
            f"{row.input_tokens:.0f}",
            f"{row.output_tokens:.0f}",
            f"{row.latency_s:.3f}",
            f"{row.ttft_s:.3f}",
            f"{row.prefill_tokens_per_s:.1f}",
            "-" if row.decode_tokens_per_s is None else f"{row.decode_tokens_per_s:.1f}",
            f"{row.total_tokens_per_s:.1f}",
            "-" if row.roofline_share is None else f"{row.roofline_share:.1%}",
        )
        for row in rows
    ]


def batch_memory_table(result: BatchResult) -> list[tuple[str, str]]:
    """What memory allows, beside what was reached; empty for a server, whose memory is not here."""
    memory, row = result.memory, result.smallest
    if memory is None or row.bytes_per_step is None:
        return []
    batch = min(row.num_prompts, memory.max_batch_size)
    bound, reached = batch * memory.bandwidth / row.bytes_per_step, row.decode_tokens_per_s
    return [
        *_memory_lines(memory, row),
        ("decode at most", f"{bound:.1f} tokens/s at batch {batch}"),
        ("decode reached", "-" if reached is None else f"{reached:.1f} tokens/s, {row.roofline_share or 0:.1%} of it"),
    ]


def online_memory_table(result: OnlineResult) -> list[tuple[str, str]]:
    """As for batches, for the time between tokens."""
    memory, row, least, share = result.memory, result.slowest, result.least_itl_s, result.roofline_share
    if memory is None or row.itl_s is None or least is None or share is None:
        return []
    return [
        *_memory_lines(memory, row),
        ("ITL at least", f"{1000 * least:.2f} ms, for one sequence alone"),
        ("ITL reached", f"{1000 * row.itl_s.p50:.2f} ms, p50 at {row.qps:g} requests/s: memory needs {share:.1%} of it"),
    ]


def _memory_lines(memory: Memory, row: BatchRow | OnlineRow) -> list[tuple[str, str]]:
    per_token = gigabytes(memory.bytes_per_token(row))
    return [
        ("read bandwidth", f"{gigabytes(memory.bandwidth)}/s, measured"),
        ("bytes a token", f"{per_token} at batch 1: weights in the engine's files and the cache, on all ranks"),
    ]


def online_table(rows: Sequence[OnlineRow]) -> list[tuple[str, ...]]:
    """A line a row, under ``ONLINE_HEADER``."""
    return [
        (
            f"{row.qps:g}",
            f"{row.input_tokens:.0f}",
            str(row.num_requests - row.failed),
            str(row.failed),
            f"{row.output_tokens_per_s:.1f}",
            _three(row.ttft_s, 1000, 1),
            _three(row.itl_s, 1000, 1),
            _three(row.latency_s, 1, 2),
        )
        for row in rows
    ]


def batch_csv(rows: Sequence[BatchRow], framework: str, tensor_parallel: int | None) -> list[tuple[Cell, ...]]:
    """Header and rows with the tutorial's columns; its throughput is tokens a second of prompts and outputs together."""
    lines: list[tuple[Cell, ...]] = [BATCH_CSV]
    for row in rows:
        inputs, outputs = row.input_lengths, row.output_lengths
        lines.append(
            (
                *(framework, row.num_prompts, inputs.mean, inputs.most, inputs.least, outputs.mean, outputs.most, outputs.least),
                *(round(row.latency_s, 6), round(row.total_tokens_per_s, 3), round(row.output_tokens_per_s, 3), tensor_parallel),
            )
        )
    return lines


def online_csv(rows: Sequence[OnlineRow], framework: str) -> list[tuple[Cell, ...]]:
    """Header and rows with the tutorial's columns, then ours."""
    lines: list[tuple[Cell, ...]] = [(*ONLINE_CSV, *MORE_ONLINE_CSV, "num_requests", "failed")]
    for row in rows:
        ttft, latency, itl = row.ttft_s, row.latency_s, row.itl_s
        seconds = (ttft.mean, latency.mean, latency.p50, latency.p90, latency.p95, latency.p99)
        more = (*_percentiles(ttft), *(_percentiles(itl) if itl else (None, None, None)))
        lines.append(
            (
                *(framework, row.qps, row.input_tokens, row.output_tokens),
                *(round(value, 6) for value in seconds),
                *(round(row.total_tokens_per_s, 3), round(row.output_tokens_per_s, 3)),
                *(value if value is None else round(value, 6) for value in more),
                *(row.num_requests, row.failed),
            )
        )
    return lines


def _percentiles(spread: Spread) -> tuple[float, float, float]:
    return spread.p50, spread.p95, spread.p99


def _three(spread: Spread | None, factor: float, digits: int) -> str:
    return "-" if spread is None else " / ".join(f"{factor * value:.{digits}f}" for value in _percentiles(spread))
