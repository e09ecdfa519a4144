"""TensorRT-LLM's ``ModelRunnerCpp`` behind what a run needs of it. The library is imported when an engine is opened.

Calls and defaults are those of TensorRT-LLM's own ``examples/run.py`` of 1.0 to 1.2; what a call gives back is described in
``tensorrt_llm/runtime/model_runner_cpp.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arctic_trt.engine.tensorrt_llm.versions import installed_versions
from arctic_trt.errors import ArcticTrtError

KV_CACHE_FRACTION = 0.9
"""Of the GPU memory that is free once the engine is loaded; the default of ``examples/run.py``."""
NO_END = -1
STDOUT, STDERR = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """Settings of the C++ runtime, by the names of ``examples/run.py``; None keeps TensorRT-LLM's default."""

    kv_cache_free_gpu_memory_fraction: float | None = None
    max_tokens_in_paged_kv_cache: int | None = None
    kv_cache_enable_block_reuse: bool = False
    enable_chunked_context: bool = False
    gpu_weights_percent: float | None = None
    cuda_graph_mode: bool = False
    use_gpu_direct_storage: bool = False
    no_memory_check: bool = False

    def given(self) -> list[str]:
        """The settings that differ from their defaults."""
        default = RuntimeOptions()
        return [name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(default, name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The largest batch of a run; the runtime allocates for it."""

    max_batch_size: int
    max_input_len: int
    max_output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How one batch is decoded, ``num_return_sequences`` times each prompt.

    ``stop_ids`` are sequences of ids that end an output, ``bad_ids`` such that never appear, for every prompt of the batch.
    """

    max_new_tokens: int
    end_id: int
    stop_ids: tuple[tuple[int, ...], ...]
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    random_seed: int
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bad_ids: tuple[tuple[int, ...], ...] = ()
    num_return_sequences: int = 1


class TrtLlmSession:
    """One rank of a TensorRT engine. All ranks open it together; rank 0 alone generates."""

    def __init__(self, engine_dir: Path, rank: int, shape: Shape, options: RuntimeOptions) -> None:
        keep_stdout()
        weights = options.gpu_weights_percent
        fraction = options.kv_cache_free_gpu_memory_fraction
        with redirect_stdout(sys.stderr), failing_as_ours(f"load rank {rank} of {engine_dir}"):
            from tensorrt_llm.runtime import ModelRunnerCpp

            self._runner: Any = ModelRunnerCpp.from_dir(
                engine_dir=str(engine_dir),
                rank=rank,
                max_batch_size=shape.max_batch_size,
                max_input_len=shape.max_input_len,
                max_output_len=shape.max_output_len,
                max_beam_width=1,
                kv_cache_free_gpu_memory_fraction=KV_CACHE_FRACTION if fraction is None else fraction,
                max_tokens_in_paged_kv_cache=options.max_tokens_in_paged_kv_cache,
                kv_cache_enable_block_reuse=options.kv_cache_enable_block_reuse,
                enable_chunked_context=options.enable_chunked_context,
                gpu_weights_percent=1.0 if weights is None else weights,
                enable_context_fmha_fp32_acc=False,
                cuda_graph_mode=options.cuda_graph_mode,
                use_gpu_direct_storage=options.use_gpu_direct_storage,
            )

    def generate(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[list[int]]:
        """Generated ids of each prompt's sequences, those of the first prompt first."""
        return _new_ids(self._generate(prompts, decoding, streaming=False), prompts)

    def generate_one(self, prompt: Sequence[int], decoding: Decoding) -> tuple[list[list[int]], Tensor]:
        """Generated ids of a prompt's sequences, and its logits, float32 [T, V] with V padded, from an engine that gathers them.

        One prompt at a time, because TensorRT-LLM cuts the logits of a batch at wrong rows where prompts differ in length.
        """
        outputs = self._generate([prompt], decoding, streaming=False)
        return _new_ids(outputs, [prompt]), outputs["context_logits"][0].float().cpu()

    def stream(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> Iterator[list[list[int]]]:
        """Generated ids of each prompt's sequences so far, again and again until all are done.

        Not for an engine that gathers logits: TensorRT-LLM asserts that every piece of the stream carries them.
        """
        pieces = iter(self._generate(prompts, decoding, streaming=True))
        while True:
            with redirect_stdout(sys.stderr), failing_as_ours("generate"):
                outputs = next(pieces, None)
            if outputs is None:
                return
            yield _new_ids(outputs, prompts)

    def _generate(self, prompts: Sequence[Sequence[int]], decoding: Decoding, *, streaming: bool) -> Any:
        samples = decoding.num_return_sequences
        counting = decoding.presence_penalty or decoding.frequency_penalty
        longest = {} if self.counts_prompt or not counting else {"prompt_ignore_length": max(map(len, prompts))}
        with torch.no_grad(), redirect_stdout(sys.stderr), failing_as_ours("generate"):
            return self._runner.generate(
                batch_input_ids=[torch.tensor(prompt, dtype=torch.int32) for prompt in prompts],
                max_new_tokens=decoding.max_new_tokens,
                end_id=decoding.end_id,
                pad_id=decoding.end_id,
                temperature=decoding.temperature,
                top_k=decoding.top_k,
                top_p=decoding.top_p,
                repetition_penalty=decoding.repetition_penalty,
                random_seed=decoding.random_seed,
                min_p=decoding.min_p,
                presence_penalty=decoding.presence_penalty,
                frequency_penalty=decoding.frequency_penalty,
                num_beams=1,
                num_return_sequences=None if samples == 1 else samples,
                stop_words_list=_for_each(prompts, decoding.stop_ids),
                bad_words_list=_for_each(prompts, decoding.bad_ids),
                streaming=streaming,
                output_sequence_lengths=True,
                return_dict=True,
                **longest,
            )

    @property
    def gathers_logits(self) -> bool:
        """Whether :meth:`generate_one` is possible, and :meth:`stream` is not."""
        return bool(self._runner.gather_context_logits)

    @property
    def counts_prompt(self) -> bool:
        """Whether presence and frequency penalties cannot leave out the prompt, which ``prompt_ignore_length`` does since 1.2."""
        versions = installed_versions()
        return versions is None or versions.release < (1, 2)

    def close(self) -> None:
        """Let go of the engine; on ranks other than 0 this returns when rank 0's executor has ended."""
        self._runner = None


@contextmanager
def failing_as_ours(task: str) -> Iterator[None]:
    """Turn what TensorRT-LLM raises, from Python or from C++, into one sentence; its own text has a stack of C++ frames."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise ArcticTrtError(f"TensorRT-LLM cannot {task}: {_first_line(error)}.", "-v shows the whole message.") from error


def keep_stdout() -> None:
    """Give the process's stdout to this package alone: what libraries print to it, from whichever thread, goes to stderr.

    TensorRT-LLM announces its version there when it is imported and logs there while it runs; with ``--json`` stdout carries
    one object and nothing else.
    """
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return  # stdout is no file, as in a test
    if descriptor == STDOUT:
        sys.stdout.flush()
        sys.stdout = os.fdopen(os.dup(STDOUT), "w", buffering=1, encoding=sys.stdout.encoding)
        os.dup2(STDERR, STDOUT)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _new_ids(outputs: dict[str, Tensor], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What follows the prompts in ``output_ids`` [batch, sequences, longest], by ``sequence_lengths`` [batch, sequences]."""
    ids, lengths = outputs["output_ids"].cpu(), outputs["sequence_lengths"].cpu()
    return [
        ids[row, number, len(prompt) : int(lengths[row, number])].tolist()
        for row, prompt in enumerate(prompts)
        for number in range(ids.shape[1])
    ]


def _for_each(prompts: Sequence[object], words: Sequence[Sequence[int]]) -> list[list[list[int]]] | None:
    return [[list(ids) for ids in words] for _ in prompts] if words else None
