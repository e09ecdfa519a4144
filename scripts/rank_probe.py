"""One rank of an engine without a checkpoint: random weights made on the device, and steps as a server would ask for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from arctic_trt.checkpoint.contract import QuantFormat
from arctic_trt.checkpoint.tensors import TORCH_DTYPE
from arctic_trt.engine.torch.format import plan_engine_rank
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Rank
from arctic_trt.report.arctic import RELEASED
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.communicator import Ints
from arctic_trt.runtime.cuda.library import Thresholds, make_ops
from arctic_trt.runtime.cuda.network import CudaNetwork
from arctic_trt.runtime.cuda.ops import FusedOps
from arctic_trt.runtime.kv_cache import CPU, KvCache
from arctic_trt.runtime.layer import plan_shape
from arctic_trt.runtime.native.choose import choose_kernels, make_layers
from arctic_trt.runtime.network import Network
from arctic_trt.runtime.step import Choice, Chunk, Step
from arctic_trt.runtime.weights import RankWeights, rank_weights

FP8 = QuantFormat(fp8=True, kv_fp8=True)
SMALL = RELEASED.model_copy(
    update={
        "hidden_size": 448,
        "num_hidden_layers": 2,
        "num_attention_heads": 56,
        "intermediate_size": 304,
        "num_local_experts": 16,
        "vocab_size": 1024,
    }
)
"""What a CPU computes in seconds, by the same names and the same divisions."""
WEIGHT_CODES = 0x38
"""Magnitudes of random e4m3 codes are below this one, which is 1: what is multiplied stays finite."""

PARTS = {
    "norms": ("norm",),
    "attention": ("attend",),
    "products": ("project", "gated", "project_and_combine"),
    "router": ("route",),
    "experts": ("expert_gated", "expert_project"),
    "sums": ("combine", "all_reduce", "all_gather"),
    "tokens": ("embed", "choose"),
}
"""Parts of a step, and the operations that they are made of."""
PART_OF = {operation: part for part, operations in PARTS.items() for operation in operations}
PART_OF_WEIGHT = {
    **dict.fromkeys(("qkv", "dense", "residual_fc", "residual_proj", "lm_head"), "products"),
    **dict.fromkeys(("input_norm", "post_norm", "residual_norm", "final_norm"), "norms"),
}


class LocalWork:
    """A rank whose partners are not there: a sum over them reads and writes the same bytes, here."""

    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def all_reduce(self, x: Tensor) -> None:
        x.mul_(1.0)

    def all_gather(self, x_TV: Tensor) -> Tensor:
        return x_TV.repeat(1, self.world_size)

    def send(self, x: Tensor, rank: int) -> None:
        raise RuntimeError("a single stage has nobody to send to")

    def receive(self, shape: tuple[int, ...], rank: int) -> Tensor:
        raise RuntimeError("a single stage has nobody to receive from")

    def broadcast(self, values: Ints | None) -> Ints:
        raise RuntimeError("nobody listens")

    def gather_all(self, value: Any) -> list[Any]:
        return [value]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a step has to read at least, by its parts, and the multiplications and additions of its matrix products."""

    parts: Mapping[str, int]
    flops: int

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, name: str, generator: torch.Generator) -> Tensor:
    """Weights whose products neither vanish nor overflow, and scales that undo their length; where ``generator`` is."""
    device = generator.device
    if dtype == torch.float8_e4m3fn:
        codes = torch.empty(shape, dtype=torch.uint8, device=device)
        for part in codes.view(-1).split(1 << 30):
            part.random_(0, 256, generator=generator)
            part.bitwise_and_(0x80 | (WEIGHT_CODES - 1))
        return codes.view(dtype)
    if name.endswith("alpha"):
        return torch.full(shape, 1e-3, device=device)
    if name.endswith(("scale", "scale_inverse")):
        return torch.full(shape, 0.02, device=device)
    if name.endswith("norm"):
        return torch.ones(shape, dtype=dtype, device=device)
    return (torch.randn(shape, generator=generator, device=device) / math.sqrt(shape[-1])).bfloat16().to(dtype)


def random_weights(
    config: ArcticConfig, rank: Rank, made_on: torch.device, hold: Callable[[Tensor], Tensor] = lambda weight: weight
) -> RankWeights:
    """Weights of ``rank``, made by ``made_on``, always the same there, and then brought to where ``hold`` has them."""
    specs = {spec.name: spec for spec in plan_engine_rank(config, rank, FP8)}
    generator = torch.Generator(made_on).manual_seed(0)

    def take(name: str) -> Tensor:
        return hold(random_tensor(specs[name].shape, TORCH_DTYPE[specs[name].dtype], name, generator))

    return rank_weights(take, specs.keys(), config, rank, FP8)


