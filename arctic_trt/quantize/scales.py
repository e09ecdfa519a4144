"""From observed maxima to the scales of a TensorRT-LLM checkpoint, and from weights to their e4m3 codes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from arctic_trt.errors import CheckpointError
from arctic_trt.model.layer import (
    DENSE,
    EXPERT_FC,
    EXPERT_PROJ,
    K_CACHE,
    QKV,
    RESIDUAL_FC,
    RESIDUAL_PROJ,
    V_CACHE,
    AttentionWeights,
    MlpWeights,
)
from arctic_trt.model.names import KV_CACHE_SCALE, activation_scale
from arctic_trt.quantize.fp8 import amax, cast_e4m3, scale_from_amax

logger = logging.getLogger(__name__)

ACTIVATION_SITES = {
    "attention.qkv.weight": QKV,
    "attention.dense.weight": DENSE,
    "residual_mlp.fc.weight": RESIDUAL_FC,
    "residual_mlp.gate.weight": RESIDUAL_FC,
    "residual_mlp.proj.weight": RESIDUAL_PROJ,
    "mlp.fc.weight": EXPERT_FC,
    "mlp.proj.weight": EXPERT_PROJ,
}
KV_SCALE_FLOOR = 1.0
KV_SCALE_WARNING = 0.5


@dataclass(frozen=True, slots=True)
class Quantized:
    """E4m3 codes of one or more matrices that share ``scale`` (float32 [1])."""

    codes: tuple[Tensor, ...]
    scale: Tensor


@dataclass(frozen=True, slots=True)
class GivenAmax:
    """Maxima that another calibrator found: ``sites`` of each layer, ``weights`` by Hugging Face name."""

    sites: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


def weight_amax(weights: Mapping[str, Tensor], given: Mapping[str, Tensor] | None = None) -> Tensor:
    """Common amax of named bf16 matrices that share a scale; raises :class:`CheckpointError` naming one that is not finite.

    Where another calibrator has ``given`` an amax for a name, that counts instead of the matrix's own.
    """
    values = []
    for name, weight in weights.items():
        value = amax(weight).cpu()
        if not torch.isfinite(value):
            raise CheckpointError(f"{name} contains NaN or infinity.", "Download its shard again, or use another checkpoint.")
        values.append(given[name] if given and name in given else value)
    common = torch.stack(values).max()
    if common == 0:
        logger.warning("%s: all weights are zero; its scale is set to 1.", " and ".join(weights))
    return common


def quantize_together(weights: Mapping[str, Tensor], given: Mapping[str, Tensor] | None = None) -> Quantized:
    """Cast matrices with one common scale, once, from bf16."""
    scale = scale_from_amax(weight_amax(weights, given)).reshape(1)
    return Quantized(tuple(cast_e4m3(weight, scale) for weight in weights.values()), scale)


def quantize_attention(
    weights: AttentionWeights, prefix: str, given: Mapping[str, Tensor] | None = None
) -> tuple[AttentionWeights, Tensor, Tensor]:
    """(codes, scale of q/k/v, scale of o); ``prefix`` names the matrices in messages."""
    qkv = quantize_together({f"{prefix}.{p}_proj.weight": getattr(weights, p) for p in "qkv"}, given)
    o = quantize_together({f"{prefix}.o_proj.weight": weights.o}, given)
    return AttentionWeights(*qkv.codes, *o.codes), qkv.scale, o.scale


def quantize_mlp(
    weights: MlpWeights, prefix: str, given: Mapping[str, Tensor] | None = None
) -> tuple[MlpWeights, Tensor, Tensor]:
    """(codes, common scale of w1 and w3, scale of w2), for an expert or the residual MLP."""
    fc = quantize_together({f"{prefix}.w1.weight": weights.w1, f"{prefix}.w3.weight": weights.w3}, given)
    proj = quantize_together({f"{prefix}.w2.weight": weights.w2}, given)
    return MlpWeights(w1=fc.codes[0], w2=proj.codes[0], w3=fc.codes[1]), fc.scale, proj.scale


def scale_activations(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Activation scales [1] by TensorRT-LLM name within the layer.

    Experts share one scale a projection: the maximum over those that saw tokens, so an expert that saw none takes theirs.
    """
    return {activation_scale(name): scale_from_amax(values[site]).reshape(1) for name, site in ACTIVATION_SITES.items()}


def scale_kv_cache(values: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The KV cache's scale [1], never below 1.0: as ModelOpt does, values up to 448 are stored as they are."""
    raw = torch.maximum(scale_from_amax(values[K_CACHE]), scale_from_amax(values[V_CACHE])).reshape(1)
    if raw > KV_SCALE_WARNING:
        logger.warning("Layer %d: keys or values reach %.0f, close to or beyond e4m3's 448.", layer, float(raw) * 448)
    return {KV_CACHE_SCALE: raw.clamp_min(KV_SCALE_FLOOR)}
