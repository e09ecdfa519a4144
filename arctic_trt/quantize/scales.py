"""From observed maxima to the scales of a TensorRT-LLM checkpoint, and from weights to their e4m3 codes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial

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
from arctic_trt.model.names import KV_CACHE_SCALE, RESIDUAL_GATE, activation_scale, weight_scale
from arctic_trt.quantize.fp8 import amax, cast_e4m3, scale_from_amax

logger = logging.getLogger(__name__)

ACTIVATION_SITES = {
    QKV: QKV,
    DENSE: DENSE,
    RESIDUAL_FC: RESIDUAL_FC,
    RESIDUAL_GATE: RESIDUAL_FC,
    RESIDUAL_PROJ: RESIDUAL_PROJ,
    EXPERT_FC: EXPERT_FC,
    EXPERT_PROJ: EXPERT_PROJ,
}
"""By TensorRT-LLM's name of a matrix, the site whose input it multiplies; all but one are called alike."""
KV_SCALE_FLOOR = 1.0
KV_SCALE_WARNING = 0.5


Settle = Callable[[str, Tensor], Tensor]
"""From a projection and the weight scale [1] that follows from its weights to the scale to cast with."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """E4m3 codes of one or more matrices that share ``scale`` (float32 [1]); without a scale, the bf16 matrices themselves."""

    codes: tuple[Tensor, ...]
    scale: Tensor | None


@dataclass(frozen=True, slots=True)
class GivenAmax:
    """Maxima that another calibrator found: ``sites`` of each layer, ``weights`` by Hugging Face name."""

    sites: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


def own_scale(name: str, scale: Tensor) -> Tensor:
    """The scale that follows from the weights."""
    return scale


def weight_amax(weights: Mapping[str, Tensor], given: Mapping[str, Tensor] | None = None) -> Tensor:
    """Common amax of named bf16 matrices that share a scale; raises :class:`CheckpointError` naming one that is not finite.

    Where another calibrator has ``given`` an amax for a name, that counts instead of the matrix's own.
    """
    own = {name: _finite_amax(name, weight) for name, weight in weights.items()}
    common = torch.stack([given[name] if given and name in given else value for name, value in own.items()]).max()
    if common == 0:
        logger.warning("%s: all weights are zero; its scale is set to 1.", " and ".join(weights))
    return common


def _finite_amax(name: str, weight: Tensor) -> Tensor:
    value = amax(weight).cpu()
    if not torch.isfinite(value):
        raise CheckpointError(f"{name} contains NaN or infinity.", "Download its shard again, or use another checkpoint.")
    return value


def quantize_together(
    weights: Mapping[str, Tensor],
    given: Mapping[str, Tensor] | None = None,
    *,
    fp8: bool = True,
    settle: Callable[[Tensor], Tensor] = lambda own: own,
) -> Quantized:
    """Cast matrices with one common scale, once, from bf16; without ``fp8`` they stay as they are, but must be finite too."""
    if not fp8:
        for name, weight in weights.items():
            _finite_amax(name, weight)
        return Quantized(tuple(weights.values()), None)
    scale = settle(scale_from_amax(weight_amax(weights, given)).reshape(1))
    return Quantized(tuple(cast_e4m3(weight, scale) for weight in weights.values()), scale)


def quantize_attention(
    weights: AttentionWeights,
    prefix: str,
    fp8: Container[str],
    given: Mapping[str, Tensor] | None = None,
    settle: Settle = own_scale,
) -> tuple[AttentionWeights, dict[str, Tensor]]:
    """(what is stored, weight scales [1] by TensorRT-LLM name within the layer); what is not named in ``fp8`` stays in bf16.

    ``prefix`` names the matrices in messages; ``settle`` may replace a scale before the cast.
    """
    projections = {f"{prefix}.{p}_proj.weight": getattr(weights, p) for p in "qkv"}
    qkv = quantize_together(projections, given, fp8=QKV in fp8, settle=partial(settle, QKV))
    o = quantize_together({f"{prefix}.o_proj.weight": weights.o}, given, fp8=DENSE in fp8, settle=partial(settle, DENSE))
    return AttentionWeights(*qkv.codes, *o.codes), _named({QKV: qkv.scale, DENSE: o.scale})


def quantize_mlp(
    weights: MlpWeights,
    prefix: str,
    fp8: Container[str],
    given: Mapping[str, Tensor] | None = None,
    settle: Settle = own_scale,
    *,
    expert: bool = False,
) -> tuple[MlpWeights, dict[str, Tensor]]:
    """The same for the residual MLP, or for an ``expert``; w1 and w3 share a scale."""
    joined, last = ((EXPERT_FC,), EXPERT_PROJ) if expert else ((RESIDUAL_FC, RESIDUAL_GATE), RESIDUAL_PROJ)
    sharing = {f"{prefix}.{w}.weight": getattr(weights, w) for w in ("w1", "w3")}
    fc = quantize_together(sharing, given, fp8=joined[0] in fp8, settle=partial(settle, joined[0]))
    proj = quantize_together({f"{prefix}.w2.weight": weights.w2}, given, fp8=last in fp8, settle=partial(settle, last))
    scales = _named({**dict.fromkeys(joined, fc.scale), last: proj.scale})
    return MlpWeights(w1=fc.codes[0], w2=proj.codes[0], w3=fc.codes[1]), scales


def _named(scales: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {weight_scale(f"{name}.weight"): scale for name, scale in scales.items() if scale is not None}


def scale_activations(values: Mapping[str, Tensor], fp8: Container[str]) -> dict[str, Tensor]:
    """Activation scales [1] by TensorRT-LLM name within the layer, of the projections in ``fp8``.

    Experts share one scale a projection: the maximum over those that saw tokens, so an expert that saw none takes theirs.
    """
    return {
        activation_scale(f"{name}.weight"): scale_from_amax(values[site]).reshape(1)
        for name, site in ACTIVATION_SITES.items()
        if name in fp8
    }


def scale_kv_cache(values: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The KV cache's scale [1], never below 1.0: as ModelOpt does, values up to 448 are stored as they are."""
    raw = torch.maximum(scale_from_amax(values[K_CACHE]), scale_from_amax(values[V_CACHE])).reshape(1)
    if raw > KV_SCALE_WARNING:
        logger.warning("Layer %d: keys or values reach %.0f, close to or beyond e4m3's 448.", layer, float(raw) * 448)
    return {KV_CACHE_SCALE: raw.clamp_min(KV_SCALE_FLOOR)}
