"""Small random Arctic checkpoints in Hugging Face format, of any dimensions, the same for the same seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Config = dict[str, Any]
Tensors = dict[str, Tensor]

TINY: Config = {
    "architectures": ["ArcticForCausalLM"],
    "model_type": "arctic",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_layer_frequency": 1,
    "parallel_attn_mlp_res": True,
    "use_residual": True,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "max_sequence_length": 4096,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "attention_dropout": 0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}
SMALL: Config = {
    **TINY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "num_local_experts": 4,
    "vocab_size": 64,
}
UNLIKE_TINY: Config = {
    **TINY,
    "hidden_size": 448,
    "num_hidden_layers": 3,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 160,
    "num_local_experts": 16,
    "vocab_size": 1000,
}

FULL_SIZE: Config = {
    **TINY,
    "hidden_size": 7168,
    "num_hidden_layers": 35,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "intermediate_size": 4864,
    "num_local_experts": 128,
    "vocab_size": 32000,
}


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of these dimensions, written out once more, apart from the package's own table."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in (f"model.layers.{i}." for i in range(config["num_hidden_layers"])):
        for norm in ("input_layernorm", "post_attention_layernorm", "residual_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (hidden,)
        for proj, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{layer}self_attn.{proj}_proj.weight"] = (rows, hidden)
        for matrix in ("w1", "w2", "w3"):
            shapes[f"{layer}residual_mlp.{matrix}.weight"] = (hidden, hidden)
        shapes[f"{layer}block_sparse_moe.gate.weight"] = (config["num_local_experts"], hidden)
        for expert in (f"{layer}block_sparse_moe.experts.{e}." for e in range(config["num_local_experts"])):
            shapes |= {
                f"{expert}w1.weight": (ffn, hidden),
                f"{expert}w2.weight": (hidden, ffn),
                f"{expert}w3.weight": (ffn, hidden),
            }
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def random_tensors(config: Config, seed: int = 0) -> Tensors:
    """Bf16 weights with a gain of their own for every tensor, so that matrices that share a scale differ in amax."""
    draw = torch.Generator().manual_seed(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        gain = 0.5 + torch.rand((), generator=draw)
        if "norm" in name:
            return (1 + 0.2 * torch.randn(shape, generator=draw)).bfloat16()
        if name.endswith("gate.weight"):
            gain = gain * 3  # uneven routing, as after training
        scale = gain if "embed" in name else gain / shape[-1] ** 0.5
        return (torch.randn(shape, generator=draw) * scale).bfloat16()

    return {name: tensor(name, shape) for name, shape in shapes_of(config).items()}


def write_checkpoint(directory: Path, config: Config, tensors: Tensors, *, shards: int = 2) -> Path:
    """Write config.json and the shards with their index (a single ``model.safetensors`` for one shard)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    names = list(tensors)
    per_shard = -(-len(names) // shards)
    weight_map = {name: f"model-{i // per_shard + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        save_file({n: tensors[n] for n in names if weight_map[n] == shard}, directory / shard, {"format": "pt"})
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def random_checkpoint(directory: Path, config: Config = TINY, *, seed: int = 0, shards: int = 2) -> Path:
    return write_checkpoint(directory, config, random_tensors(config, seed), shards=shards)


def repeat_kv_heads(tensors: Tensors, head_dim: int, times: int) -> Tensors:
    """What the first upload of Arctic did: every KV head stored ``times`` times in a row."""

    def repeat(name: str, tensor: Tensor) -> Tensor:
        if not name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor
        return tensor.view(-1, head_dim, tensor.shape[-1]).repeat_interleave(times, 0).reshape(-1, tensor.shape[-1])

    return {name: repeat(name, tensor) for name, tensor in tensors.items()}


def random_ids(vocab_size: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=draw).tolist() for length in lengths]


def write_samples(path: Path, rows: Sequence[object]) -> Path:
    """A calibration file of one JSON value a line; lists are token ids."""
    path.write_text("".join(json.dumps({"input_ids": row} if isinstance(row, list) else row) + "\n" for row in rows))
    return path
