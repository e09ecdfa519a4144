"""One rank at work: executes steps, of its own deciding on rank 0 and as told on the others."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from arctic_trt.checkpoint.contract import QuantFormat
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Rank
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.communicator import Communicator
from arctic_trt.runtime.kv_cache import KvCache
from arctic_trt.runtime.layer import plan_shape
from arctic_trt.runtime.native.choose import choose_kernels, make_layers
from arctic_trt.runtime.network import Network
from arctic_trt.runtime.outcome import Logits, Outcome
from arctic_trt.runtime.step import END, STEP_TOKENS, Step, decode_step, encode_step
from arctic_trt.runtime.weights import load_rank


class Forward(Protocol):
    """A rank's network on its device."""

    cache: KvCache
    comm: Communicator

    def forward(self, step: Step) -> Tensor | None:
        """Logits [W, V] on rank 0, None on the others."""


class Worker:
    """A rank's network and cache behind a single verb, :meth:`execute`. ``on_reserved`` is called when the cache has its room.

    ``ahead`` says whether it takes a step's choices, and may return before the step has been computed; ``step_tokens``, how many
    tokens a step with prompts should have at most.
    """

    ahead = False
    step_tokens = STEP_TOKENS

    def __init__(self, network: Forward, on_reserved: Callable[[], None] = lambda: None) -> None:
        self.network = network
        self._cache = network.cache
        self._on_reserved = on_reserved

    @property
    def room(self) -> KvRoom:
        """What :meth:`reserve` made room for."""
        return self._cache.room

    @property
    def block_bytes(self) -> int:
        """What a block of this rank's KV cache takes."""
        return self._cache.block_bytes

    def reserve(self, room: KvRoom) -> None:
        """Make room for keys and values, the same on all ranks; before the first step."""
        self._cache.reserve(room)
        self._on_reserved()

    def execute(self, step: Step) -> Outcome | None:
        """Free, assign blocks, compute; returns what came of it on rank 0, if anything is wanted."""
        self._cache.assign(step)
        logits_WV = self.network.forward(step) if step.chunks else None
        return None if logits_WV is None else Logits(logits_WV)

    @torch.inference_mode()
    def lead(self, step: Step) -> Outcome | None:
        """On rank 0: have all ranks execute ``step``."""
        if self.network.comm.world_size > 1:
            self.network.comm.broadcast(encode_step(step))
        return self.execute(step)

    def dismiss(self) -> None:
        """On rank 0: end :meth:`follow` on the others, and forget all sequences; more work may come."""
        self.network.comm.broadcast(encode_step(END))
        self._cache.clear()

    @torch.inference_mode()
    def follow(self) -> None:
        """On all other ranks: execute what rank 0 says until it dismisses them."""
        while (step := decode_step(self.network.comm.broadcast(None))) != END:
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
    )
    gc.freeze()  # what is there now stays: collections between steps need not look through it
    layers = make_layers(kernels, weights.layers, plan_shape(config, rank))
    return Worker(Network(config, rank, weights, layers, cache, comm, kernels))
