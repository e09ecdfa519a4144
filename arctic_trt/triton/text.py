"""The models around the engine: text to token ids before it, token ids to text behind it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.inputs import Prompt, is_message, tokenize
from arctic_trt.runtime.jobs.logprobs import names_of
from arctic_trt.runtime.service.text import chunk_text
from arctic_trt.triton.tensors import IDS, LENGTHS, MESSAGES, PROMPTS, TEXT, TEXT_OUTPUT, TOP, Array, Values

WITHOUT_TORCH = {"USE_TORCH": "0", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
"""For transformers: tokenizers need no torch, which would take most of a stub's start and memory."""


class Texts:
    """Both ways, by the tokenizer in ``tokenizer_dir``, for an engine's ``max_input_len``; both are parameters of the model."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        for name, value in WITHOUT_TORCH.items():
            os.environ.setdefault(name, value)
        self._tokenizer = Tokenizer(Path(settings["tokenizer_dir"]))
        self._name_of = names_of(self._tokenizer)
        self._max_input_len = int(settings["max_input_len"])
        self._longest = max(map(len, self._tokenizer.hf.get_vocab()))

    def prompt_ids(self, values: Values) -> list[int]:
        """The token ids that a request's prompt is, in whichever form; raises :class:`UsageError`."""
        prompt = plan_prompt(values)
        self._check_length(prompt)
        return tokenize(prompt, self._tokenizer, chat=False)

    def _check_length(self, prompt: Prompt) -> None:
        """Before tokenizing, which takes a minute for what a client sends in a second."""
        texts = [turn["content"] for turn in prompt.messages or ()] + [prompt.text or ""]
        characters, most = sum(map(len, texts)), self._max_input_len * self._longest
        if characters > most:
            raise UsageError(
                f"{prompt.where} has {characters} characters, more than {most}, the most that the engine's max_input_len of "
                f"{self._max_input_len} tokens may be.",
                "Shorten it.",
            )

    def outputs(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The text of a response of ``arctic``, and its likeliest tokens by name."""
        rows = zip(
            arrays["output_ids"][0], arrays["sequence_length"][0], arrays["trim"][0], arrays[TOP.name].reshape(-1), strict=True
        )
        context, prompt = (arrays[name][0].tolist() for name in ("context_ids", "prompt_ids"))
        found, tops = [], []
        for ids, length, trim, top in rows:
            text = chunk_text(self._tokenizer.decode, context, [*prompt, *ids[:length].tolist()], int(trim))
            found.append(text.encode())
            tops.append(self._named(top))
        # without a dimension for the batch, as TensorRT-LLM's clients expect of this one
        return {TEXT_OUTPUT.name: np.array(found, np.object_), TOP.name: np.array([tops], np.object_)}

    def _named(self, top: bytes) -> bytes:
        if not top:
            return top
        items = [
            {**self._item(token, logprob), "top": [self._item(*each) for each in best]}
            for token, logprob, best in json.loads(top)
        ]
        return json.dumps(items).encode()

    def _item(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": token, "text": self._name_of(token), "logprob": logprob}


def plan_prompt(values: Values) -> Prompt:
    """The prompt that a request has in exactly one of its forms; raises :class:`UsageError`."""
    given = [tensor.name for tensor in PROMPTS if tensor.name in values]
    if len(given) != 1:
        raise UsageError(
            f"The request has {' and '.join(given) or 'no prompt'}, expected exactly one of {TEXT}, {MESSAGES} and {IDS}."
        )
    (name,) = given
    if name == TEXT:
        return Prompt(where=name, text=values[name])
    if name == IDS:
        return Prompt(where=name, token_ids=tuple(values[name]))
    return Prompt(where=name, messages=_messages(values[name]))


def prompt_arrays(ids: list[int]) -> dict[str, Array]:
    """A prompt as ``arctic`` takes it."""
    return {IDS: np.array([ids], np.int32), LENGTHS.name: np.array([[len(ids)]], np.int32)}


def _messages(text: str) -> tuple[dict[str, str], ...]:
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise UsageError(f"messages is not JSON ({error}).", "Expected a list of {role, content}.") from None
    good = isinstance(messages, list) and messages and all(map(is_message, messages))
    if not good:
        raise UsageError("messages is not a list of objects with the texts role and content.")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in messages)
