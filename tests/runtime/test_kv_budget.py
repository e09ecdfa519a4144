"""The cache is as large as was asked for, or as needed where that fits."""

from __future__ import annotations

import logging
from functools import partial

import pytest

from arctic_trt.engine.config import BuildConfig
from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.runtime import kv_budget
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.kv_budget import KvBudget, check_fits, check_room, free_on_host, plan_room, room_for
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import Sampling

LIMITS = BuildConfig(max_batch_size=8, max_input_len=90, max_seq_len=100, max_num_tokens=64, max_beam_width=1)
FREE = 1_000_000


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_budget, "available_memory", lambda: FREE)


def test_room_for_the_longest_sequences_that_an_engine_takes_at_once() -> None:
    assert room_for(LIMITS) == KvRoom(8 * 4)
    few = BuildConfig(max_batch_size=8, max_input_len=90, max_seq_len=100, max_num_tokens=3, max_beam_width=1)
    assert room_for(few) == KvRoom(3 * 4)


@pytest.mark.parametrize(
    ("budget", "block_bytes", "local_ranks", "blocks"),
    [
        (KvBudget(), 10, 1, 32),  # all that the limits allow
        (KvBudget(), 100_000, 1, 5),  # half of what is free
        (KvBudget(), 100_000, 2, 2),  # of which another rank takes as much
        (KvBudget(), 600_000, 1, 0),
        (KvBudget(memory_bytes=7_500), 100, 2, 75),  # more than the limits need: it keeps beginnings for longer
        (KvBudget(memory_bytes=FREE), 100_000, 1, 10),  # who asks for it gets it
        (KvBudget(max_tokens=100), 10, 1, 3),
        (KvBudget(max_tokens=6400), 10, 1, 200),
        (KvBudget(max_tokens=6400), 100_000, 1, 5),
        (KvBudget(max_tokens=100, memory_bytes=7_500), 100, 1, 3),
        (KvBudget(max_tokens=6400, memory_bytes=7_500), 100, 1, 75),
        (KvBudget(max_tokens=-5), 10, 1, 0),
    ],
)
def test_room(budget: KvBudget, block_bytes: int, local_ranks: int, blocks: int) -> None:
    assert plan_room(budget, LIMITS, block_bytes, partial(free_on_host, local_ranks)) == KvRoom(blocks)


def test_where_free_memory_is_unknown_the_limits_decide_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown() -> int:
        raise RefusedError("Nobody knows.")

    monkeypatch.setattr(kv_budget, "available_memory", unknown)
    assert plan_room(KvBudget(), LIMITS, 100_000, partial(free_on_host, 1)) == KvRoom(32)
    assert "Nobody knows. The KV cache may grow" in caplog.text and "--kv_cache_memory" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert plan_room(KvBudget(memory_bytes=500), LIMITS, 100, partial(free_on_host, 1)) == KvRoom(5)
    assert not caplog.text


def test_a_cache_without_a_block_is_refused() -> None:
    check_room(KvRoom(1), 77)
    with pytest.raises(UsageError, match=r"no room for a single block of 32 tokens, which takes 77 bytes.*--kv_cache_memory"):
        check_room(KvRoom(0), 77)


def test_a_request_that_can_never_fit_is_refused() -> None:
    def request(prompt: int, output: int) -> Request:
        return Request(index=3, prompt=(1,) * prompt, max_new_tokens=output, sampling=Sampling())

    check_fits(request(60, 5), KvRoom(2))  # the last token is not cached
    with pytest.raises(UsageError, match=r"Prompt 3 has 60 tokens, which with 6 of output exceeds the KV cache of 64 tokens\."):
        check_fits(request(60, 6), KvRoom(2))
