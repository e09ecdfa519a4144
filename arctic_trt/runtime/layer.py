"""One rank's part of a layer, in the two pieces between which the ranks add up.

Router and experts read the normed *input* of the layer, the residual MLP reads the post-attention sum; their partial results are
added before they are reduced, so that two sums over the tensor-parallel group a layer suffice.

Legend: T tokens of the step, D hidden, N query heads, K KV heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Rank
from arctic_trt.runtime.kernels import Kernels
from arctic_trt.runtime.packing import Packed
from arctic_trt.runtime.weights import LayerWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What a rank's layers have in common and their weights do not say: its heads, and its first expert."""

    heads: int
    kv_heads: int
    head_dim: int
    top_k: int
    first_expert: int
    eps: float


class Layer(Protocol):
    """A layer on one rank and one device. ``x_TD`` is its input; results are this rank's parts of a sum."""

    def attention(self, x_TD: Tensor, packed: Packed, pages: Tensor) -> Tensor:
        """Attention's output projection [T, D] from this rank's heads; keys and values go to ``pages`` [B, 2, K, P, H]."""

    def mlp(self, x_TD: Tensor, sum_TD: Tensor) -> Tensor:
        """Experts and residual MLP [T, D]; ``sum_TD`` is the input with attention added."""


class ComposedLayer:
    """A layer made of single operations, whatever computes them."""

    def __init__(self, kernels: Kernels, weights: LayerWeights, shape: LayerShape) -> None:
        self._kernels = kernels
        self._weights = weights
        self._shape = shape

    def attention(self, x_TD: Tensor, packed: Packed, pages: Tensor) -> Tensor:
        kernels, weights, shape = self._kernels, self._weights, self._shape
        normed_TD = kernels.rms_norm(x_TD, weights.input_norm, shape.eps)
        qkv = kernels.linear(normed_TD, weights.qkv).view(len(x_TD), -1, shape.head_dim)
        kernels.rotate(qkv, shape.heads + shape.kv_heads, packed.cos, packed.sin)
        q_TNH, k_TKH, v_TKH = torch.split(qkv, [shape.heads, shape.kv_heads, shape.kv_heads], 1)
        kernels.store_kv(k_TKH, v_TKH, pages, packed.slot_T, weights.kv_scale)
        attended = kernels.attention(q_TNH, pages, packed.tables, weights.kv_scale)
        return kernels.partial_sum(attended, weights.dense)

    def mlp(self, x_TD: Tensor, sum_TD: Tensor) -> Tensor:
        kernels, weights, shape = self._kernels, self._weights, self._shape
        moe_x_TD = kernels.rms_norm(x_TD, weights.post_norm, shape.eps)
        routing = kernels.route(moe_x_TD, weights.router, shape.top_k)
        partial_TD = kernels.experts(moe_x_TD, routing, weights.expert_fc, weights.expert_proj, shape.first_expert)
        residual_TD = kernels.rms_norm(sum_TD, weights.residual_norm, shape.eps)
        return partial_TD.add_(kernels.gated_mlp(residual_TD, weights.residual_fc, weights.residual_proj))


def plan_shape(config: ArcticConfig, rank: Rank) -> LayerShape:
    """The shape of ``rank``'s layers."""
    return LayerShape(
        heads=config.num_attention_heads // rank.mapping.tp_size,
        kv_heads=len(rank.kv_heads(config.num_key_value_heads)),
        head_dim=config.head_dim,
        top_k=config.num_experts_per_tok,
        first_expert=rank.experts(config.num_local_experts).start,
        eps=config.rms_norm_eps,
    )
