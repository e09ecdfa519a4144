"""How much memory a quantization may take and what it does with it; nothing here depends on the machine."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.model.config import ArcticConfig, parse_config
from arctic_trt.quantize import memory
from arctic_trt.quantize.memory import (
    BASE_BYTES,
    MAX_DEPTH,
    MIN_DEPTH,
    default_budget,
    estimate_peak,
    parse_size,
    plan_memory,
)
from tests.support.checkpoints import FULL_SIZE

ARCTIC = parse_config(FULL_SIZE)
GIB = 1 << 30
TOKENS, BATCH, CORES = 128 * 512, 512, 2


def peak(config: ArcticConfig = ARCTIC, *, depth: int = MIN_DEPTH, spill: bool = False, tokens: int = TOKENS) -> int:
    return estimate_peak(config, tokens=tokens, batch_tokens=BATCH, workers=CORES, depth=depth, spill=spill)


def plan(budget_bytes: int, *, tokens: int = TOKENS) -> tuple[int, bool]:
    found = plan_memory(ARCTIC, tokens=tokens, batch_tokens=BATCH, workers=CORES, budget_bytes=budget_bytes)
    assert found.peak_bytes <= budget_bytes
    assert found.peak_bytes == peak(depth=found.depth, spill=found.spill, tokens=tokens) and found.workers == CORES
    return found.depth, found.spill


def test_layers_and_experts_take_no_memory() -> None:
    for change in ({"num_hidden_layers": 2}, {"num_local_experts": 16}, {"num_local_experts": 512}):
        assert peak(ARCTIC.model_copy(update=change)) == peak()


def test_arctic_fits_into_eight_gib() -> None:
    assert plan(8 * GIB) == (MAX_DEPTH, False)


def test_a_smaller_budget_means_fewer_experts_in_flight_and_then_hidden_states_on_disk() -> None:
    widest = [peak(depth=depth, spill=spill) for spill in (False, True) for depth in range(MAX_DEPTH, MIN_DEPTH - 1, -1)]
    assert widest == sorted(widest, reverse=True)
    assert [plan(size) for size in widest] == [(4, False), (3, False), (2, False), (4, True), (3, True), (2, True)]
    assert plan(widest[2] - 1) == (4, True), "one byte less, and they go to disk"


def test_a_budget_that_is_too_small_is_refused_with_what_it_takes() -> None:
    least = estimate_peak(ARCTIC, tokens=TOKENS, batch_tokens=BATCH, workers=1, depth=MIN_DEPTH, spill=True)
    with pytest.raises(RefusedError) as caught:
        plan(least - 1)
    assert f"this checkpoint needs {least / GIB:.2f} GiB. Raise --memory_budget" in str(caught.value)
    assert plan(peak(depth=MIN_DEPTH, spill=True)) == (MIN_DEPTH, True)


@given(st.integers(1, 256), st.integers(5 * GIB, 200 * GIB))
def test_many_cores_are_used_as_far_as_the_budget_goes(cores: int, budget_bytes: int) -> None:
    found = plan_memory(ARCTIC, tokens=TOKENS, batch_tokens=BATCH, workers=cores, budget_bytes=budget_bytes)
    assert found.peak_bytes <= budget_bytes and 1 <= found.workers <= cores
    if found.workers < cores:
        narrowest = {"depth": MIN_DEPTH, "spill": True, "tokens": TOKENS, "batch_tokens": BATCH}
        assert estimate_peak(ARCTIC, workers=found.workers + 1, **narrowest) > budget_bytes, "one more did not fit"


def test_without_calibration_there_is_nothing_to_spill() -> None:
    with pytest.raises(RefusedError):
        plan_memory(ARCTIC, tokens=0, batch_tokens=0, workers=1, budget_bytes=BASE_BYTES)
    assert plan(peak(tokens=0), tokens=0) == (MIN_DEPTH, False)


def test_more_tokens_cost_only_where_they_are_kept() -> None:
    assert peak(tokens=2 * TOKENS) - peak() == 3 * 2 * TOKENS * 7168
    assert peak(tokens=2 * TOKENS, spill=True) == peak(spill=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 << 30),
        ("8gib", 8 << 30),
        (" 500MB ", 500 * 10**6),
        ("1.5g", 15 * 10**8),
        ("64KiB", 64 << 10),
        ("2TB", 2 * 10**12),
        ("1024", 1024),
        ("10b", 10),
        ("7 GB", 7 * 10**9),
    ],
)
def test_sizes_are_written_as_people_write_them(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "much", "8 potatoes", "GiB", "8GiBiB", "1e", "--", "8ig", "nan", "inf"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a size.*8GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "-1GB", "0.1"])
def test_no_memory_at_all_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not positive"):
        parse_size(text)


def test_the_default_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert default_budget() == 700


def test_a_plan_is_a_value() -> None:
    found = plan_memory(ARCTIC, tokens=1, batch_tokens=1, workers=1, budget_bytes=64 * GIB)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.depth = 9  # type: ignore[misc]
