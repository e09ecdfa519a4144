"""A TensorRT-LLM checkpoint turned back into Hugging Face tensors, by the rules of the format alone.

Shares no code with the package: a mistake made both in cutting and in joining would otherwise cancel out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def merge_checkpoint(directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(values, scales) by Hugging Face name: float32 values, dequantized where they were quantized, and the weights' scales."""
    config = json.loads((directory / "config.json").read_text())
    mapping = config["mapping"]
    tp, pp = mapping["tp_size"], mapping["pp_size"]
    ranks = [load_file(directory / f"rank{rank}.safetensors") for rank in range(tp * pp)]
    stages = [ranks[stage * tp : (stage + 1) * tp] for stage in range(pp)]
    vocab = config["vocab_size"]
    values = {
        "model.embed_tokens.weight": torch.cat([r["transformer.vocab_embedding.weight"] for r in stages[0]])[:vocab],
        "lm_head.weight": torch.cat([r["lm_head.weight"] for r in stages[-1]])[:vocab],
        "model.norm.weight": _same(stages[-1], "transformer.ln_f.weight"),
    }
    scales: dict[str, Tensor] = {}
    layer = 0
    for stage in stages:
        local = 0
        while f"transformer.layers.{local}.input_layernorm.weight" in stage[0]:
            part, part_scales = _layer(stage, f"transformer.layers.{local}.", config)
            values |= {f"model.layers.{layer}.{suffix}": value for suffix, value in part.items()}
            scales |= {f"model.layers.{layer}.{suffix}": scale for suffix, scale in part_scales.items()}
            layer, local = layer + 1, local + 1
    return {name: value.float() * scales.get(name, torch.ones(())) for name, value in values.items()}, scales


def _layer(ranks: list[dict[str, Tensor]], prefix: str, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parts = [{name.removeprefix(prefix): tensor for name, tensor in rank.items() if name.startswith(prefix)} for rank in ranks]
    values = {
        "input_layernorm.weight": _same(parts, "input_layernorm.weight"),
        "post_attention_layernorm.weight": _same(parts, "post_layernorm.weight"),
        "residual_layernorm.weight": _same(parts, "residual_layernorm.weight"),
        "block_sparse_moe.gate.weight": _same(parts, "mlp.router.weight"),
        "self_attn.o_proj.weight": torch.cat([p["attention.dense.weight"] for p in parts], 1),
        "residual_mlp.w1.weight": torch.cat([p["residual_mlp.fc.weight"] for p in parts]),
        "residual_mlp.w3.weight": torch.cat([p["residual_mlp.gate.weight"] for p in parts]),
        "residual_mlp.w2.weight": torch.cat([p["residual_mlp.proj.weight"] for p in parts], 1),
        **_qkv([p["attention.qkv.weight"] for p in parts], config),
    }
    sources = {
        "self_attn.o_proj": "attention.dense",
        "residual_mlp.w1": "residual_mlp.fc",
        "residual_mlp.w3": "residual_mlp.gate",
    }
    sources |= {"residual_mlp.w2": "residual_mlp.proj"} | {f"self_attn.{p}_proj": "attention.qkv" for p in "qkv"}
    quantized = "attention.qkv.weights_scaling_factor" in parts[0]
    scales = {f"{hf}.weight": _same(parts, f"{trt}.weights_scaling_factor") for hf, trt in sources.items()} if quantized else {}
    experts, expert_scales = _experts(parts, config, quantized)
    return values | experts, scales | expert_scales


def _qkv(parts: list[Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Each part is its q heads, k heads and v heads; with more ranks than KV heads, neighbours hold the same head."""
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_size"]
    q_rows = heads // len(parts) * size
    copies = max(1, len(parts) // kv_heads)
    k, v = zip(*(part[q_rows:].chunk(2) for part in parts), strict=True)
    for rank, (mine, yours) in enumerate(zip(k, v, strict=True)):
        first = rank // copies * copies
        assert _bytes(mine).equal(_bytes(k[first])) and _bytes(yours).equal(_bytes(v[first])), "ranks that share a KV head differ"
    return {
        "self_attn.q_proj.weight": torch.cat([part[:q_rows] for part in parts]),
        "self_attn.k_proj.weight": torch.cat(k[::copies]),
        "self_attn.v_proj.weight": torch.cat(v[::copies]),
    }


def _experts(
    parts: list[dict[str, Tensor]], config: dict[str, Any], quantized: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Experts in blocks over ep, rows of w3 and of w1 over moe_tp; ranks of one block are ep apart."""
    ep = config["mapping"]["moe_ep_size"]
    block = config["moe"]["num_experts"] // ep
    values, scales = {}, {}
    for expert in range(config["moe"]["num_experts"]):
        holders, local = parts[expert // block :: ep], expert % block
        up, gate = zip(*(p["mlp.fc.weight"][local].chunk(2) for p in holders), strict=True)
        name = f"block_sparse_moe.experts.{expert}"
        values |= {f"{name}.w1.weight": torch.cat(gate), f"{name}.w3.weight": torch.cat(up)}
        values[f"{name}.w2.weight"] = torch.cat([p["mlp.proj.weight"][local] for p in holders], 1)
        if quantized:
            fc, proj = (_same(holders, f"mlp.{m}.weights_scaling_factor")[local] for m in ("fc", "proj"))
            scales |= {f"{name}.w1.weight": fc, f"{name}.w3.weight": fc, f"{name}.w2.weight": proj}
    return values, scales


def _same(parts: list[dict[str, Tensor]], name: str) -> Tensor:
    first = parts[0][name]
    assert all(_bytes(part[name]).equal(_bytes(first)) for part in parts), f"{name} differs between ranks"
    return first


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
