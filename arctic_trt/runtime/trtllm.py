"""A run on a TensorRT engine: the same requests, the same pieces of text, the same completions as from the torch backend.

TensorRT-LLM batches, schedules and samples; what it does not know is done here, token by token as it hands them out: text, stop
words that begin in the middle of a token, several end tokens, and why a sequence ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from arctic_trt.engine.backends import HOW_TO_GET
from arctic_trt.engine.tensorrt_llm.checks import (
    EngineFacts,
    check_gpus,
    check_host_memory,
    check_options,
    check_versions,
    read_engine_facts,
)
from arctic_trt.engine.tensorrt_llm.session import NO_END, Decoding, RuntimeOptions, Shape, TrtLlmSession
from arctic_trt.engine.tensorrt_llm.versions import installed_versions
from arctic_trt.errors import RefusedError
from arctic_trt.machine import available_memory, query_gpus
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.communicator import Communicator
from arctic_trt.runtime.completion import Completion, Listeners
from arctic_trt.runtime.detokenizer import Detokenizer, StopWords, Writer
from arctic_trt.runtime.requests import Request, word_ids
from arctic_trt.runtime.sampler import Sampling

MAX_TOP_K = 1024
logger = logging.getLogger(__name__)


class Session(Protocol):
    """What :class:`TrtLlmSession` does on rank 0."""

    @property
    def gathers_logits(self) -> bool: ...

    @property
    def counts_prompt(self) -> bool: ...

    def generate(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[list[int]]: ...

    def generate_one(self, prompt: Sequence[int], decoding: Decoding) -> tuple[list[list[int]], Tensor]: ...

    def stream(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> Iterator[list[list[int]]]: ...


@dataclass(slots=True)
class Tail:
    """One sequence after its prompt: the tokens that count, and why it ended."""

    request: Request
    writer: Writer
    token_ids: list[int] = field(default_factory=list)
    received: int = 0
    reason: str | None = None

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take what is new in ``token_ids``, all that TensorRT-LLM has generated so far; the rest is over after an end."""
        for token in token_ids[self.received :]:
            if self.reason is None:
                self.token_ids.append(token)
                if self.writer.push(token) or token in self.request.end_ids:
                    self.reason = "stop"
        self.received = max(self.received, len(token_ids))

    def complete(self, decoding: Decoding) -> Completion:
        """The finished sequence.

        TensorRT-LLM does not hand out the end token: a sequence that ended early, without a stop word, ended with it.
        """
        if self.reason is None and len(self.token_ids) < self.request.max_new_tokens:
            self.reason = "stop"
            by_word = any(tuple(self.token_ids[-len(word) :]) == word for word in decoding.stop_ids)
            if decoding.end_id != NO_END and not by_word:
                end_id = decoding.end_id
                self.token_ids.append(end_id)
                self.writer.push(end_id)
        stopped = self.writer.flush()
        return Completion(
            prompt=self.request.prompt,
            token_ids=tuple(self.token_ids),
            text=self.writer.text,
            finish_reason="stop" if stopped else self.reason or "length",
        )


def check_engine(
    engine_dir: Path, comm: Communicator, local_ranks: int, options: RuntimeOptions, *, prompt_logits: bool
) -> EngineFacts:
    """Everything that can be known before loading; raises :class:`RefusedError` or :class:`UsageError` saying what to do."""
    versions = installed_versions()
    if versions is None:
        raise RefusedError(f"{engine_dir} is a TensorRT-LLM engine, but tensorrt_llm is not installed.", HOW_TO_GET)
    engine = read_engine_facts(engine_dir, comm.world_size)
    check_options(engine, options, prompt_logits=prompt_logits)
    for doubt in check_versions(engine, versions) if comm.rank == 0 else ():
        logger.warning(doubt)
    check_gpus(engine, query_gpus(), local_ranks)
    check_host_memory(engine, available_memory(), local_ranks, options)
    return engine


def open_session(
    engine_dir: Path, comm: Communicator, requests: Sequence[Request] | None, max_batch_size: int, options: RuntimeOptions
) -> TrtLlmSession:
    """Load this rank, all ranks together; ``requests`` are known to rank 0 alone, and their sizes to all after this."""
    sizes = None
    if requests is not None:
        longest = max(len(request.prompt) for request in requests)
        sizes = min(max_batch_size, len(requests)), longest, max(request.max_new_tokens for request in requests)
    batch, longest, new_tokens = comm.gather_all(sizes)[0]
    shape = Shape(max_batch_size=batch, max_input_len=longest, max_output_len=new_tokens)
    return TrtLlmSession(engine_dir, comm.rank, shape, options)


