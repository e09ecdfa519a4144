"""One rank's weights, from its engine file into the form in which its device multiplies them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from arctic_trt.checkpoint.contract import QuantFormat, rank_file
from arctic_trt.checkpoint.mapped import MappedFile
from arctic_trt.checkpoint.trtllm import check_specs
from arctic_trt.engine.config import REBUILD
from arctic_trt.engine.torch.format import (
    ENGINE_EMBEDDING,
    ENGINE_FINAL_NORM,
    ENGINE_LM_HEAD,
    KV_SCALE,
    NORMS,
    ROUTER,
    layer_tensor,
    plan_engine_rank,
)
from arctic_trt.errors import CheckpointError
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Rank
from arctic_trt.runtime.kernels import Projection

Take = Callable[[str], Tensor]


class Holder(Protocol):
    """What brings tensors to where they are multiplied; kernels do."""

    def hold(self, weight: Tensor) -> Tensor:
        """A tensor of the file (e4m3, bf16 or float32) as its device has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """A rank's part of one layer. Norms [D] and router [E, D] are float32; ``kv_scale`` is [1], None without an FP8 cache."""

    input_norm: Tensor
    post_norm: Tensor
    residual_norm: Tensor
    router: Tensor
    qkv: Projection
    dense: Projection
    expert_fc: Projection
    expert_proj: Projection
    residual_fc: Projection
    residual_proj: Projection
    kv_scale: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWeights:
    """Everything that one rank holds; what belongs to another pipeline stage is None."""

    layers: list[LayerWeights]
    embedding: Tensor | None
    final_norm: Tensor | None
    lm_head: Projection | None


def load_rank(engine_dir: Path, config: ArcticConfig, rank: Rank, quant: QuantFormat, kernels: Holder) -> RankWeights:
    """Read ``rank``'s file; raises :class:`CheckpointError` when it is absent, truncated or not of this engine."""
    path = engine_dir / rank_file(rank.index)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist, so the engine is not complete.", REBUILD)
    file = MappedFile(path)
    check_specs(file, plan_engine_rank(config, rank, quant), REBUILD)
    return rank_weights(lambda name: kernels.hold(file.read(name)), file.tensors.keys(), config, rank, quant)


def rank_weights(take: Take, names: Collection[str], config: ArcticConfig, rank: Rank, quant: QuantFormat) -> RankWeights:
    """``rank``'s weights, of what ``take`` gives for the tensors of a rank file, whose ``names`` are as planned."""
    first, last = rank.is_first_stage, rank.is_last_stage
    return RankWeights(
        layers=[_take_layer(take, names, layer, quant) for layer in range(len(rank.layers(config.num_hidden_layers)))],
        embedding=take(ENGINE_EMBEDDING) if first else None,
        final_norm=take(ENGINE_FINAL_NORM).float() if last else None,
        lm_head=Projection(take(ENGINE_LM_HEAD)) if last else None,
    )


def _take_layer(take: Take, names: Collection[str], layer: int, quant: QuantFormat) -> LayerWeights:
    def projection(name: str) -> Projection:
        full = layer_tensor(layer, name)
        weight = take(f"{full}.weight")
        if f"{full}.alpha" not in names:
            return Projection(weight)
        return Projection(weight, take(f"{full}.input_scale"), take(f"{full}.alpha"))

    norms = {name: take(layer_tensor(layer, name)).float() for name in NORMS}
    return LayerWeights(
        **norms,
        qkv=projection("qkv"),
        dense=projection("dense"),
        expert_fc=projection("expert_fc"),
        expert_proj=projection("expert_proj"),
        residual_fc=projection("residual_fc"),
        residual_proj=projection("residual_proj"),
        router=take(layer_tensor(layer, ROUTER)),
        kv_scale=take(layer_tensor(layer, KV_SCALE)) if quant.kv_fp8 else None,
    )
