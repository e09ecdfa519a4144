"""From cases to rows: warm-up, repetitions, failures, and the share of the bandwidth."""

from __future__ import annotations

import logging

import pytest

from arctic_trt.errors import ArcticTrtError
from arctic_trt.report.bench.plan import Case, plan_rates, poisson_times
from arctic_trt.report.bench.run import (
    Watch,
    median_row,
    plan_online_rounds,
    run_batches,
    run_online,
    warm_up,
)
from arctic_trt.report.bench.stats import Trace, batch_row
from arctic_trt.report.bench.workload import RandomPrompts
from tests.report.bench.clockwork import Clockwork, batches, memory


def test_no_prompt_comes_twice_over_cases_and_repetitions() -> None:
    rounds = batches(1, 3, repeat=4)
    assert [(len(round.repetitions), round.concurrency) for round in rounds] == [(4, 1), (4, 3)]
    prompts = [arrival.prompt for round in rounds for arrivals in round.repetitions for arrival in arrivals]
    assert len({prompt.token_ids[:2] for prompt in prompts}) == len(prompts) == 16


def test_rates_have_the_same_pattern_of_arrivals() -> None:
    cases = plan_rates([1.0, 4.0], [16], 5)
    slow, fast = plan_online_rounds(RandomPrompts(range(99), 0), cases, max_new_tokens=3, concurrency=7, seed=2)
    assert [arrival.at_s for arrival in slow.repetitions[0]] == poisson_times(5, 1.0, 2)
    assert [arrival.at_s for arrival in fast.repetitions[0]] == poisson_times(5, 4.0, 2)
    assert slow.concurrency == fast.concurrency == 7


def test_batches_beside_the_memory_by_hand() -> None:
    """Ten tokens after the first in a second: the share is bytes a step times ten over the bandwidth."""
    beside = memory(bandwidth=1e8)
    result = run_batches(Clockwork(), batches(2, 1), beside, Watch())
    two, one = result.rows
    context = 16 + 11 / 2
    assert one.decode_tokens_per_s == pytest.approx(10) and two.decode_tokens_per_s == pytest.approx(20)
    assert one.bytes_per_step == beside.traffic.step_bytes(1, context) == result.as_dict()["bytes_per_token"]
    assert one.roofline_share == pytest.approx(beside.traffic.step_bytes(1, context) * 10 / 1e8)
    assert two.roofline_share == pytest.approx(beside.traffic.step_bytes(2, context) * 10 / 1e8)
    assert result.smallest is one
    value = result.as_dict()
    assert value["roofline_share"] == one.roofline_share and value["bandwidth_gb_s"] == 0.1


def test_sequences_that_wait_for_room_are_not_of_the_step() -> None:
    beside = memory(bandwidth=1e8, max_batch_size=2)
    (row,) = run_batches(Clockwork(), batches(8), beside, Watch()).rows
    assert row.bytes_per_step == beside.traffic.step_bytes(2, 16 + 11 / 2)


def test_without_memory_there_is_no_roofline_and_the_keys_stay() -> None:
    value = run_batches(Clockwork(), batches(1), None, Watch()).as_dict()
    assert (value["bandwidth_gb_s"], value["bytes_per_token"], value["roofline_share"]) == (None, None, None)


def test_the_repetition_with_the_median_latency_is_reported() -> None:
    target = Clockwork(first=[5.0, 1.0, 3.0, 2.0])
    (row,) = run_batches(target, batches(1, repeat=4), None, Watch()).rows
    assert row.ttft_s == pytest.approx(2.0) and row.latencies_s == pytest.approx((6.0, 2.0, 4.0, 3.0))
    case = Case(num_prompts=1, input_tokens=1)
    traces = [Trace(arrival_s=0, input_tokens=1, token_times_s=(time,), output_tokens=1) for time in (3.0, 9.0, 4.0)]
    odd = [batch_row(case, [trace]) for trace in traces]
    assert median_row(odd).latency_s == 4.0


def test_a_batch_with_a_failed_request_has_no_figures() -> None:
    with pytest.raises(ArcticTrtError, match=r"1 of 3 requests failed, the first because: it was tired\. Is the server running"):
        run_batches(Clockwork(errors=[None, "it was tired."]), batches(3), None, Watch())


def test_failed_requests_of_a_rate_are_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    cases = plan_rates([2.0], [16], 4)
    rounds = plan_online_rounds(RandomPrompts(range(99), 0), cases, max_new_tokens=3, concurrency=7, seed=2)
    with caplog.at_level(logging.WARNING):
        (row,) = run_online(Clockwork(errors=[None, "it was tired.", None, "so was I."]), rounds, None, Watch()).rows
    assert (row.num_requests, row.failed, row.ttft_s.p50) == (4, 2, pytest.approx(1.0))
    assert caplog.messages == ["2 of 4 requests failed; the first: it was tired."]
    with pytest.raises(ArcticTrtError, match="4 of 4 requests failed"):
        run_online(Clockwork(errors=["no."] * 4), rounds, None, Watch())


def test_times_between_tokens_beside_the_memory_by_hand() -> None:
    """A tenth of a second between tokens, at both rates: memory needs the bytes of one sequence's step over the bandwidth."""
    beside, cases = memory(bandwidth=1e8), plan_rates([4.0, 2.0], [16], 3)
    rounds = plan_online_rounds(RandomPrompts(range(99), 0), cases, max_new_tokens=8, concurrency=7, seed=2)
    result = run_online(Clockwork(), rounds, beside, Watch())
    assert result.slowest.qps == 2.0
    value = result.as_dict()
    assert value["bytes_per_token"] == beside.traffic.step_bytes(1, 16 + 8 / 2)
    assert value["roofline_share"] == pytest.approx(value["bytes_per_token"] / 1e8 / 0.1)
    assert value["rows"][0]["itl_s"]["p99"] == pytest.approx(0.1)
    without = run_online(Clockwork(), rounds, None, Watch()).as_dict()
    assert (without["bandwidth_gb_s"], without["bytes_per_token"], without["roofline_share"]) == (None, None, None)


def test_warming_up_is_served_at_once_and_may_not_fail() -> None:
    target, asked = Clockwork(), batches(3)[0].repetitions[0]
    warm_up(target, asked)
    warm_up(target, [])
    assert target.served == [(asked, 3)]
    with pytest.raises(ArcticTrtError, match="1 of 3 requests failed"):
        warm_up(Clockwork(errors=["no."]), asked)


def test_who_watches_is_told_of_cases_and_requests() -> None:
    told: list[object] = []
    watch = Watch(on_case=lambda case: told.append(str(case)), on_request=lambda done, total: told.append((done, total)))
    run_batches(Clockwork(), batches(1, 2), None, watch)
    assert told == ["1 prompt of 16 tokens", (1, 1), "2 prompts of 16 tokens", (1, 2), (2, 2)]
