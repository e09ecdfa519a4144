"""One rank at work: executes steps, of its own deciding on rank 0 and as told on the others."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from arctic_trt.checkpoint.contract import QuantFormat
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Rank
from arctic_trt.runtime.communicator import Communicator
from arctic_trt.runtime.kv_cache import KvCache
from arctic_trt.runtime.native.choose import choose_kernels
from arctic_trt.runtime.network import Network
from arctic_trt.runtime.step import END, Step, decode_step, encode_step
from arctic_trt.runtime.weights import load_rank


class Worker:
    """A rank's network and cache behind a single verb, :meth:`execute`."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._comm = network.comm
        self._cache = network.cache

    def execute(self, step: Step) -> Tensor | None:
        """Free, allocate, compute; returns the wanted logits [W, V] on rank 0."""
        for sequence in step.freed:
            self._cache.free(sequence)
        for chunk in step.chunks:
            if chunk.capacity:
                self._cache.allocate(chunk.sequence, chunk.capacity)
        return self.network.forward(step) if step.chunks else None

    @torch.inference_mode()
    def lead(self, step: Step) -> Tensor | None:
        """On rank 0: have all ranks execute ``step``."""
        self._comm.broadcast(encode_step(step))
        return self.execute(step)

    def dismiss(self) -> None:
        """On rank 0: end :meth:`follow` on the others, and forget all sequences; more work may come."""
        self._comm.broadcast(encode_step(END))
        self._cache.clear()

    @torch.inference_mode()
    def follow(self) -> None:
        """On all other ranks: execute what rank 0 says until it dismisses them."""
        while (step := decode_step(self._comm.broadcast(None))) != END:
            self.execute(step)
        self._cache.clear()


def load_worker(engine_dir: Path, config: ArcticConfig, quant: QuantFormat, rank: Rank, comm: Communicator) -> Worker:
    """Read the rank's weights; raises :class:`CheckpointError` for an engine file that is not there or not right."""
    kernels = choose_kernels()
    weights = load_rank(engine_dir, config, rank, quant, kernels)
    cache = KvCache(
        num_layers=len(weights.layers),
        kv_heads=len(rank.kv_heads(config.num_key_value_heads)),
        head_dim=config.head_dim,
        fp8=quant.kv_fp8,
        kernels=kernels,
    )
    return Worker(Network(config, rank, weights, cache, comm, kernels))
