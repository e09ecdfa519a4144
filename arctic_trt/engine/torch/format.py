"""What a torch engine's rank file contains, and from which tensors of the checkpoint's rank file each part is made.

Against the checkpoint, the weights that read the same input are joined (the residual MLP's ``fc`` rows, then its ``gate``
rows) and the scales are brought into the form in which they are applied: ``input_scale`` divides the activation before its
cast, ``alpha`` multiplies the product, so alpha = weight scale * activation scale, [1] or, for experts, [E, 1]. What the
checkpoint holds in bf16 has neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from arctic_trt.checkpoint.contract import QuantFormat, plan_rank
from arctic_trt.checkpoint.layout import TensorSpec
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Rank
from arctic_trt.model.names import EMBEDDING, FINAL_NORM, KV_CACHE_SCALE, LM_HEAD, activation_scale, trt_layer, weight_scale

CACHE_LINE = 64  # bytes
ENGINE_EMBEDDING, ENGINE_FINAL_NORM, ENGINE_LM_HEAD = "embedding", "final_norm", "lm_head"
NORMS = {
    "input_norm": "input_layernorm.weight",
    "post_norm": "post_layernorm.weight",
    "residual_norm": "residual_layernorm.weight",
}
ROUTER = "router"
KV_SCALE, KV_SCALE_INVERSE = "kv_scale", "kv_scale_inverse"
PROJECTIONS = {
    "qkv": ("attention.qkv.weight",),
    "dense": ("attention.dense.weight",),
    "expert_fc": ("mlp.fc.weight",),
    "expert_proj": ("mlp.proj.weight",),
    "residual_fc": ("residual_mlp.fc.weight", "residual_mlp.gate.weight"),
    "residual_proj": ("residual_mlp.proj.weight",),
}


class How(Enum):
    """How an engine tensor follows from its sources."""

    JOIN = "the sources one after another along the first axis; a single one as it is"
    SAME = "the first source, to which all others must be equal"
    PRODUCT = "the product of two sources, float32"
    INVERSE = "one over the source, float32"


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """One tensor of an engine's rank file, made from ``sources``, tensors of the same rank's checkpoint file."""

    spec: TensorSpec
    how: How
    sources: tuple[str, ...]


def layer_tensor(local_layer: int, name: str) -> str:
    """Full name of a layer's tensor in a rank file; layers count from 0 within a pipeline stage."""
    return f"layers.{local_layer}.{name}"


def plan_engine_rank(config: ArcticConfig, rank: Rank, quant: QuantFormat) -> list[TensorSpec]:
    """Every tensor of one rank file, in file order."""
    return [tensor.spec for tensor in plan_engine_tensors(config, rank, quant)]


def plan_engine_tensors(config: ArcticConfig, rank: Rank, quant: QuantFormat) -> list[EngineTensor]:
    """Every tensor of one rank file with its sources, in file order."""
    source = {spec.name: spec for spec in plan_rank(config, rank, quant)}
    tensors = [_take(ENGINE_EMBEDDING, EMBEDDING.trt, source)] if rank.is_first_stage else []
    for layer in range(len(rank.layers(config.num_hidden_layers))):
        tensors += _plan_layer(layer, source, quant)
    if rank.is_last_stage:
        tensors += [_take(ENGINE_FINAL_NORM, FINAL_NORM.trt, source), _take(ENGINE_LM_HEAD, LM_HEAD.trt, source)]
    # odd sizes last: a scale of four bytes would move the rows of all weights behind it off the cache lines
    return sorted(tensors, key=lambda tensor: tensor.spec.num_bytes % CACHE_LINE != 0)


def _plan_layer(layer: int, source: dict[str, TensorSpec], quant: QuantFormat) -> Iterator[EngineTensor]:
    for name, suffix in NORMS.items():
        yield _take(layer_tensor(layer, name), trt_layer(layer, suffix), source)
    yield _take(layer_tensor(layer, ROUTER), trt_layer(layer, "mlp.router.weight"), source)
    for name, suffixes in PROJECTIONS.items():
        weights = tuple(trt_layer(layer, suffix) for suffix in suffixes)
        yield from _plan_projection(layer_tensor(layer, name), weights, source)
    if quant.kv_fp8:
        scale = trt_layer(layer, KV_CACHE_SCALE)
        yield _take(layer_tensor(layer, KV_SCALE), scale, source)
        yield EngineTensor(TensorSpec(layer_tensor(layer, KV_SCALE_INVERSE), "F32", (1,)), How.INVERSE, (scale,))


def _plan_projection(name: str, weights: tuple[str, ...], source: dict[str, TensorSpec]) -> Iterator[EngineTensor]:
    first = source[weights[0]]
    rows = sum(source[weight].shape[0] for weight in weights)
    yield EngineTensor(TensorSpec(f"{name}.weight", first.dtype, (rows, *first.shape[1:])), How.JOIN, weights)
    if first.dtype != "F8_E4M3":
        return
    activation, weight = activation_scale(weights[0]), weight_scale(weights[0])
    yield EngineTensor(TensorSpec(f"{name}.input_scale", "F32", (1,)), How.SAME, tuple(map(activation_scale, weights)))
    yield EngineTensor(TensorSpec(f"{name}.alpha", "F32", source[weight].shape), How.PRODUCT, (weight, activation))


def weight_scale_twins(tensor: EngineTensor) -> tuple[str, ...]:
    """Weight scales that must be equal before ``tensor``'s sources may be joined; empty for a tensor of one source."""
    if tensor.how is not How.JOIN or len(tensor.sources) == 1 or tensor.spec.dtype != "F8_E4M3":
        return ()
    return tuple(map(weight_scale, tensor.sources))


def _take(name: str, source_name: str, source: dict[str, TensorSpec]) -> EngineTensor:
    spec = source[source_name]
    return EngineTensor(TensorSpec(name, spec.dtype, spec.shape), How.JOIN, (source_name,))
