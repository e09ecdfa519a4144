"""One rank at work on a GPU."""

from __future__ import annotations

import atexit
import gc
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arctic_trt.engine.config import EngineConfig
from arctic_trt.errors import RefusedError
from arctic_trt.model.mapping import Mapping, Rank
from arctic_trt.runtime.communicator import Communicator
from arctic_trt.runtime.cuda.choose import Arriving
from arctic_trt.runtime.cuda.communicator import DeviceCommunicator
from arctic_trt.runtime.cuda.graphs import graph_sizes, out_of_memory_is_refused
from arctic_trt.runtime.cuda.library import Thresholds, make_ops
from arctic_trt.runtime.cuda.network import CudaNetwork
from arctic_trt.runtime.cuda.upload import Uploader
from arctic_trt.runtime.kv_cache import KvCache
from arctic_trt.runtime.outcome import Outcome
from arctic_trt.runtime.step import Step, most_step_tokens
from arctic_trt.runtime.weights import load_rank
from arctic_trt.runtime.worker import Worker

REPORT_S = 5.0
MORE_MEMORY = "Free the GPU, or cut the engine for more ranks."
STEP_TOKENS = 4096
"""Of a step, at most, unless more sequences decode. From some 300 tokens on a step reads all experts, which takes an H200 12 ms
whatever is computed with them; sequences that decode beside a prompt wait longer for this many than for fewer."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceOutcome:
    """What comes of a step on a GPU; its logits are overwritten by the next one."""

    logits_WV: Tensor | None
    chosen: Arriving

    def logits(self) -> Tensor:
        if self.logits_WV is None:
            raise RuntimeError("the step's logits are wanted by nobody")
        return self.logits_WV.cpu()

    def tokens(self) -> list[int]:
        return self.chosen.wait()


class CudaWorker(Worker):
    """A rank on a GPU, which may have two steps to compute at a time: see :class:`arctic_trt.runtime.worker.Worker`."""

    ahead = True
    step_tokens = STEP_TOKENS
    network: CudaNetwork

    def execute(self, step: Step) -> Outcome | None:
        self._cache.assign(step)
        if not step.chunks:
            return None
        logits_WV = self.network.forward(step)
        return None if self.network.comm.rank else DeviceOutcome(logits_WV, self.network.bring_chosen())


def load_cuda_worker(engine_dir: Path, engine: EngineConfig, rank: Rank, comm: Communicator, device: torch.device) -> Worker:
    """Bring the rank's weights to its GPU.

    Raises :class:`CheckpointError` for an engine file that is not there or not right, :class:`RefusedError` for a GPU into which
    they do not fit, or without Triton.
    """
    (config, _, quant), limits = engine.network(), engine.build_config
    try:
        ops = make_ops(config, rank, device, Thresholds(recorded=limits.max_batch_size))
    except ImportError as error:
        raise RefusedError(f"--device cuda needs Triton, which cannot be imported ({error}).", "pip install triton") from None
    uploader = _Progress(device)
    with out_of_memory_is_refused(f"What rank {rank.index} holds", device, beside="", advice=MORE_MEMORY):
        weights = load_rank(engine_dir, config, rank, quant, uploader)
    cache = KvCache(
        num_layers=len(weights.layers),
        kv_heads=len(rank.kv_heads(config.num_key_value_heads)),
        head_dim=config.head_dim,
        fp8=quant.kv_fp8,
        device=device,
        spare_blocks=1,
    )
    most_tokens = most_step_tokens(limits, STEP_TOKENS)
    network = CudaNetwork(
        *(config, rank, weights, cache, comm, ops),
        device=device,
        max_seq_len=limits.max_seq_len,
        max_choices=min(limits.max_batch_size, most_tokens),
        graphs=graph_sizes(min(limits.max_batch_size, most_tokens)),
    )
    gc.freeze()
    return CudaWorker(network, on_reserved=lambda: network.prepare(most_tokens))


def connect_devices(worker: Worker, comm: Communicator, mapping: Mapping, device: torch.device) -> None:
    """Have ``worker``'s tensors go from GPU to GPU until this process ends, as all of ``mapping``'s ranks do together.

    Raises :class:`RefusedError` on all of them where they cannot.
    """
    worker.network.comm = devices = DeviceCommunicator(comm, mapping, device)
    atexit.register(_part, worker, devices)


def _part(worker: Worker, devices: DeviceCommunicator) -> None:
    """At the end of a job that has not failed: a rank that fails ends the others at once."""
    assert isinstance(worker.network, CudaNetwork)
    worker.network.forget()
    devices.close()


class _Progress:
    """Loads as :class:`Uploader`, and says now and then how far it is."""

    def __init__(self, device: torch.device) -> None:
        self._uploader = Uploader(device, self._count)
        self._bytes, self._began = 0, time.monotonic()
        self._next = self._began + REPORT_S

    def hold(self, weight: Tensor) -> Tensor:
        return self._uploader.hold(weight)

    def _count(self, count: int) -> None:
        self._bytes += count
        now = time.monotonic()
        if now >= self._next:
            self._next = now + REPORT_S
            logger.info("%.1f GB on the GPU, %.2f GB/s.", self._bytes / 1e9, self._bytes / 1e9 / (now - self._began))
