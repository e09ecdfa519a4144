"""One layer of the pass over a checkpoint: read, observe, scale, cast, shard.

The main thread takes weights from the stream and hands them to a pool of threads: to let calibration tokens pass through them,
to cast and to write them. A buffer returns to the reader when all of that is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arctic_trt.checkpoint.contract import QuantFormat
from arctic_trt.checkpoint.writer import RankFiles
from arctic_trt.errors import CheckpointError
from arctic_trt.model.layer import EXPERT_FC, EXPERT_PROJ, AttentionWeights, DenseWeights, MlpWeights, on_device
from arctic_trt.model.names import LAYER_ROWS, hf_layer, weight_scale
from arctic_trt.quantize.calibrate import Calibration
from arctic_trt.quantize.scales import GivenAmax, quantize_attention, quantize_mlp, scale_activations, scale_kv_cache, weight_amax
from arctic_trt.quantize.stream import WeightStream, WorkPool
from arctic_trt.quantize.team import Team
from arctic_trt.quantize.token_pass import Contribution

SCALE = weight_scale(".weight")


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """What a layer's pass found out: tokens routed to each expert, each scale that is a single number, and the experts' own."""

    layer: int
    tokens_per_expert: tuple[int, ...]
    scales: dict[str, float]
    expert_scales: dict[str, list[float]]

    @property
    def experts_without_tokens(self) -> list[int]:
        return [expert for expert, tokens in enumerate(self.tokens_per_expert) if tokens == 0]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class LayerPass:
    """Carries layers from a Hugging Face checkpoint into rank files, a few experts in memory at a time."""

    def __init__(
        self,
        files: RankFiles,
        quant: QuantFormat,
        calibration: Calibration | None,
        stream: WeightStream[DenseWeights, MlpWeights],
        pool: WorkPool,
        team: Team,
        at: Callable[[int, int], None],
        given: GivenAmax | None = None,
    ) -> None:
        self.files = files
        self.quant = quant
        self.calibration = calibration
        self.stream = stream
        self.pool = pool
        self.team = team
        self._at = at
        self._given = given or GivenAmax([], {})
        self._num_experts = files.config.num_local_experts
        self._fp8: frozenset[str] = frozenset()
        self._scales: dict[str, Tensor] = {}
        self._expert_scales: dict[str, Tensor] = {}

    def run(self, layer: int) -> LayerSummary:
        """Process ``layer`` from its first byte read to its last byte handed to the operating system."""
        self._fp8 = self.quant.fp8_names(self.files.local_layer(layer))
        self._scales = {}
        experts = [name for name in (EXPERT_FC, EXPERT_PROJ) if name in self._fp8]
        self._expert_scales = {weight_scale(f"{name}.weight"): torch.zeros(self._num_experts, 1) for name in experts}
        try:
            self._pass_dense(layer)
            tokens = self._pass_experts(layer)
        except CheckpointError:
            self.pool.drain()  # a dense weight that is not finite is the cause, and is named instead
            raise
        observed = self.calibration.leave() if self.calibration else {}
        if self._given.sites:
            observed = self._given.sites[layer]
        self.pool.drain()
        self._write_scales(layer, observed)
        single = {suffix: scale.item() for suffix, scale in self._scales.items()}
        per_expert = {suffix.removesuffix(SCALE): scale_E1.flatten().tolist() for suffix, scale_E1 in self._expert_scales.items()}
        return LayerSummary(layer, tuple(tokens), single, per_expert)

    def _pass_dense(self, layer: int) -> None:
        unit = self.stream.dense(layer)
        if self.team.rank == 0:
            self.pool.later(unit.releasing(partial(self._put_dense, layer, unit.weights)))
        if self.calibration:
            self.calibration.enter(layer, unit, self.pool)
        unit.release()

    def _pass_experts(self, layer: int) -> list[int]:
        tokens = torch.zeros(self._num_experts, dtype=torch.int64)
        for contribution in self.pool.each(self._expert_works(layer, tokens)):
            if self.calibration and contribution:
                self.calibration.add(contribution)
        return self.team.sum(tokens).tolist() if self.calibration else []

    def _expert_works(self, layer: int, tokens: Tensor) -> Iterator[Callable[[], Contribution | None]]:
        """For each expert of this process: cast and write it, and pass its tokens through it."""
        for expert in self.team.share(self._num_experts):
            self._at(layer, expert)
            unit = self.stream.expert(layer, expert)
            # first, so that a weight that is not finite is named, and not what it did to the activations
            yield unit.releasing(partial(self._put_expert, layer, expert, unit.weights))
            if self.calibration:
                tokens[expert] = self.calibration.tokens_of(expert)
                yield from self.calibration.visits(expert, unit)
            unit.release()

    def _put_dense(self, layer: int, dense: DenseWeights) -> None:
        """Check and write everything but experts; keeps the weight scales."""
        weight_amax(_small(layer, dense))
        given = self._given.weights
        attention, attention_scales = quantize_attention(dense.attention, hf_layer(layer, "self_attn"), self._fp8, given)
        mlp, mlp_scales = quantize_mlp(dense.residual_mlp, hf_layer(layer, "residual_mlp"), self._fp8, given)
        self._scales |= attention_scales | mlp_scales
        attention, mlp = on_device(attention, "cpu"), on_device(mlp, "cpu")
        self.files.write_qkv(layer, LAYER_ROWS["attention.qkv.weight"], attention)
        for name, tensor in plain_tensors(dense, attention, mlp).items():
            self.files.write_plain(layer, LAYER_ROWS[name], tensor.cpu())

    def _put_expert(self, layer: int, expert: int, weights: MlpWeights) -> None:
        """Cast and write one expert."""
        prefix = hf_layer(layer, f"block_sparse_moe.experts.{expert}")
        weights, scales = quantize_mlp(weights, prefix, self._fp8, self._given.weights, expert=True)
        for name, scale in scales.items():
            self._expert_scales[name][expert] = scale
        fc, proj = LAYER_ROWS["mlp.fc.weight"], LAYER_ROWS["mlp.proj.weight"]
        self.files.write_expert(layer, expert, fc, proj, on_device(weights, "cpu"))

    def _write_scales(self, layer: int, observed: dict[str, Tensor]) -> None:
        self._expert_scales = {suffix: self.team.sum(scale_E1) for suffix, scale_E1 in self._expert_scales.items()}
        self._scales |= scale_activations(observed, self._fp8)
        if self.quant.kv_fp8:
            self._scales |= scale_kv_cache(observed, layer)
        if self.team.rank == 0:
            for suffix, scale in (self._scales | self._expert_scales).items():
                self.files.write_scale(layer, suffix, scale)


def plain_tensors(dense: DenseWeights, attention: AttentionWeights, mlp: MlpWeights) -> dict[str, Tensor]:
    """What a layer has that comes from one Hugging Face tensor, by TensorRT-LLM name; matrices from ``attention`` and ``mlp``."""
    return {
        "attention.dense.weight": attention.o,
        "residual_mlp.fc.weight": mlp.w1,
        "residual_mlp.gate.weight": mlp.w3,
        "residual_mlp.proj.weight": mlp.w2,
        "input_layernorm.weight": dense.input_layernorm,
        "post_layernorm.weight": dense.post_attention_layernorm,
        "residual_layernorm.weight": dense.residual_layernorm,
        "mlp.router.weight": dense.gate,
    }


def _small(layer: int, dense: DenseWeights) -> dict[str, Tensor]:
    """What is never cast, so that no cast looks at it: norms and router."""
    suffixes = ("input_layernorm", "post_attention_layernorm", "residual_layernorm")
    named = {hf_layer(layer, f"{suffix}.weight"): getattr(dense, suffix) for suffix in suffixes}
    return named | {hf_layer(layer, "block_sparse_moe.gate.weight"): dense.gate}
