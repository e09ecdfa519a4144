"""NVIDIA ModelOpt's own calibration, for those who have the memory for a whole model or want an algorithm that is not ``max``.

The network below has the names by which ModelOpt recognises an Arctic (``ArcticMLP``, ``...Attention``, ``block_sparse_moe``)
and the arithmetic of :mod:`arctic_trt.model.layer`; no remote code is involved. What comes out are maxima, which go the same way
as our own: through :mod:`arctic_trt.quantize.scales` into the same writer.

This module imports transformers and is itself imported only for ``--calibrator modelopt``. ModelOpt reads the source of the
attention class to find its one call of scaled dot product attention, so the classes cannot be made inside a function.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.errors import ArcticTrtError, RefusedError
from arctic_trt.model.config import ARCHITECTURE, ArcticConfig
from arctic_trt.model.layer import (
    DENSE,
    EXPERT_FC,
    EXPERT_PROJ,
    K_CACHE,
    QKV,
    RESIDUAL_FC,
    RESIDUAL_PROJ,
    V_CACHE,
    apply_rotary,
    rms_norm,
    rotary_tables,
    route,
)
from arctic_trt.quantize.scales import GivenAmax


class ModelConfig(PretrainedConfig):  # type: ignore[misc]
    """Arctic's sizes in the form that transformers wants."""

    model_type = "arctic"


class ArcticRMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class ArcticAttention(nn.Module):
    def __init__(self, c: ArcticConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.kv_size, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.kv_size, bias=False)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        group = self.c.num_attention_heads // self.c.num_key_value_heads
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).view(batch, tokens, -1, self.c.head_dim).transpose(1, 2) for p in projections)
        tables = rotary_tables(torch.arange(tokens, device=x.device), self.c.head_dim, self.c.rope_theta)
        cos, sin = (table.to(x.dtype) for table in tables)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, hidden))  # type: ignore[no-any-return]


class ArcticMLP(nn.Module):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, ffn, bias=False)
        self.w2 = nn.Linear(ffn, hidden, bias=False)
        self.w3 = nn.Linear(hidden, ffn, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class ArcticMoE(nn.Module):
    def __init__(self, c: ArcticConfig) -> None:
        super().__init__()
        self.top_k, self.num_experts = c.num_experts_per_tok, c.num_local_experts
        self.gate = nn.Linear(c.hidden_size, self.num_experts, bias=False)
        self.experts = nn.ModuleList(ArcticMLP(c.hidden_size, c.intermediate_size) for _ in range(self.num_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = route(x, self.gate.weight, self.top_k)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = routing.tokens_of(index)
            if len(token):
                y.index_add_(0, token, (expert(x[token]) * routing.share_TK[token, slot, None]).to(x.dtype))
        return y.view_as(hidden_states)


class ArcticDecoderLayer(nn.Module):
    def __init__(self, c: ArcticConfig) -> None:
        super().__init__()
        self.self_attn = ArcticAttention(c)
        self.block_sparse_moe = ArcticMoE(c)
        self.input_layernorm = ArcticRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = ArcticRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.residual_layernorm = ArcticRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.residual_mlp = ArcticMLP(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        a = x + self.self_attn(self.input_layernorm(x))
        d = a + self.residual_mlp(self.residual_layernorm(a))
        return d + self.block_sparse_moe(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class ArcticModel(nn.Module):
    def __init__(self, c: ArcticConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(ArcticDecoderLayer(c) for _ in range(c.num_hidden_layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return x  # type: ignore[no-any-return]


class ArcticForCausalLM(PreTrainedModel):  # type: ignore[misc]
    """The network without its head, which calibration does not look at."""

    config_class = ModelConfig

    def __init__(self, config: ModelConfig, sizes: ArcticConfig) -> None:
        super().__init__(config)
        self.model = ArcticModel(sizes)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)  # type: ignore[no-any-return]


def calibrate(source: HfCheckpoint, batches: Sequence[Tensor], algorithm: str, device: str) -> GivenAmax:
    """Run ``mtq.quantize`` over the whole model in memory of ``device`` and collect its maxima.

    Raises :class:`RefusedError` without ModelOpt, :class:`ArcticTrtError` when it fails.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import modelopt.torch.quantization as mtq
            from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant
    except ImportError:
        raise RefusedError("--calibrator modelopt needs nvidia-modelopt.", "pip install 'arctic-trt[modelopt]'") from None
    model = load_model(source).to(device)

    def forward_loop(quantized: nn.Module) -> None:
        with torch.inference_mode():
            for ids in batches:
                quantized(ids.to(device))

    with contextlib.redirect_stdout(sys.stderr):
        recipe = update_quant_cfg_with_kv_cache_quant(mtq.FP8_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"])
        recipe["algorithm"] = algorithm
        try:
            mtq.quantize(model, recipe, forward_loop)
        except (AssertionError, ValueError, KeyError) as error:
            raise ArcticTrtError(f"ModelOpt's algorithm {algorithm!r} failed: {error}.", "Use --calibrator streaming.") from None
    return collect(model, source.config)


def load_model(source: HfCheckpoint) -> ArcticForCausalLM:
    """The whole network with the checkpoint's weights, bf16."""
    with torch.device("meta"):
        model = ArcticForCausalLM(ModelConfig(architectures=[ARCHITECTURE]), source.config)
    weights = {name: source.read(name) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model.eval()  # type: ignore[no-any-return]


def collect(model: nn.Module, config: ArcticConfig) -> GivenAmax:
    """The maxima in a calibrated model's quantizers, a projection of the experts over those that saw tokens."""
    modules: dict[str, Any] = dict(model.named_modules())

    def seen(kind: str, *names: str) -> Tensor:
        values = [getattr(modules[name], kind).amax for name in names]
        return torch.stack([value.reshape(()).cpu() for value in values if value is not None]).max()

    sites = []
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        experts = [f"{prefix}.block_sparse_moe.experts.{expert}" for expert in range(config.num_local_experts)]
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.residual_mlp"
        sites.append(
            {
                QKV: seen("input_quantizer", *(f"{attention}.{p}_proj" for p in "qkv")),
                DENSE: seen("input_quantizer", f"{attention}.o_proj"),
                K_CACHE: seen("k_bmm_quantizer", attention),
                V_CACHE: seen("v_bmm_quantizer", attention),
                RESIDUAL_FC: seen("input_quantizer", f"{mlp}.w1", f"{mlp}.w3"),
                RESIDUAL_PROJ: seen("input_quantizer", f"{mlp}.w2"),
                EXPERT_FC: seen("input_quantizer", *(f"{e}.{w}" for e in experts for w in ("w1", "w3"))),
                EXPERT_PROJ: seen("input_quantizer", *(f"{e}.w2" for e in experts)),
            }
        )
    linears = {name: module for name, module in modules.items() if getattr(module, "weight_quantizer", None) is not None}
    enabled = {name: module.weight_quantizer for name, module in linears.items() if module.weight_quantizer.is_enabled}
    return GivenAmax(sites, {f"{name}.weight": quantizer.amax.reshape(()).cpu() for name, quantizer in enabled.items()})
