"""The GPU's network of an engine's rank on the CPU, with the operations' twins, and the steps that tests give it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from arctic_trt.engine.config import read_engine_config
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.communicator import Communicator
from arctic_trt.runtime.cuda import graphs
from arctic_trt.runtime.cuda.graphs import Recorded
from arctic_trt.runtime.cuda.network import CudaNetwork, Decode
from arctic_trt.runtime.cuda.twin import TwinOps
from arctic_trt.runtime.cuda.worker import CudaWorker
from arctic_trt.runtime.kernels import CpuKernels
from arctic_trt.runtime.kv_cache import KvCache
from arctic_trt.runtime.step import Chunk, Step
from arctic_trt.runtime.weights import load_rank

BLOCK = 8
ROOM = KvRoom(42, block_tokens=BLOCK)


class AsItLies(CpuKernels):
    def hold(self, weight: Tensor) -> Tensor:
        return weight


def twin_worker(engine_dir: Path, comm: Communicator, graphs: tuple[int, ...] = (), room: KvRoom = ROOM) -> CudaWorker:
    """``comm``'s rank, whose cache has its room."""
    config, mapping, quant = read_engine_config(engine_dir).network()
    rank = mapping.rank(comm.rank)
    weights = load_rank(engine_dir, config, rank, quant, AsItLies())
    cache = KvCache(
        num_layers=len(weights.layers),
        kv_heads=len(rank.kv_heads(config.num_key_value_heads)),
        head_dim=config.head_dim,
        fp8=quant.kv_fp8,
        spare_blocks=1,
    )
    cpu, ops = torch.device("cpu"), TwinOps(torch.float32)
    worker = CudaWorker(CudaNetwork(config, rank, weights, cache, comm, ops, device=cpu, max_seq_len=112, graphs=graphs))
    worker.reserve(room)
    return worker


def chunk(sequence: int, tokens: list[int], start: int, end: int) -> Chunk:
    """Blocks of sequence s are s, s + 3, s + 6, ..."""
    assert end <= len(tokens)
    fresh = range(-(-start // BLOCK), -(-end // BLOCK))
    blocks = tuple(sequence + 3 * block for block in fresh)
    return Chunk(sequence=sequence, start=start, tokens=tuple(tokens[start:end]), blocks=blocks, logits_from=0)


def mixed_steps(prompts: list[list[int]]) -> list[Step]:
    """Prompts alone and beside decoding, decoding alone, and a step whose sums are bf16, of 30, 9 and 100 tokens."""
    one, other, third = prompts
    return [
        Step(chunks=(chunk(0, one, 0, 20), chunk(1, other, 0, 8))),
        Step(chunks=(chunk(0, one, 20, 21), chunk(1, other, 8, 9), chunk(2, third, 0, 17))),
        Step(chunks=(chunk(0, one, 21, 22), chunk(2, third, 17, 18)), freed=(1,)),
        Step(chunks=(chunk(0, one, 22, 30),), freed=(2,)),
        Step(chunks=(chunk(2, third, 0, 100),)),
    ]


class Repeated:
    """A CUDA graph where there is no GPU: it does the work again, and leaves the result where it was the first time."""

    def __init__(self, work: Callable[[], Decode]) -> None:
        self._work = work
        self.result = work()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        found, (_, kept) = self._work()[1], self.result
        if found is not None and kept is not None:
            kept.copy_(found)


def repeat_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Repeated]:
    """From now on graphs are :class:`Repeated`; returns those that are recorded, in their order."""
    repeated: list[Repeated] = []

    def record_again(work: Callable[[], Decode], pool: object, device: torch.device) -> Recorded[Decode]:
        repeated.append(Repeated(work))
        return Recorded(cast(Any, repeated[-1]), repeated[-1].result)

    monkeypatch.setattr(graphs, "_record", record_again)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return repeated
