"""Arctic's decoder layer in plain torch, in the order and the dtypes of the Hugging Face code.

Calibration sees the very values that the original model computes, so the sequence of operations and of roundings here is
part of the contract: norms in float32 and then cast, RoPE tables in the activation's dtype, the router's softmax in float32
over all experts, expert outputs weighted in float32, cast, and added in ascending order of the experts.

Legend of the shape suffixes: B batch, T tokens, D hidden, F ffn, E experts, K experts per token, N heads, H head dim, V vocab.

A function that takes ``observe`` calls it with (site, tensor) for every tensor that an FP8 engine quantizes at run time.
The MoE of a released Arctic reads the *layer's input*, not the post-attention state, although its norm is called
``post_attention_layernorm``; the residual MLP reads the post-attention sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from arctic_trt.model.config import ArcticConfig

Observe = Callable[[str, Tensor], None]

Weights = TypeVar("Weights")

QKV = "attention.qkv"
DENSE = "attention.dense"
K_CACHE = "attention.k_cache"
V_CACHE = "attention.v_cache"
RESIDUAL_FC = "residual_mlp.fc"
RESIDUAL_PROJ = "residual_mlp.proj"
EXPERT_FC = "mlp.fc"
EXPERT_PROJ = "mlp.proj"


def ignore(site: str, tensor: Tensor) -> None:
    """The observer of a forward pass that nobody watches."""


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """q_DD [N*H, D], k and v [kv heads * H, D], o [D, N*H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """w1_FD is activated (SiLU), w3_FD is linear, w2_DF projects down."""

    w1: Tensor
    w2: Tensor
    w3: Tensor


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """All of a layer except its experts; gate_ED is the router."""

    input_layernorm: Tensor
    post_attention_layernorm: Tensor
    residual_layernorm: Tensor
    attention: AttentionWeights
    residual_mlp: MlpWeights
    gate: Tensor


def on_device(weights: Weights, device: str) -> Weights:
    """The same weights, a dataclass of tensors, in the memory of ``device``; nothing is copied that is there already.

    What goes to a GPU may still be under way, ahead of all that the GPU is asked for later. What goes to the host is there.
    """
    moved: dict[str, Any] = {}
    for name in (item.name for item in fields(weights)):  # type: ignore[arg-type]
        value = getattr(weights, name)
        moved[name] = value.to(device, non_blocking=device != "cpu") if isinstance(value, Tensor) else on_device(value, device)
    return type(weights)(**moved)


@dataclass(frozen=True, slots=True)
class Routing:
    """chosen_TK: expert indices, int64; share_TK: their weights, float32, summing to 1 over K."""

    chosen_TK: Tensor
    share_TK: Tensor

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Indices (token, slot) of the tokens routed to ``expert``, ascending."""
        token, slot = (self.chosen_TK == expert).nonzero(as_tuple=True)
        return token, slot


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalise over the last axis in float32, cast to x's dtype, then scale."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight_D * y.to(x.dtype)


def rotary_tables(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, head_dim] in float32, NeoX layout (both halves alike)."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions_T.device).float() / head_dim)
    angle = torch.outer(positions_T.float(), inverse).repeat(1, 2)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last axis (head dim) of ``x``; the tables broadcast against it."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def attention(x_BTD: Tensor, weights: AttentionWeights, config: ArcticConfig, observe: Observe = ignore) -> Tensor:
    """Causal self-attention over whole sequences that start at position 0; returns [B, T, D]."""
    batch, tokens, hidden = x_BTD.shape
    head_dim, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    observe(QKV, x_BTD)
    q, k, v = (
        F.linear(x_BTD, weight).view(batch, tokens, -1, head_dim).transpose(1, 2) for weight in (weights.q, weights.k, weights.v)
    )
    cos, sin = rotary_tables(torch.arange(tokens, device=x_BTD.device), head_dim, config.rope_theta)
    cos, sin = cos.to(x_BTD.dtype), sin.to(x_BTD.dtype)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    observe(K_CACHE, k)
    observe(V_CACHE, v)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = out.transpose(1, 2).reshape(batch, tokens, hidden)
    observe(DENSE, out)
    return F.linear(out, weights.o)


def gated_mlp(
    x: Tensor, weights: MlpWeights, observe: Observe = ignore, fc: str = RESIDUAL_FC, proj: str = RESIDUAL_PROJ
) -> Tensor:
    """w2(silu(w1 x) * w3 x) over the last axis."""
    observe(fc, x)
    inner = F.silu(F.linear(x, weights.w1)) * F.linear(x, weights.w3)
    observe(proj, inner)
    return F.linear(inner, weights.w2)


def route(x_TD: Tensor, gate_ED: Tensor, top_k: int) -> Routing:
    """The experts that the router chooses for each token; see :func:`choose_experts`."""
    return choose_experts(F.linear(x_TD, gate_ED), top_k)


def choose_experts(logits_TE: Tensor, top_k: int) -> Routing:
    """Softmax over all experts in float32, the ``top_k`` largest, renormalised when there are several."""
    share_TK, chosen_TK = F.softmax(logits_TE, dim=-1, dtype=torch.float).topk(top_k, -1)
    if top_k > 1:
        share_TK = share_TK / share_TK.sum(-1, keepdim=True)
    return Routing(chosen_TK, share_TK)


def add_expert(y_TD: Tensor, x_TD: Tensor, routing: Routing, expert: int, weights: MlpWeights, observe: Observe = ignore) -> int:
    """Add one expert's weighted output to ``y_TD`` in place; returns how many tokens it saw.

    Called in ascending order of ``expert``, which is the order of the additions in the original code.
    """
    token, slot = routing.tokens_of(expert)
    if len(token):
        out = gated_mlp(x_TD[token], weights, observe, EXPERT_FC, EXPERT_PROJ)
        y_TD.index_add_(0, token, (out * routing.share_TK[token, slot, None]).to(y_TD.dtype))
    return len(token)


def dense_path(x_BTD: Tensor, weights: DenseWeights, config: ArcticConfig, observe: Observe = ignore) -> Tensor:
    """Everything of the layer but the MoE: attention and the residual MLP with their residual sums, [B, T, D]."""
    eps = config.rms_norm_eps
    a_BTD = x_BTD + attention(rms_norm(x_BTD, weights.input_layernorm, eps), weights.attention, config, observe)
    return a_BTD + gated_mlp(rms_norm(a_BTD, weights.residual_layernorm, eps), weights.residual_mlp, observe)


def moe_input(x_BTD: Tensor, weights: DenseWeights, config: ArcticConfig) -> Tensor:
    """What router and experts read: the normed *input* of the layer, flattened to [B*T, D]."""
    return rms_norm(x_BTD, weights.post_attention_layernorm, config.rms_norm_eps).reshape(-1, config.hidden_size)


def decoder_layer(
    x_BTD: Tensor, dense: DenseWeights, experts: Iterable[MlpWeights], config: ArcticConfig, observe: Observe = ignore
) -> Tensor:
    """One whole layer; ``experts`` yields the experts' weights in ascending order and may be a stream."""
    moe_x_TD = moe_input(x_BTD, dense, config)
    routing = route(moe_x_TD, dense.gate, config.num_experts_per_tok)
    y_TD = torch.zeros_like(moe_x_TD)
    for expert, weights in enumerate(experts):
        add_expert(y_TD, moe_x_TD, routing, expert, weights, observe)
    return dense_path(x_BTD, dense, config, observe) + y_TD.view_as(x_BTD)


def output_logits(x: Tensor, norm_D: Tensor, lm_head_VD: Tensor, config: ArcticConfig) -> Tensor:
    """Float32 logits over the vocabulary for hidden states whose last axis is D."""
    return F.linear(rms_norm(x, norm_D, config.rms_norm_eps), lm_head_VD).float()
