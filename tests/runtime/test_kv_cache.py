"""Blocks become a sequence's as rank 0 says, and memory is taken when it is written."""

from __future__ import annotations

import pytest
import torch

from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.kv_cache import KvCache
from arctic_trt.runtime.step import Chunk, Step


def make(*, fp8: bool = True) -> KvCache:
    return KvCache(num_layers=2, kv_heads=3, head_dim=4, fp8=fp8)


def chunk(sequence: int, *blocks: int) -> Chunk:
    return Chunk(sequence=sequence, start=0, tokens=(1,), blocks=blocks, logits_from=0)


def tables(cache: KvCache) -> dict[int, list[int]]:
    return {sequence: blocks.tolist() for sequence, blocks in cache.tables.items()}


@pytest.mark.parametrize(("fp8", "size"), [(True, 1), (False, 4)])
def test_pages_have_the_room_that_is_reserved(fp8: bool, size: int) -> None:
    cache = make(fp8=fp8)
    cache.reserve(KvRoom(5))
    assert [tuple(page.shape) for page in cache.pages] == [(5, 2, 3, 32, 4)] * 2
    assert 5 * cache.block_bytes == sum(page.nbytes for page in cache.pages) == 5 * 2 * 2 * 3 * 32 * 4 * size
    cache.reserve(KvRoom(7, block_tokens=8))
    assert cache.pages[1].shape == (7, 2, 3, 8, 4) and cache.room == KvRoom(7, 8)


def test_untouched_pages_take_no_memory() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    cache, before = make(), resident()
    cache.reserve(KvRoom(200_000))
    assert sum(page.nbytes for page in cache.pages) > 300e6
    assert resident() - before < 30e6
    assert cache.pages[0].dtype == torch.float8_e4m3fn


def test_sequences_come_and_go() -> None:
    cache = make()
    cache.reserve(KvRoom(9))
    cache.assign(Step(chunks=(chunk(1, 0, 1), chunk(2, 0, 3))))
    cache.assign(Step(chunks=(chunk(1), chunk(2, 4))))
    assert tables(cache) == {1: [0, 1], 2: [0, 3, 4]}
    cache.assign(Step(chunks=(chunk(1, 7),), freed=(1,)))  # preempted, and back with other blocks
    assert tables(cache) == {1: [7], 2: [0, 3, 4]}
    with pytest.raises(KeyError):
        cache.assign(Step(freed=(3,)))
    cache.clear()
    assert not cache.tables
