"""Reading a Hugging Face checkpoint: every tensor accounted for, repeated KV heads folded without loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.checkpoint.hf import (
    ALIGNMENT,
    KV,
    HfCheckpoint,
    KvFold,
    aligned,
    distinct_kv_heads,
    fold_kv,
    part_names,
)
from arctic_trt.errors import CheckpointError
from tests.support.checkpoints import TINY, random_tensors, repeat_kv_heads, write_checkpoint

TENSORS = random_tensors(TINY)


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_every_tensor_is_read_back(tmp_path: Path, shards: int) -> None:
    source = HfCheckpoint(write_checkpoint(tmp_path, TINY, TENSORS, shards=shards))
    assert len(source.shard_paths) == shards
    assert all(source.read(name).equal(tensor) for name, tensor in TENSORS.items())
    assert source.bytes_read == source.total_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    source.close()


def test_weights_are_handed_out_by_layer_and_by_expert(tmp_path: Path) -> None:
    source = HfCheckpoint(write_checkpoint(tmp_path, TINY, TENSORS))
    dense, expert = source.dense(1), source.expert(1, 5)
    assert dense.attention.o.equal(TENSORS["model.layers.1.self_attn.o_proj.weight"])
    assert dense.residual_mlp.w3.equal(TENSORS["model.layers.1.residual_mlp.w3.weight"])
    assert dense.gate.equal(TENSORS["model.layers.1.block_sparse_moe.gate.weight"])
    assert expert.w2.equal(TENSORS["model.layers.1.block_sparse_moe.experts.5.w2.weight"])


@pytest.mark.parametrize("hidden", [128, 40])
def test_weights_lie_side_by_side_in_memory_that_is_given(tmp_path: Path, hidden: int) -> None:
    """Forty columns of bf16 are no multiple of the alignment."""
    config = {**TINY, "hidden_size": hidden, "intermediate_size": 33, "num_attention_heads": 4, "num_key_value_heads": 2}
    source = HfCheckpoint(write_checkpoint(tmp_path, config, random_tensors(config)))
    for expert, read in (
        (None, lambda memory: source.dense(1, memory)),
        (5, lambda memory: source.expert(1, 5, memory)),
    ):
        size, names = source.buffer_bytes(1, expert), part_names(1, expert)
        memory = torch.full((size + 8,), 7, dtype=torch.uint8)
        found, alone = flat(read(memory)), flat(read(None))
        assert all(a.equal(b) for a, b in zip(found, alone, strict=True))
        starts = sorted(tensor.data_ptr() - memory.data_ptr() for tensor in found)
        assert starts[0] == 0 and all(start % ALIGNMENT == 0 for start in starts) and (memory[size:] == 7).all()
        assert sum(tensor.nbytes for tensor in found) <= size < sum(tensor.nbytes for tensor in found) + ALIGNMENT * len(names)
        source.expect(1, expert)
    source.close()


def flat(weights: object) -> list[torch.Tensor]:
    values = [getattr(weights, name) for name in weights.__slots__]  # type: ignore[attr-defined]
    return [tensor for value in values for tensor in ([value] if isinstance(value, torch.Tensor) else flat(value))]


@given(st.integers(0, 10_000))
def test_places_are_rounded_up(size: int) -> None:
    assert aligned(size) % ALIGNMENT == 0 and size <= aligned(size) < size + ALIGNMENT


@pytest.mark.parametrize(
    ("heads", "kv_heads", "repeats", "stated"), [(16, 8, 2, 16), (16, 8, 2, 8), (16, 8, 1, 8), (14, 2, 7, 14), (14, 2, 7, 2)]
)
def test_repeated_kv_heads_are_folded_whatever_the_config_says(
    tmp_path: Path, heads: int, kv_heads: int, repeats: int, stated: int
) -> None:
    config = {**TINY, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 8 * heads}
    tensors = random_tensors(config)
    stored = repeat_kv_heads(tensors, 8, repeats)
    source = HfCheckpoint(write_checkpoint(tmp_path, {**config, "num_key_value_heads": stated}, stored))
    assert source.config.num_key_value_heads == kv_heads
    assert source.kv_fold == (KvFold(kv_heads * repeats, repeats) if repeats > 1 else None)
    for layer in (0, 1):
        attention = source.dense(layer).attention
        assert attention.k.equal(tensors[f"model.layers.{layer}.self_attn.k_proj.weight"])
        assert attention.v.equal(tensors[f"model.layers.{layer}.self_attn.v_proj.weight"])


@pytest.mark.parametrize("matrix", ["k_proj", "v_proj"])
def test_a_layer_that_does_not_repeat_its_heads_is_an_error(tmp_path: Path, matrix: str) -> None:
    config = {**TINY, "num_hidden_layers": 3}
    stored = repeat_kv_heads(random_tensors(config), 8, 2)
    name = f"model.layers.1.self_attn.{matrix}.weight"
    stored[name][8:16] += 1
    source = HfCheckpoint(write_checkpoint(tmp_path, config, stored))
    source.dense(0)
    with pytest.raises(CheckpointError, match=f"{name} does not repeat its KV heads 2 times"):
        source.dense(1)


@pytest.mark.parametrize("layer", [0, 1])
def test_more_different_heads_than_the_config_says_are_an_error(tmp_path: Path, layer: int) -> None:
    stored = repeat_kv_heads(TENSORS, 8, 2)
    stored[f"model.layers.{layer}.self_attn.v_proj.weight"][8:16] += 1
    with pytest.raises(CheckpointError, match=r"holds 16 KV heads of which 16 differ, config\.json says num_key_value_heads=8"):
        HfCheckpoint(write_checkpoint(tmp_path, TINY, stored))


@pytest.mark.parametrize("stated", [16, 4, 3])
def test_heads_that_the_config_cannot_mean_are_an_error(tmp_path: Path, stated: int) -> None:
    """The weights hold 8 different heads."""
    config = {**TINY, "num_attention_heads": 48, "hidden_size": 384, "num_key_value_heads": 8}
    model_dir = write_checkpoint(tmp_path, {**config, "num_key_value_heads": stated}, random_tensors(config))
    with pytest.raises(CheckpointError, match=f"num_key_value_heads={stated}"):
        HfCheckpoint(model_dir)


def test_weights_that_are_all_alike_are_not_taken_for_repeated_heads(tmp_path: Path) -> None:
    constant = {name: torch.zeros_like(t) if name.endswith(KV) else t for name, t in TENSORS.items()}
    source = HfCheckpoint(write_checkpoint(tmp_path, TINY, constant))
    assert source.config.num_key_value_heads == 8 and source.kv_fold is None


@given(heads=st.integers(1, 6), repeats=st.integers(1, 5))
def test_the_smallest_number_of_heads_is_found(heads: int, repeats: int) -> None:
    different = torch.arange(heads * 2 * 3).view(heads, 2, 3).bfloat16()
    weight = different.repeat_interleave(repeats, 0).reshape(-1, 3)
    assert distinct_kv_heads(weight, head_dim=2) == heads
    fold = KvFold(heads * repeats, repeats)
    assert fold_kv(weight, "k", fold, head_dim=2).equal(different.reshape(-1, 3))


def test_heads_repeated_in_another_order_are_not_folded() -> None:
    tiled = torch.arange(12).view(2, 2, 3).bfloat16().repeat(2, 1, 1).reshape(-1, 3)
    assert distinct_kv_heads(tiled, head_dim=2) == 4