def generate_with_trtllm(
    session: Session,
    requests: Sequence[Request],
    max_batch_size: int,
    *,
    pad: int,
    tokenizer: Tokenizer | None,
    detokenizer: Callable[[], Detokenizer | None],
    listeners: Listeners,
    streaming: bool,
    num_return_sequences: int = 1,
) -> list[Completion]:
    """Complete ``requests``, at most ``max_batch_size`` at a time; ``pad`` is the id that ends a sequence, or :data:`NO_END`.

    Those of a prompt, ``num_return_sequences``, follow each other. Stop words are given to TensorRT-LLM to spare it tokens that
    would be thrown away; what decides is the text, because a word may be cut into tokens in other ways.
    """
    tails = [
        Tail(request, Writer(request.index, listeners.on_piece, detokenizer(), StopWords(request.stop_words)))
        for request in requests
    ]
    first = requests[0]  # what a command line asks for is the same for all prompts
    _warn_of_differences(first.sampling, session)
    decoding = plan_decoding(first, pad, word_ids(first.stop_words, tokenizer), num_return_sequences)
    size = max(1, max_batch_size // num_return_sequences) * num_return_sequences
    for begin in range(0, len(tails), size):
        batch = tails[begin : begin + size]
        prompts = [tail.request.prompt for tail in batch[::num_return_sequences]]
        if session.gathers_logits:
            _one_by_one(session, batch, decoding, listeners)
        elif streaming:
            _follow_stream(session.stream(prompts, decoding), batch)
        else:
            _take(batch, session.generate(prompts, decoding))
    return [tail.complete(decoding) for tail in tails]


def _warn_of_differences(sampling: Sampling, session: Session) -> None:
    if (sampling.top_k or 0) > MAX_TOP_K:
        logger.warning("--top_k %d: TensorRT-LLM chooses among %d at most.", sampling.top_k, MAX_TOP_K)
    if session.counts_prompt and (sampling.presence_penalty or sampling.frequency_penalty):
        logger.warning(
            "--presence_penalty and --frequency_penalty: TensorRT-LLM before 1.2 counts the prompt's tokens with the output's."
        )


def _follow_stream(stream: Iterable[list[list[int]]], batch: Sequence[Tail]) -> None:
    for token_ids in stream:
        _take(batch, token_ids)


def _take(batch: Sequence[Tail], token_ids: Sequence[Sequence[int]]) -> None:
    for tail, ids in zip(batch, token_ids, strict=True):
        tail.extend(ids)


def _one_by_one(session: Session, batch: Sequence[Tail], decoding: Decoding, listeners: Listeners) -> None:
    samples = decoding.num_return_sequences
    for begin in range(0, len(batch), samples):
        tails = batch[begin : begin + samples]
        request = tails[0].request
        token_ids, logits_TV = session.generate_one(request.prompt, decoding)
        _take(tails, token_ids)
        if request.prompt_logits:
            listeners.on_prompt_logits(request.index, 0, logits_TV)


def plan_decoding(request: Request, pad: int, stop_ids: Sequence[tuple[int, ...]], num_return_sequences: int = 1) -> Decoding:
    """How TensorRT-LLM decodes ``request`` and those like it; it knows one end token, the others become stop words."""
    others = tuple((token,) for token in sorted(request.end_ids) if token != pad)
    sampling = request.sampling
    temperature, top_k, top_p = plan_choice(sampling)
    return Decoding(
        max_new_tokens=request.max_new_tokens,
        end_id=pad,
        stop_ids=(*others, *stop_ids),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=sampling.repetition_penalty,
        random_seed=sampling.seed,
        min_p=0.0 if sampling.greedy else sampling.min_p or 0.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        bad_ids=request.bad_words,
        num_return_sequences=num_return_sequences,
    )


def plan_choice(sampling: Sampling) -> tuple[float, int, float]:
    """(temperature, top_k, top_p) in TensorRT-LLM's terms.

    There 0 switches a limit off, and both off means greedy, so that drawing from all tokens is a nucleus of everything.
    """
    if sampling.greedy:
        return 1.0, 1, 0.0
    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return temperature, 0, 1.0
    return temperature, sampling.top_k or 0, sampling.top_p or 0.0
