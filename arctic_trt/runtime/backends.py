"""The two ways to run an engine, behind the verbs of a run: load on all ranks, complete on the first, follow on the others."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from arctic_trt.engine.config import TORCH, EngineConfig
from arctic_trt.engine.tensorrt_llm.session import RuntimeOptions, TrtLlmSession
from arctic_trt.errors import ArcticTrtError, UsageError
from arctic_trt.launch import find_launch
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.batcher import Batcher, generate
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.communicator import Communicator, agreement
from arctic_trt.runtime.completion import Completion, Listeners
from arctic_trt.runtime.detokenizer import Detokenizer
from arctic_trt.runtime.device import AUTO, CPU, CUDA, look_around, take_device
from arctic_trt.runtime.kv_budget import KvBudget, check_fits, check_room, free_on_gpu, free_on_host, plan_room
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.trtllm import check_engine, generate_with_trtllm, open_session
from arctic_trt.runtime.worker import Worker, load_worker

ALWAYS_ON = ("kv_cache_enable_block_reuse", "enable_chunked_context")
"""What TensorRT-LLM has to be asked for, and the torch backend does anyway."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What rank 0 has to complete: ``num_return_sequences`` requests a prompt. ``pad`` ends a sequence, -1 if nothing does."""

    requests: list[Request]
    tokenizer: Tokenizer | None
    detokenizer: Callable[[], Detokenizer | None]
    pad: int
    streaming: bool
    num_return_sequences: int = 1


class Backend(Protocol):
    """One rank of an engine."""

    def check(self) -> None:
        """Refuse before loading; all ranks agree on the outcome."""

    def load(self, requests: Sequence[Request] | None) -> None:
        """Load this rank; ``requests`` on rank 0 alone. All ranks call it."""

    def complete(self, work: Work, listeners: Listeners) -> list[Completion]:
        """On rank 0: complete all requests, then let the other ranks go."""

    def follow(self) -> None:
        """On the other ranks: take part until rank 0 is done."""


class TorchBackend:
    """The portable engine."""

    def __init__(self, engine_dir: Path, engine: EngineConfig, comm: Communicator, budget: KvBudget, device: str) -> None:
        self._engine_dir = engine_dir
        self._engine = engine
        self._comm = comm
        self._budget = budget
        self._asked = device
        self.device = torch.device("cpu")
        self._sights = comm.gather_all(look_around(device))
        self._worker: Worker | None = None

    def check(self) -> None:
        config, mapping, quant = self._engine.network()
        rank = mapping.rank(self._comm.rank)
        self.device = take_device(self._asked, self._sights, rank.index)
        if self.device.type == CUDA:
            from arctic_trt.runtime.cuda.worker import load_cuda_worker

            self._worker = load_cuda_worker(self._engine_dir, self._engine, rank, self._comm, self.device)
        else:
            self._worker = load_worker(self._engine_dir, config, quant, rank, self._comm)

    def load(self, requests: Sequence[Request] | None) -> None:
        """Make room for the KV cache, as much as the rank has that can give least: checking a rank was reading it.

        Raises :class:`UsageError` when that is too little for one of the ``requests``.
        """
        block_bytes, limits = self.worker.block_bytes, self._engine.build_config
        self._connect_devices()
        found = self._comm.gather_all(plan_room(self._budget, limits, block_bytes, self._free_memory).num_blocks)
        room = KvRoom(min(found))
        with agreement(self._comm):
            check_room(room, block_bytes)
            for request in requests or ():
                check_fits(request, room)
        self.worker.reserve(room)
        logger.debug(
            "The KV cache has room for %d tokens, in blocks of %d; %.1f MB a rank when full.",
            *(room.num_tokens, room.block_tokens, room.num_blocks * block_bytes / 1e6),
        )

    def _connect_devices(self) -> None:
        """Where each rank has a GPU, tensors go from one to the other."""
        if self.device.type == CUDA and self._comm.world_size > 1:
            from arctic_trt.runtime.cuda.worker import connect_devices

            connect_devices(self.worker, self._comm, self._engine.network()[1], self.device)

    def _free_memory(self) -> int | None:
        """Bytes that this rank may take for its cache, None where the system does not say."""
        return free_on_gpu(self.device) if self.device.type == CUDA else free_on_host(_local_ranks(self._comm))

    @property
    def worker(self) -> Worker:
        assert self._worker is not None, "check comes first"
        return self._worker

    def complete(self, work: Work, listeners: Listeners) -> list[Completion]:
        completions = generate(
            self.worker.lead,
            work.requests,
            self._engine.build_config,
            ahead=self.worker.ahead,
            step_tokens=self.worker.step_tokens,
            room=self.worker.room,
            detokenizer=work.detokenizer,
            listeners=listeners,
        )
        self.worker.dismiss()
        return completions

    @contextmanager
    def batcher(self, detokenizer: Callable[[], Detokenizer | None], listeners: Listeners) -> Iterator[Batcher]:
        """On rank 0: requests may come and go until the block is left, which lets the other ranks go.

        So does an :class:`ArcticTrtError`, which is raised between steps. Any other may come from within one, where the other
        ranks wait for this one, and has to end the job.
        """
        worker, limits = self.worker, self._engine.build_config
        try:
            yield Batcher(
                *(worker.lead, limits),
                ahead=worker.ahead,
                step_tokens=worker.step_tokens,
                room=worker.room,
                detokenizer=detokenizer,
                listeners=listeners,
            )
        except ArcticTrtError:
            self.worker.dismiss()
            raise
        self.worker.dismiss()

    def follow(self) -> None:
        self.worker.follow()


