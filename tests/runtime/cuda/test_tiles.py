"""Cutting products into programs: the whole of it, enough of them, and as much on its way as a GPU needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.runtime.cuda.tiles import (
    PARTS,
    PROCESSORS,
    SHARED_BYTES,
    SMALLEST,
    expert_block,
    plan_skinny_tile,
    plan_tile,
    power_of_2,
)

LITTLE_BYTES = 3_400_000
"""4.8 TB/s for 700 ns."""
RANK_0_OF_8 = {
    "qkv": (1152, 7168, 1, 1),
    "dense": (7168, 896, 1, 1),
    "residual_fc": (1792, 7168, 1, 1),
    "residual_proj": (7168, 896, 1, 1),
    "expert_fc": (1216, 7168, 1, 2),
    "expert_proj": (7168, 608, 1, 2),
    "lm_head": (4000, 7168, 2, 1),
}


@pytest.mark.parametrize("name", RANK_0_OF_8)
@pytest.mark.parametrize("tokens", [1, 8])
def test_weights_of_the_true_size_rank_are_asked_for_in_time(name: str, tokens: int) -> None:
    weight_rows, length, itemsize, slots = RANK_0_OF_8[name]
    rows, blocks = (1, slots * tokens) if name.startswith("expert") else (tokens, 1)
    tile = plan_skinny_tile(rows, weight_rows, length, itemsize, blocks)
    programs = -(-weight_rows // tile.columns) * blocks
    shared = (tile.rows + tile.columns) * PARTS * tile.length * itemsize * tile.buffers
    at_once = min(programs, PROCESSORS * (227 * 1024 // (shared + 1024)))
    assert programs >= PROCESSORS
    assert at_once * tile.columns * PARTS * tile.length * itemsize * tile.buffers >= LITTLE_BYTES


@given(
    rows=st.integers(1, SMALLEST),
    weight_rows=st.integers(1, 20_000),
    length=st.integers(1, 20_000),
    itemsize=st.sampled_from([1, 2]),
    blocks=st.integers(1, 300),
)
def test_tiles_of_few_rows_fit(rows: int, weight_rows: int, length: int, itemsize: int, blocks: int) -> None:
    tile = plan_skinny_tile(rows, weight_rows, length, itemsize, blocks)
    assert rows <= tile.rows <= SMALLEST and tile.columns in (8, 16, 32) and tile.length * itemsize in (32, 64)
    stage = (tile.rows + tile.columns) * PARTS * tile.length * itemsize
    assert 1 <= tile.buffers <= SHARED_BYTES // stage
    assert (tile.buffers - 1) * PARTS * tile.length < length  # none is never used


@pytest.mark.parametrize(("rows", "wanted"), [(17, 32), (64, 64), (65, 128), (4000, 128)])
@pytest.mark.parametrize("gated", [False, True])
def test_tiles_of_many_rows(rows: int, wanted: int, gated: bool) -> None:
    assert plan_tile(rows, gated).rows == wanted


@given(count=st.integers(0, 1 << 20))
def test_powers_of_2(count: int) -> None:
    power = power_of_2(count)
    assert power & (power - 1) == 0 and power >= count and (power == 1 or power < 2 * count)


@pytest.mark.parametrize(("slots", "experts", "block"), [(64, 128, 16), (256, 128, 16), (8192, 128, 64), (8192, 4, 128)])
def test_an_experts_block_is_about_what_it_gets(slots: int, experts: int, block: int) -> None:
    assert expert_block(slots, experts) == block
