"""The peer that the quantizer is held to: NVIDIA ModelOpt's max calibration and TensorRT-LLM export, on the same weights.

ModelOpt finds its way by names: the module and class names below are those of the Hugging Face code, the children of
``ArcticDecoderLayer`` are in the order by which its exporter tells three norms and two MLPs apart, and the attention calls
``scaled_dot_product_attention`` exactly once, because that source line is where it hooks in the KV cache's quantizers.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tests.support.checkpoints import Config, Tensors


class ArcticConfig(PretrainedConfig):
    model_type = "arctic"


class ArcticRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class ArcticAttention(nn.Module):
    def __init__(self, config: ArcticConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        q, k, v = (
            proj(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotate(q), self.rotate(k)
        repeats = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, hidden))

    def rotate(self, x: Tensor) -> Tensor:
        frequency = 1.0 / self.config.rope_theta ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angle = torch.outer(torch.arange(x.shape[2]).float(), frequency).repeat(1, 2)
        half = self.head_dim // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)


class ArcticMLP(nn.Module):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, ffn, bias=False)
        self.w2 = nn.Linear(ffn, hidden, bias=False)
        self.w3 = nn.Linear(hidden, ffn, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ArcticMoE(nn.Module):
    def __init__(self, config: ArcticConfig) -> None:
        super().__init__()
        self.top_k, self.num_experts = config.num_experts_per_tok, config.num_local_experts
        self.gate = nn.Linear(config.hidden_size, self.num_experts, bias=False)
        self.experts = nn.ModuleList(ArcticMLP(config.hidden_size, config.intermediate_size) for _ in range(self.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        share, chosen = torch.topk(F.softmax(self.gate(rows), dim=-1, dtype=torch.float), self.top_k, dim=-1)
        if self.top_k > 1:
            share = share / share.sum(-1, keepdim=True)
        total = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == index)
            if row.numel():
                total.index_add_(0, row, (expert(rows[row]) * share[row, slot, None]).to(x.dtype))
        return total.view_as(x)


class ArcticDecoderLayer(nn.Module):
    def __init__(self, config: ArcticConfig) -> None:
        super().__init__()
        self.self_attn = ArcticAttention(config)
        self.block_sparse_moe = ArcticMoE(config)
        self.input_layernorm = ArcticRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ArcticRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.residual_layernorm = ArcticRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.residual_mlp = ArcticMLP(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        attended = x + self.self_attn(self.input_layernorm(x))
        dense = attended + self.residual_mlp(self.residual_layernorm(attended))
        return dense + self.block_sparse_moe(self.post_attention_layernorm(x))


class ArcticModel(nn.Module):
    def __init__(self, config: ArcticConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ArcticDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = ArcticRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ArcticForCausalLM(PreTrainedModel):
    config_class = ArcticConfig

    def __init__(self, config: ArcticConfig) -> None:
        super().__init__(config)
        self.model = ArcticModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.model(input_ids))


def hugging_face_model(config: Config, tensors: Tensors, *, copy: bool = True) -> ArcticForCausalLM:
    with torch.device("meta"):
        model = ArcticForCausalLM(ArcticConfig(**config))
    model.load_state_dict({name: tensor.clone() if copy else tensor for name, tensor in tensors.items()}, assign=True)
    return model.eval()


class ModelOptReference:
    """A model calibrated by ModelOpt; :meth:`export` cuts it for any tensor-parallel size."""

    def __init__(self, config: Config, tensors: Tensors, batches: list[Tensor], *, copy: bool = True) -> None:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

        def forward_loop(model: nn.Module) -> None:
            with torch.inference_mode():
                for ids in batches:
                    model(ids)

        recipe = update_quant_cfg_with_kv_cache_quant(mtq.FP8_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"])
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = mtq.quantize(hugging_face_model(config, tensors, copy=copy), recipe, forward_loop)

    def export(self, directory: Path, tp_size: int) -> list[Tensors]:
        """The tensors of every rank, without the two cache factors that TensorRT-LLM merges into one and drops."""
        from modelopt.torch.export import export_tensorrt_llm_checkpoint

        with torch.inference_mode(), contextlib.redirect_stdout(io.StringIO()):
            export_tensorrt_llm_checkpoint(
                self.model, "llama", torch.bfloat16, export_dir=str(directory), inference_tensor_parallel=tp_size
            )
        ranks = [load_file(directory / f"rank{rank}.safetensors") for rank in range(tp_size)]
        return [
            {n: t for n, t in rank.items() if not n.endswith((".k_cache_scaling_factor", ".v_cache_scaling_factor"))}
            for rank in ranks
        ]
