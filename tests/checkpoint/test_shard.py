"""Cutting a tensor over ranks and joining the parts again, for any sizes that fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arctic_trt.checkpoint.contract import QuantFormat, local_shape, plan_rank
from arctic_trt.checkpoint.shard import (
    merge_expert,
    merge_plain,
    merge_qkv,
    shard_expert_fc,
    shard_expert_proj,
    shard_plain,
    shard_qkv,
)
from arctic_trt.model.config import ArcticConfig, parse_config
from arctic_trt.model.mapping import Mapping, plan_mapping
from arctic_trt.model.names import EMBEDDING, LAYER, Cut
from tests.support.checkpoints import TINY

WHOLE = {row.trt: row for row in LAYER}


@st.composite
def worlds(draw: st.DrawFn) -> tuple[ArcticConfig, Mapping]:
    """A small Arctic and a mapping that fits it, with fewer or more ranks than KV heads."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 8]))
    ep = draw(st.sampled_from([size for size in (1, 2, 3, 4, 8) if tp % size == 0]))
    kv_heads = draw(st.sampled_from([heads for heads in (1, 2, 3, 4, 8, 16) if heads % tp == 0 or tp % heads == 0]))
    share = draw(st.integers(1, 7))
    heads = kv_heads * share * (tp if kv_heads * share % tp else 1)
    raw = {
        **TINY,
        "hidden_size": heads * draw(st.sampled_from([2, 4])),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": tp // ep * draw(st.integers(1, 3)),
        "num_local_experts": ep * draw(st.integers(1, 3)),
        "num_experts_per_tok": 1,
        "vocab_size": draw(st.integers(1, 40)),
    }
    config = parse_config(raw)
    return config, plan_mapping(config, tp_size=tp, moe_ep_size=ep)


def numbered(rows: int, columns: int, start: int = 1) -> Tensor:
    """A matrix in which no value occurs twice, and no zero."""
    return torch.arange(start, start + rows * columns).view(rows, columns)


@given(worlds())
def test_qkv_parts_merge_to_the_whole(world: tuple[ArcticConfig, Mapping]) -> None:
    config, mapping = world
    hidden, kv = config.hidden_size, config.kv_size
    q, k, v = numbered(hidden, 3), numbered(kv, 3, 10_000), numbered(kv, 3, 20_000)
    parts = [shard_qkv(q, k, v, rank, config) for rank in mapping.ranks()]
    assert all(one.equal(other) for one, other in zip(merge_qkv(parts, mapping, config), (q, k, v), strict=True))
    rows = local_shape(WHOLE["attention.qkv.weight"], mapping.rank(0), config)[0]
    assert {len(part) for part in parts} == {rows}


@given(worlds())
def test_each_rank_has_the_kv_heads_that_its_query_heads_read(world: tuple[ArcticConfig, Mapping]) -> None:
    config, mapping = world
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    head_of_row = torch.arange(config.hidden_size)[:, None] // size
    kv_head_of_row = torch.arange(config.kv_size)[:, None] // size
    for rank in mapping.ranks():
        fused = shard_qkv(head_of_row, kv_head_of_row, kv_head_of_row, rank, config)
        q_rows = config.hidden_size // mapping.tp_size
        needed = {int(head) // group for head in fused[:q_rows].unique()}
        k, v = fused[q_rows:].chunk(2)
        assert needed <= set(k.unique().tolist()) and k.equal(v)


@given(worlds())
def test_plain_parts_merge_to_the_whole(world: tuple[ArcticConfig, Mapping]) -> None:
    config, mapping = world
    hidden = config.hidden_size
    for cut in (Cut.ROWS, Cut.COLUMNS, Cut.REPLICATED):
        whole = numbered(hidden, hidden)
        parts = [shard_plain(whole, cut, rank, config) for rank in mapping.ranks()]
        assert merge_plain(parts, cut, config).equal(whole)


@given(worlds())
def test_the_vocabulary_is_padded_with_zero_rows_at_its_end(world: tuple[ArcticConfig, Mapping]) -> None:
    config, mapping = world
    whole = numbered(config.vocab_size, config.hidden_size)
    parts = [shard_plain(whole, Cut.VOCAB, rank, config) for rank in mapping.ranks()]
    joined = torch.cat(parts)
    assert joined[: config.vocab_size].equal(whole) and not joined[config.vocab_size :].any()
    assert merge_plain(parts, Cut.VOCAB, config).equal(whole)
    assert {tuple(part.shape) for part in parts} == {local_shape(EMBEDDING, mapping.rank(0), config)}


@given(worlds())
def test_expert_parts_merge_to_the_whole(world: tuple[ArcticConfig, Mapping]) -> None:
    config, mapping = world
    ffn, hidden = config.intermediate_size, config.hidden_size
    for expert in range(config.num_local_experts):
        w1, w2, w3 = numbered(ffn, hidden, expert + 1), numbered(hidden, ffn, 10_000), numbered(ffn, hidden, 20_000)
        holders = [rank for rank in mapping.ranks() if expert in rank.experts(config.num_local_experts)]
        fc = [shard_expert_fc(w3, w1, rank) for rank in holders]
        proj = [shard_expert_proj(w2, rank) for rank in holders]
        assert all(one.equal(other) for one, other in zip(merge_expert(fc, proj), (w1, w2, w3), strict=True))
        assert fc[0].shape == local_shape(WHOLE["mlp.fc.weight"], holders[0], config)[1:]
        assert proj[0].shape == local_shape(WHOLE["mlp.proj.weight"], holders[0], config)[1:]


def test_an_expert_keeps_w3_first_on_every_rank() -> None:
    mapping = plan_mapping(parse_config(TINY), tp_size=2)
    w3, w1 = torch.full((4, 1), 3), torch.full((4, 1), 1)
    assert [shard_expert_fc(w3, w1, rank).flatten().tolist() for rank in mapping.ranks()] == [[3, 3, 1, 1]] * 2


@settings(max_examples=30)
@given(worlds(), st.integers(1, 5), st.booleans())
def test_plans_of_all_stages_list_every_layer_once(world: tuple[ArcticConfig, Mapping], pp: int, fp8: bool) -> None:
    """Layers count from 0 in each stage; the embedding is on the first only, norm and head on the last only."""
    config = world[0].model_copy(update={"num_hidden_layers": 5})
    mapping = replace(world[1], pp_size=pp)
    for rank in mapping.ranks():
        names = [spec.name for spec in plan_rank(config, rank, QuantFormat(fp8=fp8, kv_fp8=fp8))]
        locals_ = {int(name.split(".")[2]) for name in names if ".layers." in name}
        assert sorted(locals_) == list(range(len(rank.layers(5))))
        assert ("transformer.vocab_embedding.weight" in names) is rank.is_first_stage
        assert ("lm_head.weight" in names) is ("transformer.ln_f.weight" in names) is rank.is_last_stage
        assert len(names) == len(set(names)) == len(locals_) * (26 if fp8 else 11) + rank.is_first_stage + 2 * rank.is_last_stage


@pytest.mark.parametrize("cut", [Cut.QKV, Cut.EXPERT_FC, Cut.EXPERT_PROJ])
def test_fused_tensors_are_not_plain(cut: Cut) -> None:
    config = parse_config(TINY)
    with pytest.raises(ValueError, match="not the cut of a single tensor"):
        shard_plain(torch.zeros(8, 8), cut, plan_mapping(config).rank(0), config)
    with pytest.raises(ValueError, match="not the cut of a single tensor"):
        merge_plain([torch.zeros(8, 8)], cut, config)
