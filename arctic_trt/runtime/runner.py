"""``arctic-trt run`` on one rank: read the engine, meet the other ranks, generate, write results on rank 0.

All ranks call :func:`run` with the same options. Rank 0 alone reads prompts and tokenizer, and it alone returns a result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from arctic_trt.engine.config import TORCH, EngineConfig, read_engine_config
from arctic_trt.engine.tensorrt_llm.session import RuntimeOptions
from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import FILES, Tokenizer
from arctic_trt.runtime.backends import Backend, Work, make_backend
from arctic_trt.runtime.chooser import TokenLogprobs
from arctic_trt.runtime.communicator import agreement, connect
from arctic_trt.runtime.completion import Completion, Listeners
from arctic_trt.runtime.detokenizer import Detokenizer, OnPiece, settled_ids
from arctic_trt.runtime.device import AUTO
from arctic_trt.runtime.inputs import Prompt, read_prompts, tokenize
from arctic_trt.runtime.outputs import NO_END_ID, PromptLogits, check_writable, padded_rows, write_csv, write_npy
from arctic_trt.runtime.requests import Request, find_end_ids, plan_requests, word_ids
from arctic_trt.runtime.sampler import Sampling

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What ``arctic-trt run`` was asked for."""

    engine_dir: Path
    max_output_len: int
    tokenizer_dir: Path | None = None
    input_text: tuple[str, ...] = ()
    input_file: Path | None = None
    chat: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    end_id: int | None = None
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    num_return_sequences: int = 1
    streaming: bool = False
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    kv_cache_memory: int | None = None
    device: str = AUTO
    output_npy: Path | None = None
    output_csv: Path | None = None
    output_logits_npy: Path | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """One completion as the interface names it; ``logprobs`` if they were wanted."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        value = asdict(self)
        if self.logprobs is None:
            del value["logprobs"]
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What rank 0 reports; ``seconds`` is the generation alone, without loading.

    The ``outputs`` are those of the first of the ``prompts``, then those of the second, as many of each.
    """

    prompts: list[str]
    outputs: list[Output]
    seconds: float
    world_size: int
    backend: str

    @property
    def num_generated(self) -> int:
        return sum(len(output.token_ids) for output in self.outputs)

    def as_dict(self) -> dict[str, Any]:
        return {
            "outputs": [output.as_dict() for output in self.outputs],
            "seconds": round(self.seconds, 6),
            "tokens_per_second": round(self.num_generated / self.seconds, 3),
            "world_size": self.world_size,
            "backend": self.backend,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Rank 0's checked work."""

    prompts: list[Prompt]
    requests: list[Request]
    tokenizer: Tokenizer | None
    pad: int


def run(options: RunOptions, on_piece: OnPiece = lambda index, piece: None) -> RunResult | None:
    """Generate; returns the result on rank 0 and None on the others.

    ``on_piece`` is called on rank 0 with (prompt index, text) as text becomes certain. Raises :class:`UsageError` for options
    and inputs that do not fit, :class:`RefusedError` for a wrong number of ranks or a machine that cannot run the engine, and
    :class:`CheckpointError` for broken engine files; all ranks raise together, with the lowest failing rank's message.
    """
    engine = read_engine_config(options.engine_dir)
    config, mapping, _ = engine.network(str(options.engine_dir / "config.json"))
    comm = connect(mapping)
    logits_asked = options.output_logits_npy is not None
    backend = make_backend(
        options.engine_dir,
        engine,
        comm,
        options.runtime,
        kv_cache_memory=options.kv_cache_memory,
        prompt_logits=logits_asked,
        device=options.device,
    )
    with agreement(comm):
        job = _plan(options, engine, config.vocab_size) if comm.rank == 0 else None
        backend.check()
    backend.load(job.requests if job else None)
    if job is None:
        backend.follow()
        return None
    began = time.perf_counter()
    completions = _complete(options, backend, job, config.vocab_size, on_piece)
    seconds = time.perf_counter() - began
    _write_rows(options, completions, job.pad)
    return RunResult(
        prompts=[prompt.shown for prompt in job.prompts],
        outputs=[_output(completion) for completion in completions],
        seconds=seconds,
        world_size=comm.world_size,
        backend=engine.backend,
    )


def _complete(options: RunOptions, backend: Backend, job: Job, vocab_size: int, on_piece: OnPiece) -> list[Completion]:
    work = Work(
        requests=job.requests,
        tokenizer=job.tokenizer,
        detokenizer=detokenizer_of(job.tokenizer),
        pad=job.pad,
        streaming=options.streaming,
        num_return_sequences=options.num_return_sequences,
    )
    if options.output_logits_npy is None:
        return backend.complete(work, Listeners(on_piece=on_piece))
    samples = options.num_return_sequences
    logits = PromptLogits(options.output_logits_npy, [request.prompt for request in job.requests[::samples]], vocab_size)

    def write(index: int, start: int, logits_WV: Tensor) -> None:
        logits.write(index // samples, start, logits_WV)

    try:
        completions = backend.complete(work, Listeners(on_piece=on_piece, on_prompt_logits=write))
        logits.finish()
    except BaseException:
        logits.abandon()
        raise
    return completions


def _plan(options: RunOptions, engine: EngineConfig, vocab_size: int) -> Job:
    for flag in ("output_npy", "output_csv", "output_logits_npy"):
        check_writable(f"--{flag}", getattr(options, flag))
    if options.logprobs is not None and engine.backend != TORCH:
        raise UsageError(
            "--logprobs needs an engine of the torch backend: TensorRT-LLM gives those of the chosen tokens alone.",
            "Leave it out, or build an engine with --backend torch.",
        )
    prompts = read_prompts(options.input_text, options.input_file)
    directory = tokenizer_directory(options.engine_dir, options.tokenizer_dir)
    tokenizer = _load_tokenizer(options, prompts, directory)
    end_ids = find_end_ids(options.end_id, tokenizer, directory)
    requests = plan_requests(
        [tokenize(prompt, tokenizer, chat=options.chat) for prompt in prompts],
        engine.build_config,
        vocab_size,
        max_new_tokens=options.max_output_len,
        sampling=options.sampling,
        end_ids=frozenset(end_ids),
        stop_words=options.stop_words,
        bad_words=word_ids(options.bad_words, tokenizer),
        logprobs=options.logprobs,
        num_return_sequences=options.num_return_sequences,
        prompt_logits=options.output_logits_npy is not None,
    )
    return Job(prompts=prompts, requests=requests, tokenizer=tokenizer, pad=end_ids[0] if end_ids else NO_END_ID)


def tokenizer_directory(engine_dir: Path, tokenizer_dir: Path | None) -> Path:
    """The given directory, or the engine's own, into which the build copies the tokenizer."""
    if tokenizer_dir is None:
        return engine_dir
    if not tokenizer_dir.is_dir():
        raise UsageError(f"--tokenizer_dir {tokenizer_dir} is not a directory.")
    return tokenizer_dir


def _load_tokenizer(options: RunOptions, prompts: list[Prompt], directory: Path) -> Tokenizer | None:
    """None where prompts are token ids and there is no tokenizer: the outputs then carry ids and no text."""
    needs_text = bool(options.stop_words or options.bad_words) or any(prompt.token_ids is None for prompt in prompts)
    if not needs_text and not (directory / FILES[0]).exists():
        logger.warning("There is no %s in %s: the outputs hold token ids and no text.", FILES[0], directory)
        return None
    return Tokenizer(directory)


def detokenizer_of(tokenizer: Tokenizer | None) -> Callable[[], Detokenizer | None]:
    """What makes a detokenizer for each sequence; without a tokenizer there is no text."""
    if tokenizer is None:
        return lambda: None
    return partial(Detokenizer, tokenizer.decode, settled_ids(tokenizer))


def _write_rows(options: RunOptions, completions: list[Completion], pad: int) -> None:
    rows = padded_rows(completions, pad)
    if options.output_npy is not None:
        write_npy(options.output_npy, rows, options.num_return_sequences)
    if options.output_csv is not None:
        write_csv(options.output_csv, rows)


def _output(completion: Completion) -> Output:
    return Output(
        completion.text, list(completion.token_ids), len(completion.prompt), completion.finish_reason, completion.logprobs
    )
