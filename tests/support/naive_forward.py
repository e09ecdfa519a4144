"""Arctic's forward pass once more, written from the description of the model: one token and one expert at a time.

It shares no code with the package and is slow on purpose. The keywords are the mistakes that a test must be able to see.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.support.checkpoints import Config, Tensors


def naive_logits(
    config: Config, tensors: Tensors, ids: list[int], *, moe_after_attention: bool = False, swap_gate_and_up: bool = False
) -> Tensor:
    """Logits [tokens, vocab] in float64."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    gate, up = ("w3", "w1") if swap_gate_and_up else ("w1", "w3")
    eps, rows = config["rms_norm_eps"], w["model.embed_tokens.weight"][ids]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * w[name]

    def mlp(x: Tensor, prefix: str) -> Tensor:
        a, b = w[f"{prefix}.{gate}.weight"] @ x, w[f"{prefix}.{up}.weight"] @ x
        return w[f"{prefix}.w2.weight"] @ (a * torch.sigmoid(a) * b)

    def moe(x: Tensor, prefix: str) -> Tensor:
        share = torch.softmax(w[f"{prefix}.gate.weight"] @ x, -1)
        best = share.argsort(descending=True)[: config["num_experts_per_tok"]].tolist()
        total = sum(share[e] for e in best) if len(best) > 1 else 1.0
        return sum(share[e] / total * mlp(x, f"{prefix}.experts.{e}") for e in best)

    for layer in (f"model.layers.{i}" for i in range(config["num_hidden_layers"])):
        attended = rows + _attention(config, w, norm(rows, f"{layer}.input_layernorm.weight"), f"{layer}.self_attn")
        dense_input = norm(attended, f"{layer}.residual_layernorm.weight")
        moe_input = norm(attended if moe_after_attention else rows, f"{layer}.post_attention_layernorm.weight")
        dense = [mlp(x, f"{layer}.residual_mlp") for x in dense_input]
        rows = attended + torch.stack(dense) + torch.stack([moe(x, f"{layer}.block_sparse_moe") for x in moe_input])
    return norm(rows, "model.norm.weight") @ w["lm_head.weight"].T


def _attention(config: Config, w: Tensors, x: Tensor, prefix: str) -> Tensor:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    q, k, v = ((x @ w[f"{prefix}.{p}_proj.weight"].T).view(len(x), -1, size) for p in "qkv")
    q, k = (torch.stack([_rotate(row, position, config["rope_theta"]) for position, row in enumerate(y)]) for y in (q, k))
    out = torch.zeros_like(q)
    for head in range(heads):
        shared = head * kv_heads // heads
        for token in range(len(x)):
            score = k[: token + 1, shared] @ q[token, head] / math.sqrt(size)
            out[token, head] = torch.softmax(score, 0) @ v[: token + 1, shared]
    return out.reshape(len(x), -1) @ w[f"{prefix}.o_proj.weight"].T


def _rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate pairs (i, i + size/2) of each head by position / theta^(2i/size)."""
    half = x.shape[-1] // 2
    angle = position / theta ** (torch.arange(half, dtype=torch.float64) / half)
    left, right = x[:, :half], x[:, half:]
    return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)
