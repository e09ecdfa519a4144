"""How many bytes a decode step has to read, and hence how fast memory lets an engine be.

Counted is what all ranks of the engine read, at the widths that the engine's files have: every matrix once a step but the
embedding, of which a token reads one row, and the experts, of which it reads the chosen ones; and the cached keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

from arctic_trt.checkpoint.contract import QuantFormat
from arctic_trt.checkpoint.layout import TensorSpec
from arctic_trt.engine.config import EngineConfig
from arctic_trt.engine.torch.format import ENGINE_EMBEDDING, plan_engine_rank
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Mapping
from arctic_trt.report.gpus import kv_bytes_per_token

EXPERTS = ".expert_"


@dataclass(frozen=True, slots=True)
class Traffic:
    """An engine's reads."""

    config: ArcticConfig
    mapping: Mapping
    quant: QuantFormat

    def weight_bytes(self, batch: int) -> float:
        """Bytes of weights that a decode step of ``batch`` sequences reads, expected over independent, even routing."""
        specs = [spec for rank in self.mapping.ranks() for spec in plan_engine_rank(self.config, rank, self.quant)]
        return sum(spec.num_bytes * self._share(spec, batch) for spec in specs)

    def kv_bytes(self, context: float) -> float:
        """Bytes of cached keys and values of one sequence of ``context`` tokens."""
        return context * sum(kv_bytes_per_token(self.config, rank, self.quant) for rank in self.mapping.ranks())

    def step_bytes(self, batch: int, context: float) -> float:
        """Bytes that a decode step of ``batch`` sequences of ``context`` tokens each reads."""
        return self.weight_bytes(batch) + batch * self.kv_bytes(context)

    def _share(self, spec: TensorSpec, batch: int) -> float:
        if spec.name == ENGINE_EMBEDDING:  # its rows are divided over the ranks: one of them has a token's
            return batch / (spec.shape[0] * self.mapping.tp_size)
        if EXPERTS in spec.name and len(spec.shape) > 1:
            experts = self.config.num_local_experts
            return distinct_experts(experts, self.config.num_experts_per_tok, batch) / experts
        return 1.0


def traffic_of(engine: EngineConfig) -> Traffic:
    """The reads of a built engine."""
    return Traffic(*engine.network())


def distinct_experts(experts: int, chosen: int, tokens: int) -> float:
    """Expected number of different experts of a layer among ``tokens`` that each choose ``chosen`` of them evenly."""
    return experts * (1 - (1 - chosen / experts) ** tokens)


def mean_context(input_tokens: float, output_tokens: float) -> float:
    """Tokens that the decode steps of a sequence find in the cache, their own included, on average."""
    return input_tokens + output_tokens / 2