def make_network(
    config: ArcticConfig,
    rank: Rank,
    ops: FusedOps,
    device: torch.device,
    *,
    room: KvRoom,
    max_seq_len: int,
    graphs: list[int],
    weights: RankWeights | None = None,
) -> CudaNetwork:
    """``rank`` on ``device``, with ``weights`` that lie there or with random ones, and room for keys and values."""
    weights = weights or random_weights(config, rank, device)
    cache, comm = _cache(config, rank, device), LocalWork(rank.mapping.world_size)
    cache.reserve(room)
    _fill(cache)
    network = CudaNetwork(config, rank, weights, cache, comm, ops, device=device, max_seq_len=max_seq_len, graphs=graphs)
    network.prepare(max(graphs, default=1))
    return network


def make_cpu_network(config: ArcticConfig, rank: Rank, room: KvRoom) -> Network:
    """``rank`` as the CPU engine computes it, with the random weights that the CPU makes."""
    kernels = choose_kernels()
    weights = random_weights(config, rank, CPU, kernels.hold)
    layers = make_layers(kernels, weights.layers, plan_shape(config, rank))
    cache, comm = _cache(config, rank, CPU), LocalWork(rank.mapping.world_size)
    cache.reserve(room)
    _fill(cache)
    return Network(config, rank, weights, layers, cache, comm, kernels)


def _cache(config: ArcticConfig, rank: Rank, device: torch.device) -> KvCache:
    layers, kv_heads = len(rank.layers(config.num_hidden_layers)), len(rank.kv_heads(config.num_key_value_heads))
    return KvCache(num_layers=layers, kv_heads=kv_heads, head_dim=config.head_dim, fp8=True, device=device, spare_blocks=1)


def _fill(cache: KvCache) -> None:
    """Keys and values that nobody computed, but that are finite."""
    for pages in cache.pages:
        pages.view(torch.uint8).random_(0, WEIGHT_CODES)


def choose_ops(config: ArcticConfig, rank: Rank, device: torch.device, thresholds: Thresholds) -> FusedOps:
    """Kernels and the library on a GPU, their twins elsewhere."""
    if device.type == "cuda":
        return make_ops(config, rank, device, thresholds)
    from arctic_trt.runtime.cuda.twin import TwinOps

    return TwinOps()


def same_again(step: Step) -> Step:
    """``step`` for a cache that has assigned its blocks already."""
    return Step(chunks=tuple(replace(chunk, blocks=()) for chunk in step.chunks))


def steps_of(
    sequences: int, tokens: int, context: int, room: KvRoom, network: CudaNetwork, *choices: Choice
) -> tuple[Step, Step]:
    """A step of ``tokens`` of each of ``sequences``, up to position ``context``, and the step that gives their blocks back.

    Each ends with one of ``choices`` by turns, or wants the last token's logits. Tokens are of those whose embedding ``network``
    has: others are zeros without its partners, for which all experts are equal.
    """
    each, words = room.blocks_for(context), held_words(network.config, network.rank)
    ids = torch.randint(0, words, (sequences, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    chunks = tuple(
        Chunk(
            sequence=sequence,
            start=context - tokens,
            tokens=tuple(ids[sequence]),
            blocks=tuple(range(sequence * each, (sequence + 1) * each)),
            logits_from=tokens - 1,
            choice=choices[sequence % len(choices)] if choices else None,
        )
        for sequence in range(sequences)
    )
    return Step(chunks=chunks), Step(freed=tuple(range(sequences)))


def held_words(config: ArcticConfig, rank: Rank) -> int:
    """Words, from 0 on, that rank 0 embeds and has logits of."""
    return config.vocab_size // rank.mapping.tp_size


def traffic_of(config: ArcticConfig, rank: Rank, tokens: int, sequences: int, context: int) -> Traffic:
    """What a step of ``tokens`` in all costs at least, if each token chooses its experts at random."""
    held, top_k = len(rank.experts(config.num_local_experts)), config.num_experts_per_tok
    touched = held * (1 - (1 - top_k / config.num_local_experts) ** tokens)
    read, flops = dict.fromkeys((*PARTS, "rest"), 0.0), 0.0
    for spec in plan_engine_rank(config, rank, FP8):
        _, _, name = spec.name.removesuffix(".weight").rpartition(".")
        if name in ("expert_fc", "expert_proj"):
            read["experts"] += spec.num_bytes * touched / held
            flops += 2 * math.prod(spec.shape[1:]) * tokens * top_k * held / config.num_local_experts
        elif name == "router":
            read["router"] += spec.num_bytes // 2  # a network has it in bf16
        elif name != "embedding":
            read[PART_OF_WEIGHT.get(name, "rest")] += spec.num_bytes
            if name == "lm_head" or spec.name.endswith(".weight"):
                flops += 2 * math.prod(spec.shape) * (sequences if name == "lm_head" else tokens)
    kv_heads = len(rank.kv_heads(config.num_key_value_heads))
    read["attention"] += 2 * len(rank.layers(config.num_hidden_layers)) * kv_heads * config.head_dim * context * sequences
    return Traffic({part: int(count) for part, count in read.items() if count}, int(flops))
