"""Figures of traces, by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.report.bench.plan import Case
from arctic_trt.report.bench.stats import Lengths, Spread, Trace, batch_row, online_row, spread

BATCH = Case(num_prompts=2, input_tokens=10)


def trace(*times: float, arrival: float = 0.0, inputs: int = 10, tokens: int | None = None) -> Trace:
    return Trace(
        arrival_s=arrival, input_tokens=inputs, token_times_s=times, output_tokens=len(times) if tokens is None else tokens
    )


def test_percentiles_of_a_hundred_and_one_values() -> None:
    assert spread([float(value) for value in reversed(range(101))]) == Spread(mean=50, p50=50, p90=90, p95=95, p99=99)


def test_percentiles_lie_between_neighbours() -> None:
    assert spread([1.0, 2.0]) == Spread(
        mean=1.5, p50=1.5, p90=pytest.approx(1.9), p95=pytest.approx(1.95), p99=pytest.approx(1.99)
    )
    assert spread([3.0]) == Spread(mean=3, p50=3, p90=3, p95=3, p99=3)
    assert spread([]) is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_are_ordered_and_within_the_values(values: list[float]) -> None:
    found = spread(values)
    assert found
    ordered = [min(values), found.p50, found.p90, found.p95, found.p99, max(values)]
    assert all(low <= high * (1 + 1e-12) for low, high in pairwise(ordered))


def test_a_trace_counts_from_the_arrival() -> None:
    late = trace(2.0, 2.5, 4.0, arrival=1.5)
    assert (late.ttft_s, late.latency_s, late.gaps_s) == (0.5, 2.5, [0.5, 1.5])


def test_a_batch_by_hand() -> None:
    """Two prompts of 10 tokens: all have their first token after 2 s, and 4 tokens come in the 4 s after that."""
    row = batch_row(BATCH, [trace(1.0, 2.0, 4.0, 5.0), trace(2.0, 3.0, 6.0)])
    assert (row.num_prompts, row.asked_tokens, row.input_tokens, row.output_tokens) == (2, 10, 10, 3.5)
    assert (row.latency_s, row.ttft_s) == (6.0, 1.5)
    assert row.prefill_tokens_per_s == 20 / 2
    assert row.decode_tokens_per_s == 4 / 4
    assert row.total_tokens_per_s == pytest.approx(27 / 6) and row.output_tokens_per_s == pytest.approx(7 / 6)
    assert row.input_lengths == Lengths(mean=10, least=10, most=10)
    assert row.output_lengths == Lengths(mean=3.5, least=3, most=4)


def test_a_batch_of_one_is_decoded_from_its_first_token_on() -> None:
    assert batch_row(BATCH, [trace(1.0, 1.5, 2.0)]).decode_tokens_per_s == 2 / 1.0


def test_one_token_has_no_decode_rate() -> None:
    assert batch_row(BATCH, [trace(1.0), trace(1.0)]).decode_tokens_per_s is None


def test_pieces_of_several_tokens_count_as_many() -> None:
    assert batch_row(BATCH, [trace(1.0, 2.0, 3.0, tokens=12)]).decode_tokens_per_s == 2 * 4 / 2


def test_whole_numbers_of_tokens_are_integers() -> None:
    assert isinstance(batch_row(BATCH, [trace(1.0)]).input_tokens, int)


def test_a_rate_by_hand_leaves_out_what_failed() -> None:
    case = Case(num_prompts=3, input_tokens=10, qps=2.0)
    failed = Trace(arrival_s=1.0, input_tokens=10, token_times_s=(90.0,), output_tokens=1, error="refused")
    row = online_row(case, [trace(1.0, 2.0), failed, trace(3.0, 3.5, 5.0, arrival=2.0)])
    assert (row.qps, row.num_requests, row.failed, row.seconds) == (2.0, 3, 1, 5.0)
    assert (row.requests_per_s, row.output_tokens_per_s, row.total_tokens_per_s) == (0.4, 1.0, 5.0)
    assert row.ttft_s.mean == 1.0 and row.latency_s.p50 == 2.5
    assert row.itl_s and row.itl_s.mean == pytest.approx(1.0)
    assert (row.input_tokens, row.output_tokens) == (10, 2.5)


def test_single_tokens_have_no_gaps() -> None:
    assert online_row(Case(num_prompts=1, input_tokens=10, qps=1.0), [trace(1.0)]).itl_s is None