class TrtLlmBackend:
    """TensorRT-LLM's own runtime."""

    def __init__(
        self, engine_dir: Path, engine: EngineConfig, comm: Communicator, options: RuntimeOptions, *, prompt_logits: bool
    ) -> None:
        self._engine_dir = engine_dir
        self._max_batch_size = engine.build_config.max_batch_size
        self._comm = comm
        self._options = options
        self._prompt_logits = prompt_logits
        self._session: TrtLlmSession | None = None

    def check(self) -> None:
        check_engine(self._engine_dir, self._comm, _local_ranks(self._comm), self._options, prompt_logits=self._prompt_logits)

    def load(self, requests: Sequence[Request] | None) -> None:
        self._session = open_session(self._engine_dir, self._comm, requests, self._max_batch_size, self._options)

    def complete(self, work: Work, listeners: Listeners) -> list[Completion]:
        assert self._session is not None, "load comes first"
        if self._session.gathers_logits:
            logger.warning("This engine gathers logits, so that prompts run one at a time and their text comes all at once.")
        completions = generate_with_trtllm(
            self._session,
            work.requests,
            self._max_batch_size,
            pad=work.pad,
            tokenizer=work.tokenizer,
            detokenizer=work.detokenizer,
            listeners=listeners,
            streaming=work.streaming,
            num_return_sequences=work.num_return_sequences,
        )
        self._leave()
        return completions

    def follow(self) -> None:
        self._leave()

    def _leave(self) -> None:
        """Wait asleep for all ranks: one that let go earlier would wait within TensorRT-LLM, which keeps a core busy."""
        self._comm.gather_all(None)
        if self._session is not None:
            self._session.close()


def make_backend(
    engine_dir: Path,
    engine: EngineConfig,
    comm: Communicator,
    options: RuntimeOptions,
    *,
    kv_cache_memory: int | None,
    prompt_logits: bool,
    device: str = AUTO,
) -> Backend:
    """The backend that ``engine_dir`` was built for. ``kv_cache_memory``, in bytes a rank, is the torch backend's alone.

    Raises :class:`UsageError` for an engine of TensorRT-LLM that is asked to run on the CPU.
    """
    if engine.backend == TORCH:
        if comm.rank == 0:
            _say_what_has_no_effect(options)
        budget = KvBudget(memory_bytes=kv_cache_memory, max_tokens=options.max_tokens_in_paged_kv_cache)
        return TorchBackend(engine_dir, engine, comm, budget, device)
    if device == CPU:
        raise UsageError("--device cpu: engines of TensorRT-LLM run on GPUs alone.", "Build one with --backend torch.")
    if kv_cache_memory is not None and comm.rank == 0:
        logger.warning("--kv_cache_memory: without effect, TensorRT-LLM has --kv_cache_free_gpu_memory_fraction.")
    return TrtLlmBackend(engine_dir, engine, comm, options, prompt_logits=prompt_logits)


def _say_what_has_no_effect(options: RuntimeOptions) -> None:
    given = [name for name in options.given() if name != "max_tokens_in_paged_kv_cache"]
    always = [f"--{name}" for name in given if name in ALWAYS_ON]
    never = [f"--{name}" for name in given if name not in ALWAYS_ON]
    if always:
        logger.debug("%s: the torch backend always does that.", ", ".join(always))
    if never:
        logger.warning("%s: without effect, the torch backend has no such settings.", ", ".join(never))


def _local_ranks(comm: Communicator) -> int:
    """Ranks on this host, all where the launcher does not say."""
    launch = find_launch(os.environ)
    return (launch.local_size if launch else None) or comm.world_size
