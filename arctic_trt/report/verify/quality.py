"""What the cast to e4m3 has cost each matrix: signal to quantization noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from arctic_trt.model.layer import AttentionWeights, DenseWeights, MlpWeights
from arctic_trt.model.names import hf_expert, hf_layer, site_of, weight_scale
from arctic_trt.quantize.fp8 import dequantize
from arctic_trt.report.verify.findings import Quality

BLOCK_ELEMENTS, SAMPLED_BLOCKS = 1 << 14, 16
MLP = ("w1", "w3", "w2")


@dataclass(frozen=True, slots=True)
class Cast:
    """A matrix of the original by its Hugging Face name, and what is stored for it."""

    name: str
    before: Tensor
    after: Tensor


def dense_casts(layer: int, before: DenseWeights, attention: AttentionWeights, mlp: MlpWeights) -> list[Cast]:
    """The matrices of a layer but its experts'."""
    own, residual = before.attention, before.residual_mlp
    projections = [Cast(hf_layer(layer, f"self_attn.{p}_proj.weight"), getattr(own, p), getattr(attention, p)) for p in "qkvo"]
    return projections + [Cast(hf_layer(layer, f"residual_mlp.{w}.weight"), getattr(residual, w), getattr(mlp, w)) for w in MLP]


def expert_casts(layer: int, expert: int, before: MlpWeights, after: MlpWeights) -> list[Cast]:
    """The matrices of an expert."""
    return [Cast(hf_expert(layer, expert, w), getattr(before, w), getattr(after, w)) for w in MLP]


def qualities_of(casts: Iterable[Cast], scales: Mapping[str, Tensor]) -> list[Quality]:
    """Of those matrices of one layer that were cast, with ``scales`` by their names within it, and that lost something."""
    qualities = []
    for cast in casts:
        scale = scales.get(weight_scale(f"{site_of(cast.name)[1]}.weight"))
        sqnr_db = sqnr(cast.before, cast.after, scale) if scale is not None else None
        if sqnr_db is not None:
            qualities.append(Quality(cast.name, sqnr_db))
    return qualities


def sqnr(original: Tensor, codes: Tensor, scale: Tensor) -> float | None:
    """What the cast of a bf16 matrix to e4m3 with ``scale`` has cost in dB, estimated from one block in :data:`SAMPLED_BLOCKS`.

    None where it has cost nothing.
    """
    signal = noise = 0.0
    wide, narrow = original.reshape(-1), codes.reshape(-1)
    for begin in range(0, wide.numel(), SAMPLED_BLOCKS * BLOCK_ELEMENTS):
        part = slice(begin, begin + BLOCK_ELEMENTS)
        x = wide[part].float()
        error = dequantize(narrow[part], scale).sub_(x)
        signal += float(x.dot(x))
        noise += float(error.dot(error))
    return 10 * math.log10(signal / noise) if noise and signal else None
