"""One layer of the pass over a checkpoint: read, observe, scale, cast, shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.checkpoint.trtllm import QuantFormat
from arctic_trt.checkpoint.writer import RankFiles
from arctic_trt.model.layer import DenseWeights, MlpWeights
from arctic_trt.model.names import LAYER, hf_layer, weight_scale
from arctic_trt.quantize.calibrate import Calibration
from arctic_trt.quantize.scales import quantize_attention, quantize_mlp, scale_activations, scale_kv_cache, weight_amax

ROWS = {row.trt.removesuffix(".weight"): row for row in LAYER}


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """What a layer's pass found out: tokens routed to each expert, and each scale that is a single number."""

    layer: int
    tokens_per_expert: tuple[int, ...]
    scales: dict[str, float]

    @property
    def experts_without_tokens(self) -> list[int]:
        return [expert for expert, tokens in enumerate(self.tokens_per_expert) if tokens == 0]


class LayerPass:
    """Carries layers from a Hugging Face checkpoint into rank files, one expert in memory at a time."""

    def __init__(self, source: HfCheckpoint, files: RankFiles, quant: QuantFormat, calibration: Calibration | None) -> None:
        self.source = source
        self.files = files
        self.quant = quant
        self.calibration = calibration

    def run(self, layer: int) -> LayerSummary:
        """Process ``layer`` from its first byte read to its last byte written."""
        dense = self.source.dense(layer)
        self._check_small(layer, dense)
        scales = self._put_dense(layer, dense)  # first of all, so that a weight that is not finite is named, not its effects
        if self.calibration:
            self.calibration.enter(layer, dense)
        tokens, expert_scales = self._stream_experts(layer)
        if self.calibration:
            observed = self.calibration.leave()
            scales |= expert_scales | scale_activations(observed)
            scales |= scale_kv_cache(observed, layer) if self.quant.kv_fp8 else {}
            for suffix, scale in scales.items():
                self.files.write_scale(layer, suffix, scale)
        single = {suffix: scale.item() for suffix, scale in scales.items() if scale.numel() == 1}
        return LayerSummary(layer, tuple(tokens), single)

    def _stream_experts(self, layer: int) -> tuple[list[int], dict[str, Tensor]]:
        tokens: list[int] = []
        fc_scales: list[Tensor] = []
        proj_scales: list[Tensor] = []
        for expert in range(self.source.config.num_local_experts):
            weights = self.source.expert(layer, expert)
            prefix = hf_layer(layer, f"block_sparse_moe.experts.{expert}")
            if self.calibration:
                stored, fc_scale, proj_scale = quantize_mlp(weights, prefix)
                tokens.append(self.calibration.visit(expert, weights))
                fc_scales.append(fc_scale)
                proj_scales.append(proj_scale)
            else:
                stored = weights
                weight_amax({f"{prefix}.{w}.weight": getattr(weights, w) for w in ("w1", "w2", "w3")})
            self.files.write_expert(layer, expert, ROWS["mlp.fc"], ROWS["mlp.proj"], stored)
        scales = {"mlp.fc.weight": fc_scales, "mlp.proj.weight": proj_scales} if fc_scales else {}
        return tokens, {weight_scale(name): torch.stack(values) for name, values in scales.items()}

    def _put_dense(self, layer: int, dense: DenseWeights) -> dict[str, Tensor]:
        """Write everything but experts; returns the weight scales."""
        scales: dict[str, Tensor] = {}
        attention, mlp = dense.attention, dense.residual_mlp
        if self.quant.fp8:
            attention, qkv_scale, o_scale = quantize_attention(attention, hf_layer(layer, "self_attn"))
            mlp, fc_scale, proj_scale = quantize_mlp(mlp, hf_layer(layer, "residual_mlp"))
            by_name = {
                "attention.qkv": qkv_scale,
                "attention.dense": o_scale,
                "residual_mlp.fc": fc_scale,
                "residual_mlp.gate": fc_scale,
                "residual_mlp.proj": proj_scale,
            }
            scales = {weight_scale(f"{name}.weight"): scale for name, scale in by_name.items()}
        self.files.write_qkv(layer, ROWS["attention.qkv"], attention)
        for name, tensor in self._plain(dense, attention.o, mlp).items():
            self.files.write_plain(layer, ROWS[name], tensor)
        return scales

    @staticmethod
    def _plain(dense: DenseWeights, o: Tensor, mlp: MlpWeights) -> dict[str, Tensor]:
        return {
            "attention.dense": o,
            "residual_mlp.fc": mlp.w1,
            "residual_mlp.gate": mlp.w3,
            "residual_mlp.proj": mlp.w2,
            "input_layernorm": dense.input_layernorm,
            "post_layernorm": dense.post_attention_layernorm,
            "residual_layernorm": dense.residual_layernorm,
            "mlp.router": dense.gate,
        }

    def _check_small(self, layer: int, dense: DenseWeights) -> None:
        """Refuse what no cast will look at: norms and router, and without quantization the matrices too."""
        tensors = {f"{name}.weight": getattr(dense, name) for name in ("input_layernorm", "post_attention_layernorm")}
        tensors |= {"residual_layernorm.weight": dense.residual_layernorm, "block_sparse_moe.gate.weight": dense.gate}
        if not self.quant.fp8:
            tensors |= {f"self_attn.{p}_proj.weight": getattr(dense.attention, p) for p in "qkvo"}
            tensors |= {f"residual_mlp.{w}.weight": getattr(dense.residual_mlp, w) for w in ("w1", "w2", "w3")}
        for suffix, tensor in tensors.items():
            weight_amax({hf_layer(layer, suffix): tensor})
