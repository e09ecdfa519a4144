"""One literal table between the Hugging Face names and TensorRT-LLM's, and what happens to a tensor on the way.

TensorRT-LLM names follow its ``LLaMAForCausalLM`` with ``residual_mlp=True`` and an MoE (1.0 to 1.2). Two conventions meet
there and are easily confused: the *residual* MLP's ``fc`` is the activated projection (w1) and ``gate`` the linear one (w3),
while an expert's fused ``fc`` holds the linear projection's rows (w3) first and the activated one's (w1) second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from arctic_trt.model.config import ArcticConfig


class Cut(Enum):
    """How a TensorRT-LLM tensor is divided over the ranks of a tensor-parallel group."""

    REPLICATED = "whole on every rank"
    ROWS = "rows (dim 0)"
    COLUMNS = "columns (dim 1)"
    QKV = "rows of q, k and v separately, k and v repeated when there are more ranks than heads"
    VOCAB = "rows, padded with zeros to a multiple of the ranks"
    EXPERT_FC = "experts over EP; rows of w3 and w1 separately over MoE-TP"
    EXPERT_PROJ = "experts over EP; columns over MoE-TP"


class Kind(Enum):
    """What is stored for a tensor when the checkpoint is quantized."""

    QUANTIZED = "e4m3 with a weight scale and an activation scale"
    BFLOAT16 = "bf16 bytes as they are"
    FLOAT32 = "widened to float32"


@dataclass(frozen=True, slots=True)
class Row:
    """One TensorRT-LLM tensor and the Hugging Face tensors it is made of, in the order in which they are joined."""

    trt: str
    hf: tuple[str, ...]
    cut: Cut
    kind: Kind

    @property
    def module(self) -> str:
        """TensorRT-LLM's module of a layer's row that is quantized as a whole: all experts of a layer are one, ``mlp``."""
        return MOE if self.cut in (Cut.EXPERT_FC, Cut.EXPERT_PROJ) else self.trt.removesuffix(".weight")


MOE = "mlp"

LAYER = (
    Row("input_layernorm.weight", ("input_layernorm.weight",), Cut.REPLICATED, Kind.BFLOAT16),
    Row("attention.qkv.weight", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), Cut.QKV, Kind.QUANTIZED),
    Row("attention.dense.weight", ("self_attn.o_proj.weight",), Cut.COLUMNS, Kind.QUANTIZED),
    Row("mlp.router.weight", ("block_sparse_moe.gate.weight",), Cut.REPLICATED, Kind.FLOAT32),
    Row("mlp.fc.weight", ("block_sparse_moe.experts.{e}.w3.weight", "block_sparse_moe.experts.{e}.w1.weight"), Cut.EXPERT_FC, Kind.QUANTIZED),
    Row("mlp.proj.weight", ("block_sparse_moe.experts.{e}.w2.weight",), Cut.EXPERT_PROJ, Kind.QUANTIZED),
    Row("post_layernorm.weight", ("post_attention_layernorm.weight",), Cut.REPLICATED, Kind.BFLOAT16),
    Row("residual_layernorm.weight", ("residual_layernorm.weight",), Cut.REPLICATED, Kind.BFLOAT16),
    Row("residual_mlp.fc.weight", ("residual_mlp.w1.weight",), Cut.ROWS, Kind.QUANTIZED),
    Row("residual_mlp.gate.weight", ("residual_mlp.w3.weight",), Cut.ROWS, Kind.QUANTIZED),
    Row("residual_mlp.proj.weight", ("residual_mlp.w2.weight",), Cut.COLUMNS, Kind.QUANTIZED),
)  # fmt: skip

LAYER_ROWS = {row.trt: row for row in LAYER}
EMBEDDING = Row("transformer.vocab_embedding.weight", ("model.embed_tokens.weight",), Cut.VOCAB, Kind.BFLOAT16)
FINAL_NORM = Row("transformer.ln_f.weight", ("model.norm.weight",), Cut.REPLICATED, Kind.BFLOAT16)
LM_HEAD = Row("lm_head.weight", ("lm_head.weight",), Cut.VOCAB, Kind.BFLOAT16)

KV_CACHE_SCALE = "attention.kv_cache_scaling_factor"

TWINS = RESIDUAL_FC, RESIDUAL_GATE = ("residual_mlp.fc", "residual_mlp.gate")
"""Modules that read the same input in one product: they share their scales, and are quantized both or not at all."""
QUANTIZED_MODULES = tuple(dict.fromkeys(row.module for row in LAYER if row.kind is Kind.QUANTIZED))


def hf_layer(layer: int, suffix: str) -> str:
    """Full Hugging Face name of a tensor of ``layer``."""
    return f"model.layers.{layer}.{suffix}"


def hf_expert(layer: int, expert: int, matrix: str) -> str:
    """Full Hugging Face name of an expert's ``w1``, ``w2`` or ``w3``."""
    return hf_layer(layer, f"block_sparse_moe.experts.{expert}.{matrix}.weight")


def site_of(hf_name: str) -> tuple[int, str]:
    """(layer, TensorRT-LLM's module) of a layer's Hugging Face tensor, all experts being one: ``(3, "mlp.fc")``."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", hf_name)
    if not found:
        raise ValueError(f"{hf_name} is no tensor of a layer")
    suffix = re.sub(r"(?<=\.experts\.)\d+", "{e}", found[2])
    return int(found[1]), next(row.trt.removesuffix(".weight") for row in LAYER if suffix in row.hf)


def trt_layer(local_layer: int, suffix: str) -> str:
    """``local_layer`` counts from 0 within a pipeline stage, as TensorRT-LLM does."""
    return f"transformer.layers.{local_layer}.{suffix}"


def weight_scale(weight: str) -> str:
    """Name of the scale(s) with which the named weight was divided before its cast."""
    return weight.removesuffix("weight") + "weights_scaling_factor"


def activation_scale(weight: str) -> str:
    """Name of the static scale of the input of the named weight."""
    return weight.removesuffix("weight") + "activation_scaling_factor"


def hf_shapes(config: ArcticConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Hugging Face Arctic checkpoint with its shape; nothing else may be in one."""
    hidden, ffn, kv, vocab = config.hidden_size, config.intermediate_size, config.kv_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    dense = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "residual_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "residual_mlp.w1.weight": (hidden, hidden),
        "residual_mlp.w2.weight": (hidden, hidden),
        "residual_mlp.w3.weight": (hidden, hidden),
        "block_sparse_moe.gate.weight": (config.num_local_experts, hidden),
    }
    expert = {"w1": (ffn, hidden), "w2": (hidden, ffn), "w3": (ffn, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes.update({hf_layer(layer, suffix): shape for suffix, shape in dense.items()})
        for index in range(config.num_local_experts):
            shapes.update({hf_expert(layer, index, matrix): shape for matrix, shape in expert.items()})
    return shapes
