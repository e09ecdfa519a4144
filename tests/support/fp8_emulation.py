"""What an FP8 TensorRT-LLM checkpoint computes, in float32, written from the format's description and sharing no code with it.

All rank files are put together to full matrices; every input of a quantized projection, and every key and value, is rounded
through e4m3; everything else is float32, one whole sequence at a time, without a cache. What has no scales is not quantized.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]
Fn = Callable[[Tensor], Tensor]


def fp8_logits(checkpoint_dir: Path, tokens: list[int]) -> Tensor:
    """Logits [T, V] of an FP8 checkpoint of any TP, PP and EP, with an FP8 KV cache if it has scales for one."""
    config = json.loads((checkpoint_dir / "config.json").read_text())
    moe = config["moe"]
    sizes = {
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "theta": config["rotary_base"],
        "eps": config["norm_epsilon"],
        "top_k": moe["top_k"],
    }
    weights = merge_with_scales(checkpoint_dir, config)

    def linear(name: str) -> Fn:
        matrix, w_scale, a_scale = weights[name], weights.get(f"{name}.w"), weights.get(f"{name}.a")
        if w_scale is None or a_scale is None:
            return lambda x: x @ matrix.T
        return lambda x: (_e4m3(x, a_scale) @ matrix.T) * (w_scale * a_scale)

    def cache(layer: int) -> Fn:
        scale = weights.get(f"{layer}.kv")
        return lambda x: x if scale is None else _e4m3(x, scale) * scale

    return _forward(weights, tokens, sizes, config["num_hidden_layers"], linear, cache)


def error_of(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """(max, mean) of the absolute difference, relative to the largest expected logit."""
    difference = (found.double() - expected.double()).abs() / expected.double().abs().max()
    return float(difference.max()), float(difference.mean())


def _forward(
    weights: Weights,
    tokens: list[int],
    sizes: dict[str, Any],
    num_layers: int,
    linear: Callable[[str], Fn],
    cache: Callable[[int], Fn],
) -> Tensor:
    x = weights["embedding"][torch.tensor(tokens)]
    for layer in range(num_layers):
        at = f"{layer}."
        a = x + _attention(_norm(x, weights[f"{at}input_norm"], sizes), at, sizes, linear, cache(layer))
        dense = _mlp(_norm(a, weights[f"{at}residual_norm"], sizes), f"{at}residual.", linear)
        moe_in = _norm(x, weights[f"{at}moe_norm"], sizes)
        probabilities = torch.softmax(moe_in @ weights[f"{at}router"].T, -1)
        moe = torch.zeros_like(x)
        for token in range(len(tokens)):
            best = torch.argsort(probabilities[token], descending=True)[: sizes["top_k"]].tolist()
            total = sum(probabilities[token, expert] for expert in best)
            for expert in best:
                out = _mlp(moe_in[token : token + 1], f"{at}{expert}.", linear)[0]
                moe[token] += out * probabilities[token, expert] / total
        x = a + dense + moe
    return _norm(x, weights["norm"], sizes) @ weights["head"].T


def _attention(x: Tensor, at: str, sizes: dict[str, Any], linear: Callable[[str], Fn], cache: Fn) -> Tensor:
    tokens, hidden = x.shape
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    size = hidden // heads
    q = linear(f"{at}q")(x).view(tokens, heads, size)
    k = linear(f"{at}k")(x).view(tokens, kv_heads, size)
    v = linear(f"{at}v")(x).view(tokens, kv_heads, size)
    q, k = _rotate(q, sizes["theta"]), cache(_rotate(k, sizes["theta"]))
    v = cache(v)
    out = torch.empty(tokens, heads, size)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = (q[:, head] @ k[:, shared].T / size**0.5).masked_fill(later, float("-inf"))
        out[:, head] = torch.softmax(scores, -1) @ v[:, shared]
    return linear(f"{at}o")(out.reshape(tokens, hidden))


def _mlp(x: Tensor, at: str, linear: Callable[[str], Fn]) -> Tensor:
    gate = linear(f"{at}w1")(x)
    return linear(f"{at}w2")(gate * torch.sigmoid(gate) * linear(f"{at}w3")(x))


def _norm(x: Tensor, weight: Tensor, sizes: dict[str, Any]) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + sizes["eps"]) * weight


def _rotate(x: Tensor, theta: float) -> Tensor:
    tokens, _, size = x.shape
    half = size // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) * 2 / size)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def _e4m3(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()


def merge_with_scales(checkpoint_dir: Path, config: dict[str, Any]) -> Weights:
    """The full matrices under short names, ``.w`` and ``.a`` for their weight and activation scales."""
    mapping = config["mapping"]
    tp, pp, ep = mapping["tp_size"], mapping["pp_size"], mapping["moe_ep_size"]
    ranks = [load_file(checkpoint_dir / f"rank{rank}.safetensors") for rank in range(tp * pp)]
    stages = [ranks[stage * tp : (stage + 1) * tp] for stage in range(pp)]
    weights: Weights = {
        "embedding": torch.cat([r["transformer.vocab_embedding.weight"] for r in stages[0]])[: config["vocab_size"]].float(),
        "norm": stages[-1][0]["transformer.ln_f.weight"].float(),
        "head": torch.cat([r["lm_head.weight"] for r in stages[-1]])[: config["vocab_size"]].float(),
    }
    layer = 0
    for stage in stages:
        local = 0
        while f"transformer.layers.{local}.input_layernorm.weight" in stage[0]:
            parts = [_strip(rank, f"transformer.layers.{local}.") for rank in stage]
            weights |= {f"{layer}.{name}": tensor for name, tensor in _merge_layer(parts, config, ep).items()}
            layer, local = layer + 1, local + 1
    assert layer == config["num_hidden_layers"]
    return weights


def _strip(rank: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in rank.items() if name.startswith(prefix)}


def _merge_layer(parts: list[Weights], config: dict[str, Any], ep: int) -> Weights:
    first, tp = parts[0], len(parts)
    merged: Weights = {
        "input_norm": first["input_layernorm.weight"].float(),
        "moe_norm": first["post_layernorm.weight"].float(),
        "residual_norm": first["residual_layernorm.weight"].float(),
        "router": first["mlp.router.weight"],
        "o": torch.cat([p["attention.dense.weight"].float() for p in parts], 1),
        "residual.w1": torch.cat([p["residual_mlp.fc.weight"].float() for p in parts]),
        "residual.w3": torch.cat([p["residual_mlp.gate.weight"].float() for p in parts]),
        "residual.w2": torch.cat([p["residual_mlp.proj.weight"].float() for p in parts], 1),
    }
    if "attention.kv_cache_scaling_factor" in first:
        merged["kv"] = first["attention.kv_cache_scaling_factor"]
    size, kv_heads = config["head_size"], config["num_key_value_heads"]
    q_rows, kv_rows = config["hidden_size"] // tp, max(1, kv_heads // tp) * size
    qkv = [p["attention.qkv.weight"].float() for p in parts]
    copies = max(1, tp // kv_heads)
    merged["q"] = torch.cat([p[:q_rows] for p in qkv])
    merged["k"] = torch.cat([p[q_rows : q_rows + kv_rows] for p in qkv[::copies]])
    merged["v"] = torch.cat([p[q_rows + kv_rows :] for p in qkv[::copies]])
    names = {"q": "attention.qkv", "k": "attention.qkv", "v": "attention.qkv", "o": "attention.dense"}
    names |= {"residual.w1": "residual_mlp.fc", "residual.w3": "residual_mlp.gate", "residual.w2": "residual_mlp.proj"}
    for short, long in names.items():
        if first[f"{long}.weight"].dtype == torch.bfloat16:
            continue
        merged[f"{short}.w"] = first[f"{long}.weights_scaling_factor"]
        merged[f"{short}.a"] = first[f"{long}.activation_scaling_factor"]
    return merged | _merge_experts(parts, config["moe"]["num_experts"], ep)


def _merge_experts(parts: list[Weights], num_experts: int, ep: int) -> Weights:
    merged: Weights = {}
    for expert in range(num_experts):
        block, index = divmod(expert, num_experts // ep)
        holders = [part for rank, part in enumerate(parts) if rank % ep == block]
        fc = [part["mlp.fc.weight"][index].float() for part in holders]
        half = len(fc[0]) // 2
        merged[f"{expert}.w3"] = torch.cat([f[:half] for f in fc])
        merged[f"{expert}.w1"] = torch.cat([f[half:] for f in fc])
        merged[f"{expert}.w2"] = torch.cat([part["mlp.proj.weight"][index].float() for part in holders], 1)
        scaled = {} if holders[0]["mlp.fc.weight"].dtype == torch.bfloat16 else {"w1": "mlp.fc", "w3": "mlp.fc", "w2": "mlp.proj"}
        for short, long in scaled.items():
            merged[f"{expert}.{short}.w"] = holders[0][f"{long}.weights_scaling_factor"][index]
            merged[f"{expert}.{short}.a"] = holders[0][f"{long}.activation_scaling_factor"]
    return merged
