"""GPU memory that an engine needs, and the machines that have it. By memory alone: nothing here has been run on them.

A rank needs ``weights + KV cache + activations``: the bytes of its tensors, the cache of ``max_batch_size`` full sequences in
whole blocks, and :func:`estimate_activations`. Of a GPU's memory 92 % count as usable: the rest is the driver's, NCCL's and the
decoder's, and is lost between allocations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from arctic_trt.checkpoint.contract import QuantFormat, plan_rank
from arctic_trt.checkpoint.exclusion import single_layer_module
from arctic_trt.errors import UsageError
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Mapping, Rank, padded_vocab, plan_mapping

USABLE_SHARE = 0.92
GPUS_A_NODE = 8
KV_BLOCK_TOKENS = 32
ACTIVATION_FACTOR = 2


@dataclass(frozen=True, slots=True)
class Machine:
    """Some GPUs of one kind. Memory is what the driver reports, which is more than the name says."""

    name: str
    count: int
    gpu_memory_bytes: int
    fp8: bool = True


A100, H100 = 81920 << 20, 81559 << 20
H200, B200 = 143771 << 20, 183359 << 20
MACHINES = (
    Machine("A100 80GB", 8, A100, fp8=False),
    Machine("A100 80GB", 16, A100, fp8=False),
    Machine("H100 80GB", 4, H100),
    Machine("H100 80GB", 8, H100),
    Machine("H100 80GB", 16, H100),
    Machine("H200 141GB", 4, H200),
    Machine("H200 141GB", 8, H200),
    Machine("B200 180GB", 4, B200),
    Machine("B200 180GB", 8, B200),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What an engine is built for; ``max_num_tokens`` are the tokens of one step, prompts and new ones together."""

    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageNeed:
    """GPU memory of each rank of a pipeline stage at run time, in bytes."""

    stage: int
    layers: int
    weights_bytes: int
    kv_bytes_per_token: int
    kv_cache_bytes: int
    activation_bytes: int

    @property
    def needed_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes + self.activation_bytes

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "needed_bytes_per_gpu": self.needed_bytes}


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether the engine runs on a machine, divided by ``mapping``; ``why_not`` says what is missing."""

    machine: Machine
    mapping: Mapping | None
    needed_bytes: int | None
    why_not: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.machine.name,
            "count": self.machine.count,
            "gpu_memory_bytes": self.machine.gpu_memory_bytes,
            "needed_bytes_per_gpu": self.needed_bytes,
            "fits": not self.why_not,
            "why_not": self.why_not or None,
            "mapping": self.mapping.as_dict() if self.mapping else None,
        }


def estimate_stages(config: ArcticConfig, mapping: Mapping, quant: QuantFormat, load: Load) -> list[StageNeed]:
    """GPU memory of the ranks of each pipeline stage; within a stage all ranks need the same."""
    needs = []
    tokens = load.max_batch_size * -(-load.max_seq_len // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS
    for stage in range(mapping.pp_size):
        rank = mapping.rank(stage * mapping.tp_size)
        kv_bytes = kv_bytes_per_token(config, rank, quant)
        needs.append(
            StageNeed(
                stage=stage,
                layers=len(rank.layers(config.num_hidden_layers)),
                weights_bytes=sum(spec.num_bytes for spec in plan_rank(config, rank, quant)),
                kv_bytes_per_token=kv_bytes,
                kv_cache_bytes=tokens * kv_bytes,
                activation_bytes=estimate_activations(config, rank, load),
            )
        )
    return needs


def kv_bytes_per_token(config: ArcticConfig, rank: Rank, quant: QuantFormat) -> int:
    """Keys and values of one token in the layers and the heads of ``rank``, replicated heads counted on every rank."""
    heads, layers = len(rank.kv_heads(config.num_key_value_heads)), len(rank.layers(config.num_hidden_layers))
    return 2 * layers * heads * config.head_dim * (1 if quant.kv_fp8 else 2)


def estimate_activations(config: ArcticConfig, rank: Rank, load: Load) -> int:
    """Bytes of a step's activations and workspaces: twice what one layer's tensors take in bf16, and the logits in float32.

    Counted are six matrices of the hidden size (stream, norm, attention, dense path, experts, all-reduce), the rank's part of
    q, k, v, attention output and residual MLP, and for each chosen expert of each token its input, its output and three rows
    of the expert's width. Twice, because TensorRT keeps more alive than one layer's: for Llama 3.1 8B on one GPU the same sum
    gives 156 kB a token, and an engine's log 310 kB (TensorRT-LLM#3636).
    """
    hidden, mapping = config.hidden_size, rank.mapping
    local = hidden // mapping.tp_size
    kv_local = len(rank.kv_heads(config.num_key_value_heads)) * config.head_dim
    dense = 6 * hidden + 2 * local + 2 * kv_local + 3 * local
    moe = config.num_experts_per_tok * (2 * hidden + 3 * config.intermediate_size // mapping.moe_tp_size)
    logits = 4 * load.max_batch_size * padded_vocab(config.vocab_size, mapping.tp_size) if rank.is_last_stage else 0
    return ACTIVATION_FACTOR * 2 * load.max_num_tokens * (dense + moe) + logits


def judge_machine(machine: Machine, config: ArcticConfig, asked: Mapping, quant: QuantFormat, load: Load) -> Fit:
    """Whether an engine in the format ``quant`` fits the GPUs of ``machine``."""
    mapping = machine_mapping(machine, config, asked)
    if mapping is None:
        return Fit(machine, None, None, f"the model cannot be divided by {machine.count}")
    layers = config.num_hidden_layers
    needed = max(need.needed_bytes for need in estimate_stages(config, mapping, quant, load))
    why_not = ""
    if quant.fp8 and not machine.fp8:
        why_not = "no FP8 tensor cores"
    elif mapping.pp_size > 1 and single_layer_module(quant.modules_in_bf16(layers), layers):
        why_not = "exclude_modules names single layers"
    elif needed > USABLE_SHARE * machine.gpu_memory_bytes:
        why_not = "not enough memory"
    return Fit(machine, mapping, needed, why_not)


def machine_mapping(machine: Machine, config: ArcticConfig, asked: Mapping) -> Mapping | None:
    """The mapping that was asked for where it has as many ranks; else tensor parallelism within nodes, pipeline across."""
    if machine.count == asked.world_size:
        return asked
    tp_size = min(machine.count, GPUS_A_NODE)
    while tp_size:
        try:
            return plan_mapping(config, tp_size=tp_size, pp_size=machine.count // tp_size)
        except UsageError:
            tp_size //= 2
    return None
