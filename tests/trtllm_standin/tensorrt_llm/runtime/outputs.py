"""What ``generate`` gives back. Source: ``_fill_output`` in ``tensorrt_llm/runtime/model_runner_cpp.py`` (1.0.0 to 1.2.1) and
``_prepare_outputs`` in ``tensorrt_llm/runtime/model_runner.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from tensorrt_llm.runtime.decoding import greedy_token
from torch import Tensor

PEAK = 8.0
"""The logit of the greedy token; the others have 0."""
LOG_PROB = -0.5
DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Asked:
    """What the caller wants besides the tokens; ``context_logits`` is the engine's decision."""

    return_dict: bool
    sequence_lengths: bool
    context_logits: bool
    generation_logits: bool
    log_probs: bool
    cum_log_probs: bool


def fill_outputs(
    runner: Any, prompts: list[list[int]], new: list[list[list[int]]], end_id: int | None, asked: Asked, *, streaming: bool
) -> Tensor | dict[str, Any]:
    """``output_ids`` [batch, sequences, max_seq_len] with the prompts in front and ``end_id`` behind, and what was asked for."""
    rows = [[prompt + sequence for sequence in row] for prompt, row in zip(prompts, new, strict=True)]
    padded: list[list[list[int | None]]] = [[[*ids, *[end_id] * (runner.max_seq_len - len(ids))] for ids in row] for row in rows]
    output_ids = torch.tensor(padded, dtype=torch.int32)
    if not asked.return_dict:
        return output_ids
    outputs: dict[str, Any] = {"output_ids": output_ids}
    if asked.sequence_lengths:
        outputs["sequence_lengths"] = torch.tensor([[len(ids) for ids in row] for row in rows], dtype=torch.int32)
    if asked.context_logits or asked.generation_logits:
        _refuse_what_hangs(runner)
    if asked.context_logits:
        outputs["context_logits"] = _context_logits(runner, prompts)
    if asked.generation_logits:
        outputs["generation_logits"] = _generation_logits(runner, prompts, new, streaming=streaming)
    longest = max(1, *(len(ids) for row in new for ids in row))
    if asked.log_probs:
        outputs["log_probs"] = torch.full((len(new), len(new[0]), longest), LOG_PROB)
    if asked.cum_log_probs:
        outputs["cum_log_probs"] = torch.tensor([[LOG_PROB * len(ids) for ids in row] for row in new])
    return outputs


def _refuse_what_hangs(runner: Any) -> None:
    """With pipeline parallelism the first rank waits for logits that no other rank sends; here it fails instead."""
    if runner.config.pretrained_config.mapping.pp_size > 1:
        raise RuntimeError("TensorRT-LLM would wait forever: logits with pipeline parallelism are received but never sent.")


def _context_logits(runner: Any, prompts: list[list[int]]) -> list[Tensor]:
    """One [prompt, vocab] tensor for each prompt, cut as TensorRT-LLM does: at the lengths, out of rows padded to the longest.

    So only prompts of the same length get their own logits.
    """
    longest = max(map(len, prompts))
    logits_BTV = torch.zeros((len(prompts), longest, runner.vocab_size_padded), dtype=_logits_dtype(runner))
    for row, prompt in enumerate(prompts):
        for position in range(len(prompt)):
            logits_BTV[row, position, greedy_token(prompt[: position + 1], runner.vocab_size)] = PEAK
    ends = torch.tensor([0, *map(len, prompts)]).cumsum(0).tolist()
    flat_RV = logits_BTV.flatten(end_dim=-2)
    return [flat_RV[begin:end] for begin, end in pairwise(ends)]


def _generation_logits(runner: Any, prompts: list[list[int]], new: list[list[list[int]]], *, streaming: bool) -> Tensor:
    """[batch, sequences, longest, vocab]; in a stream, the last token's [batch, 1, sequences, vocab]."""
    longest = max(1, *(len(ids) for row in new for ids in row))
    logits_BSTV = torch.zeros((len(new), len(new[0]), longest, runner.vocab_size_padded), dtype=_logits_dtype(runner))
    for row, sequences in enumerate(new):
        for number, ids in enumerate(sequences):
            for step in range(len(ids)):
                logits_BSTV[row, number, step, greedy_token(prompts[row] + ids[:step], runner.vocab_size)] = PEAK
    return logits_BSTV[:, :, -1:].transpose(1, 2) if streaming else logits_BSTV


def _logits_dtype(runner: Any) -> torch.dtype:
    return DTYPES.get(runner.config.pretrained_config.logits_dtype, torch.float32)
