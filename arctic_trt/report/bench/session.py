"""Who is measured, and with which prompts: from flags to an open target."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arctic_trt.engine.config import EngineConfig
from arctic_trt.errors import UsageError
from arctic_trt.launch import find_launch, is_leader, local_threads
from arctic_trt.machine import available_cores
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.report.bench.clients import OpenAiClient, TritonClient
from arctic_trt.report.bench.plan import Arrival, arrive_together, check_fits
from arctic_trt.report.bench.roofline import traffic_of
from arctic_trt.report.bench.run import Memory, Round
from arctic_trt.report.bench.target import EngineTarget, ServerTarget, Target
from arctic_trt.report.bench.workload import FilePrompts, RandomPrompts, SpelledPrompts, Workload, words_of
from arctic_trt.report.measure import measure_gpu_bandwidth, measure_read_bandwidth
from arctic_trt.runtime.device import AUTO, CUDA
from arctic_trt.runtime.inputs import read_prompts
from arctic_trt.runtime.open_engine import check_engine, open_engine
from arctic_trt.runtime.requests import check_vocabulary

DEFAULT_LENGTH = 2048

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What ``arctic-trt bench`` was asked for, beside its cases; exactly one target is given."""

    engine_dir: Path | None = None
    triton_url: str | None = None
    openai_url: str | None = None
    model: str | None = None
    tokenizer_dir: Path | None = None
    input_file: Path | None = None
    prompt_length: tuple[int, ...] | None = None
    max_new_tokens: int
    warmup: int = 0
    seed: int = 0
    framework: str | None = None
    tensor_parallel: int | None = None
    device: str = AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An open target; ``engine`` and what its memory allows are None for a server."""

    target: Target
    engine: EngineConfig | None
    tensor_parallel: int | None
    device: torch.device | None = None

    def measure_memory(self) -> Memory | None:
        """:func:`measure_memory` of the engine."""
        return measure_memory(self.engine, self.device) if self.engine and self.device else None


class Session:
    """One benchmark's target and prompts. All ranks of an engine make one from the same options."""

    def __init__(self, options: BenchOptions) -> None:
        """Read what the options name; raises :class:`UsageError` for options that do not fit, :class:`RefusedError` for a wrong
        number of ranks or an engine of another backend.
        """
        self.options = options
        _check_options(options)
        self._engine = check_engine(options.engine_dir) if options.engine_dir else None
        self.workload = self._plan_workload()
        self.lengths: Sequence[int | None] = options.prompt_length or (None if options.input_file else DEFAULT_LENGTH,)
        warmup = self.workload.take(options.warmup, min(length or 0 for length in self.lengths) or None)
        self.warmup: list[Arrival] = arrive_together(warmup, options.max_new_tokens)

    @property
    def framework(self) -> str:
        """What the target is called."""
        options = self.options
        return options.framework or ("arctic-trt" if options.engine_dir else "triton" if options.triton_url else "openai")

    @contextmanager
    def open(self, rounds: Sequence[Round]) -> Iterator[Place | None]:
        """Open the target for ``rounds``. On all ranks but the first this takes part until the block is left there, and gives
        None. Raises :class:`UsageError` for prompts that the engine was not built for.
        """
        options = self.options
        if self._engine is None or options.engine_dir is None:
            client = TritonClient if options.triton_url else OpenAiClient
            target = ServerTarget(client(options.triton_url or options.openai_url or "", options.model or ""))
            yield Place(target=target, engine=None, tensor_parallel=options.tensor_parallel)
            return
        _, mapping, _ = self._engine.network()
        if options.tensor_parallel not in (None, mapping.tp_size):
            raise UsageError(f"-tp {options.tensor_parallel} is not the engine's tp_size {mapping.tp_size}.", "Leave it out.")
        self._check_prompts(rounds, self._engine)
        engine = open_engine(options.engine_dir, device=options.device)
        if not is_leader():
            engine.follow()
            yield None
            return
        yield Place(target=EngineTarget(engine), engine=self._engine, tensor_parallel=mapping.tp_size, device=engine.device)
        engine.close()

    def as_dict(self, place: Place) -> dict[str, Any]:
        """What the figures of ``--json`` belong to."""
        options = self.options
        return {
            "target": str(options.engine_dir or options.triton_url or options.openai_url),
            "framework": self.framework,
            "tensor_parallel": place.tensor_parallel,
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
        }

    def _plan_workload(self) -> Workload:
        options = self.options
        needed = options.input_file or self._engine is None
        tokenizer = Tokenizer(options.tokenizer_dir) if options.tokenizer_dir and needed else None
        workload: Workload
        if options.input_file:
            workload = FilePrompts(read_prompts((), options.input_file), tokenizer)
        elif self._engine is not None:
            workload = RandomPrompts(range(self._engine.network()[0].vocab_size), options.seed)
        else:
            assert tokenizer, "checked with the options"
            workload = RandomPrompts(words_of(tokenizer), options.seed)
        return SpelledPrompts(workload, tokenizer) if options.triton_url and tokenizer else workload

    def _check_prompts(self, rounds: Sequence[Round], engine: EngineConfig) -> None:
        asked = [self.warmup, *(arrivals for round in rounds for arrivals in round.repetitions)]
        prompts = [arrival.prompt.token_ids for arrivals in asked for arrival in arrivals]
        check_fits(max(map(len, prompts)), self.options.max_new_tokens, engine.build_config)
        vocab_size = engine.network()[0].vocab_size
        if self.options.input_file:
            for index, prompt in enumerate(prompts):
                check_vocabulary(index, prompt, vocab_size)
        most = max(round.concurrency for round in rounds)
        if most > engine.build_config.max_batch_size:
            logger.warning(
                "The engine was built for --max_batch_size %d: of %d prompts at once the others wait.",
                engine.build_config.max_batch_size,
                most,
            )


def measure_memory(engine: EngineConfig, device: torch.device) -> Memory:
    """How fast the engine's GPUs, or the cores that it may use, read memory, on all machines, which are taken to be alike."""
    gpus = device.type == CUDA
    bandwidth = engine.network()[1].world_size * measure_gpu_bandwidth(device) if gpus else _host_bandwidth(engine)
    return Memory(traffic=traffic_of(engine), bandwidth=bandwidth, max_batch_size=engine.build_config.max_batch_size)


def _host_bandwidth(engine: EngineConfig) -> float:
    launch = find_launch(os.environ)
    world_size = engine.network()[1].world_size
    local_ranks = (launch.local_size if launch else None) or world_size
    threads = min(available_cores(), local_ranks * local_threads(local_ranks))
    machines = -(-world_size // local_ranks)
    return machines * measure_read_bandwidth(threads=threads)


def _check_options(options: BenchOptions) -> None:
    targets = {"--engine_dir": options.engine_dir, "--triton_url": options.triton_url, "--openai_url": options.openai_url}
    given = [flag for flag, value in targets.items() if value]
    if len(given) != 1:
        raise UsageError(
            f"{' and '.join(given) or 'No target'} {'are' if given else 'is'} given, expected one of {', '.join(targets)}.",
            "Say what to measure.",
        )
    if options.engine_dir:
        return
    for flag, value in (("--model", options.model), ("--tokenizer_dir", options.tokenizer_dir)):
        if not value:
            raise UsageError(f"{given[0]} needs {flag}.", "A server wants a model's name, and prompts are made of its tokens.")
