"""Which rank holds what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.errors import UsageError
from arctic_trt.model.config import parse_config
from arctic_trt.model.mapping import Mapping, padded_vocab, plan_mapping
from tests.support.checkpoints import TINY

SIZES = st.integers(1, 8)


def mapping(tp: int = 1, pp: int = 1, ep: int = 1) -> Mapping:
    return Mapping(tp_size=tp, pp_size=pp, moe_tp_size=tp // ep, moe_ep_size=ep)


@given(pp=SIZES, extra=st.integers(0, 40))
def test_layers_are_divided_as_tensor_split_divides(pp: int, extra: int) -> None:
    layers = pp + extra
    expected = [part.tolist() for part in torch.arange(layers).tensor_split(pp)]
    world = mapping(pp=pp)
    assert [list(world.layers(stage, layers)) for stage in range(pp)] == expected
    assert all(layer in world.layers(world.stage_of(layer, layers), layers) for layer in range(layers))


def test_arctic_over_two_stages_is_18_and_17() -> None:
    assert [len(mapping(pp=2).layers(stage, 35)) for stage in (0, 1)] == [18, 17]


@given(tp=SIZES, pp=SIZES, extra=st.integers(0, 5))
def test_every_layer_is_on_one_stage_whole_and_nowhere_else(tp: int, pp: int, extra: int) -> None:
    layers = pp + extra
    world = mapping(tp=tp, pp=pp)
    for layer in range(layers):
        holders = [rank for rank in world.ranks() if layer in rank.layers(layers)]
        assert {rank.pp_rank for rank in holders} == {world.stage_of(layer, layers)}
        assert [rank.tp_rank for rank in holders] == list(range(tp))
    assert [rank.index for rank in world.ranks() if rank.is_first_stage] == list(range(tp))
    assert [rank.index for rank in world.ranks() if rank.is_last_stage] == list(range((pp - 1) * tp, pp * tp))


@given(moe_tp=SIZES, ep=SIZES, share=SIZES)
def test_every_expert_is_on_moe_tp_ranks_each_with_another_slice(moe_tp: int, ep: int, share: int) -> None:
    world = mapping(tp=moe_tp * ep, ep=ep)
    for expert in range(ep * share):
        holders = [rank for rank in world.ranks() if expert in rank.experts(ep * share)]
        assert [rank.moe_tp_rank for rank in holders] == list(range(moe_tp))
        assert len({rank.moe_ep_rank for rank in holders}) == 1
    for rank in world.ranks():
        assert rank.moe_tp_rank * ep + rank.moe_ep_rank == rank.tp_rank


@given(kv_heads=st.sampled_from([1, 2, 3, 4, 8]), factor=SIZES)
def test_kv_heads_are_shared_out_or_repeated_on_neighbours(kv_heads: int, factor: int) -> None:
    more_ranks = mapping(tp=kv_heads * factor)
    assert [list(rank.kv_heads(kv_heads)) for rank in more_ranks.ranks()] == [[i // factor] for i in range(kv_heads * factor)]
    more_heads = mapping(tp=kv_heads)
    assert [h for rank in more_heads.ranks() for h in rank.kv_heads(kv_heads * factor)] == list(range(kv_heads * factor))


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="of a world of 4"):
        mapping(tp=2, pp=2).rank(rank)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"tp_size": 8}, (8, 1, 8, 1)),
        ({"tp_size": 8, "moe_ep_size": 4}, (8, 1, 2, 4)),
        ({"tp_size": 8, "moe_tp_size": 1}, (8, 1, 1, 8)),
        ({"tp_size": 4, "pp_size": 2, "moe_tp_size": 2, "moe_ep_size": 2}, (4, 2, 2, 2)),
        ({"tp_size": 16}, (16, 1, 16, 1)),
    ],
)
def test_missing_sizes_follow_from_the_others(flags: dict[str, int], expected: tuple[int, ...]) -> None:
    planned = plan_mapping(parse_config(TINY), **flags)
    assert (planned.tp_size, planned.pp_size, planned.moe_tp_size, planned.moe_ep_size) == expected
    assert planned.as_dict()["world_size"] == expected[0] * expected[1]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"tp_size": 0}, "--tp_size 0 is not a positive number"),
        ({"tp_size": 3}, "--tp_size 3 does not divide num_attention_heads=16"),
        ({"tp_size": 32}, "--tp_size 32 does not divide num_attention_heads=16"),
        ({"tp_size": 8, "moe_tp_size": 2, "moe_ep_size": 2}, "--moe_tp_size (2) times --moe_ep_size (2) is not --tp_size 8"),
        ({"tp_size": 8, "moe_ep_size": 3}, "--moe_tp_size (not given) times --moe_ep_size (3) is not --tp_size 8"),
        ({"tp_size": 8, "moe_ep_size": 16}, "is not --tp_size 8"),
        ({"tp_size": 16, "moe_ep_size": 16}, "--moe_ep_size 16 does not divide num_local_experts=8"),
        ({"tp_size": 1, "pp_size": 3}, "--pp_size 3 exceeds num_hidden_layers=2"),
    ],
)
def test_sizes_that_do_not_fit_name_their_flag(flags: dict[str, int], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_mapping(parse_config(TINY), **flags)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("change", "flags", "complaint"),
    [
        ({"intermediate_size": 100}, {"tp_size": 8}, "--moe_tp_size 8 does not divide intermediate_size=100"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 48}, {"tp_size": 8}, None),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 48},
            {"tp_size": 6},
            "--tp_size 6 neither divides num_key_value_heads=4 nor is a multiple of it",
        ),
    ],
)
def test_sizes_are_held_to_the_model(change: dict[str, Any], flags: dict[str, int], complaint: str | None) -> None:
    config = parse_config({**TINY, **change})
    if complaint is None:
        assert plan_mapping(config, **flags).tp_size == flags["tp_size"]
        return
    with pytest.raises(UsageError) as caught:
        plan_mapping(config, **flags)
    assert complaint in str(caught.value)


@given(vocab=st.integers(1, 100_000), tp=SIZES)
def test_the_padded_vocabulary_is_the_next_multiple(vocab: int, tp: int) -> None:
    padded = padded_vocab(vocab, tp)
    assert padded % tp == 0 and 0 <= padded - vocab < tp
