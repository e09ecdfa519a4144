"""What is asked of an engine: prompts as token ids, how to choose the next one, and when to stop; checked before any work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.sampler import Sampling

if TYPE_CHECKING:  # servers and their clients need no torch
    from arctic_trt.engine.config import BuildConfig

END_OF_TEXT = "</s>"
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt; ``index`` is its place among the prompts and names it everywhere.

    ``bad_words`` are sequences of ids that must not come up. With ``logprobs`` the log probabilities of the chosen tokens are
    wanted, and of as many of the likeliest; with ``prompt_logits`` the logits of the prompt's positions from ``logits_from`` on.
    ``stream`` says which random numbers of its seed it draws, those of its index if it is None.
    """

    index: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    end_ids: frozenset[int] = frozenset()
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logits: bool = False
    logits_from: int = 0
    stream: int | None = None

    @property
    def num_cached(self) -> int:
        """Positions that are ever in the KV cache; the last token generated is not."""
        return len(self.prompt) + self.max_new_tokens - 1


def plan_requests(
    prompts: Sequence[Sequence[int]],
    limits: BuildConfig,
    vocab_size: int,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    end_ids: frozenset[int] = frozenset(),
    stop_words: tuple[str, ...] = (),
    bad_words: tuple[tuple[int, ...], ...] = (),
    logprobs: int | None = None,
    num_return_sequences: int = 1,
    prompt_logits: bool = False,
) -> list[Request]:
    """Requests for each prompt, as many as ``num_return_sequences``, the first of them for the logits.

    Checks the prompts against the engine's limits; raises :class:`UsageError` naming the prompt or the flag.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max_output_len {max_new_tokens} is not a positive number.")
    if logprobs is not None and logprobs < 0:
        raise UsageError(f"--logprobs {logprobs} is out of range, expected 0 or more.")
    _check_samples(num_return_sequences, sampling)
    _check_bad_words(bad_words, vocab_size)
    if not prompts:
        raise UsageError("There is no prompt.", "Give --input_text, or an --input_file that is not empty.")
    for index, prompt in enumerate(prompts):
        _check_prompt(index, prompt, limits, vocab_size, max_new_tokens)
    return [
        Request(
            index=index * num_return_sequences + sample,
            prompt=tuple(prompt),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            end_ids=end_ids,
            stop_words=stop_words,
            bad_words=bad_words,
            logprobs=logprobs,
            prompt_logits=prompt_logits and sample == 0,
        )
        for index, prompt in enumerate(prompts)
        for sample in range(num_return_sequences)
    ]


def _check_samples(num_return_sequences: int, sampling: Sampling) -> None:
    if num_return_sequences < 1:
        raise UsageError(f"--num_return_sequences {num_return_sequences} is not a positive number.")
    if num_return_sequences > 1 and sampling.greedy:
        raise UsageError(
            f"--num_return_sequences {num_return_sequences} would give equal outputs, because nothing asks for randomness.",
            "Give --temperature, --top_k, --top_p or --min_p.",
        )


def _check_bad_words(bad_words: Sequence[Sequence[int]], vocab_size: int) -> None:
    for ids in bad_words:
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None or not ids:
            raise UsageError(f"--bad_words has the token ids {list(ids)}, expected at least one, from 0 to {vocab_size - 1}.")


def word_ids(words: Sequence[str], tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], ...]:
    """The ids of words, at the beginning of a word and within a line, without repetitions; none without a tokenizer.

    A word may be cut into tokens in other ways too.
    """
    if tokenizer is None:
        return ()
    found = []
    for word in words:
        apart, line = tokenizer.encode_bare(word), tokenizer.encode_bare("\n")
        within = tokenizer.encode_bare("\n" + word)
        found.append(tuple(apart))
        if within[: len(line)] == line:
            found.append(tuple(within[len(line) :]))
    return tuple(dict.fromkeys(ids for ids in found if ids))


def find_end_ids(given: int | None, tokenizer: Tokenizer | None, directory: Path | None) -> tuple[int, ...]:
    """Ids that end a sequence, the one used for padding first.

    ``--end_id`` alone if it was given (-1: none); otherwise the tokenizer's end token, those of ``generation_config.json`` in
    ``directory``, and ``</s>``, which an instruct model may still produce.
    """
    if given is not None:
        return (given,) if given >= 0 else ()
    found: list[int] = []
    if tokenizer is not None and tokenizer.hf.eos_token_id is not None:
        found.append(tokenizer.hf.eos_token_id)
    if directory is not None:
        found += _generation_end_ids(directory / GENERATION_CONFIG)
    if tokenizer is not None and END_OF_TEXT in tokenizer.hf.get_vocab():
        found.append(tokenizer.hf.convert_tokens_to_ids(END_OF_TEXT))
    return tuple(dict.fromkeys(found))


def _generation_end_ids(path: Path) -> list[int]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        value = raw.get("eos_token_id")
    except FileNotFoundError:
        return []
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{path} is not a JSON object ({error}).", "Restore it, or delete it.") from None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) for item in ids):
        raise UsageError(
            f"{path} has eos_token_id={value!r}, expected a token id or a list of them.", "Restore it, or delete it."
        )
    return ids


def check_vocabulary(index: int, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise :class:`UsageError` for an id that the engine does not have."""
    wrong = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise UsageError(
            f"Prompt {index} has token id {wrong}, expected 0 to {vocab_size - 1}.", "Is the tokenizer another model's?"
        )


def _check_prompt(index: int, prompt: Sequence[int], limits: BuildConfig, vocab_size: int, max_new_tokens: int) -> None:
    if not prompt:
        raise UsageError(f"Prompt {index} is empty.", "Give it at least one token.")
    check_vocabulary(index, prompt, vocab_size)
    if len(prompt) > limits.max_input_len:
        raise UsageError(
            f"Prompt {index} has {len(prompt)} tokens, the engine was built for --max_input_len {limits.max_input_len}.",
            "Shorten it, or build the engine with a larger one.",
        )
    if len(prompt) + max_new_tokens > limits.max_seq_len:
        raise UsageError(
            f"Prompt {index} has {len(prompt)} tokens, which with --max_output_len {max_new_tokens} exceeds the engine's "
            f"--max_seq_len {limits.max_seq_len}.",
            f"At most {max(0, limits.max_seq_len - len(prompt))} tokens of output fit.",
        )
