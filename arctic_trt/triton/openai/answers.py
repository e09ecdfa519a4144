"""What clients get, in OpenAI's shapes: a whole answer, or the events of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from arctic_trt.runtime.jobs.logprobs import chat_logprobs, text_logprobs
from arctic_trt.triton.openai.bodies import Ask
from arctic_trt.triton.openai.engine import Chunk, NamedLogprobs

DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


@dataclass(slots=True)
class _Choice:
    """What a choice has so far."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[NamedLogprobs] | None = None
    finish_reason: str | None = None
    opened: bool = False
    offset: int = 0
    """Characters of the tokens whose log probabilities were sent."""


class Answer:
    """One answer while its chunks arrive; ``created`` is in seconds since 1970."""

    def __init__(self, ask: Ask, *, name: str, created: int, model: str) -> None:
        self._ask = ask
        self._head = {"id": name, "created": created, "model": model}
        self._choices = [_Choice() for _ in range(ask.n * len(ask.prompts))]
        self._prompt_tokens = [0] * len(ask.prompts)
        self._output_tokens = 0

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason for choice in self._choices)

    @property
    def usage(self) -> dict[str, int]:
        prompt, output = sum(self._prompt_tokens), self._output_tokens
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def add(self, prompt: int, chunk: Chunk) -> None:
        """Take a chunk of prompt number ``prompt`` into the whole."""
        choice = self._choices[self._count(prompt, chunk)]
        choice.texts.append(chunk.text)
        if chunk.logprobs is not None:
            choice.logprobs = choice.logprobs or []
            choice.logprobs.extend(chunk.logprobs)
        choice.finish_reason = chunk.finish_reason

    def whole(self) -> dict[str, Any]:
        """The answer, once it is complete."""
        kind = "chat.completion" if self._ask.chat else "text_completion"
        choices = []
        for index, choice in enumerate(self._choices):
            text, logprobs = "".join(choice.texts), self._shape(choice, choice.logprobs)
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._ask.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": choice.finish_reason})
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage}

    def events(self, prompt: int, chunk: Chunk) -> Iterator[bytes]:
        """The events that a chunk of prompt number ``prompt`` makes."""
        index = self._count(prompt, chunk)
        choice = self._choices[index]
        logprobs = self._shape(choice, chunk.logprobs)
        if self._ask.chat:
            if not choice.opened:
                choice.opened = True
                yield self._event(index, {"delta": {"role": "assistant", "content": "", "refusal": None}})
            if chunk.text or chunk.logprobs:
                yield self._event(index, {"delta": {"content": chunk.text}}, logprobs)
            if chunk.finish_reason:
                yield self._event(index, {"delta": {}}, finish_reason=chunk.finish_reason)
        else:
            yield self._event(index, {"text": chunk.text}, logprobs, chunk.finish_reason)
        choice.finish_reason = chunk.finish_reason

    def last_events(self) -> Iterator[bytes]:
        """The events at the end of a complete stream."""
        if self._ask.usage_at_end:
            yield event({**self._head, "object": self._stream_kind, "choices": [], "usage": self.usage})
        yield DONE

    @property
    def _stream_kind(self) -> str:
        return "chat.completion.chunk" if self._ask.chat else "text_completion"

    def _count(self, prompt: int, chunk: Chunk) -> int:
        self._prompt_tokens[prompt] = chunk.prompt_tokens
        self._output_tokens += chunk.num_tokens
        return prompt * self._ask.n + chunk.choice

    def _event(
        self, index: int, said: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> bytes:
        value = {
            **self._head,
            "object": self._stream_kind,
            "choices": [{"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}],
        }
        if self._ask.usage_so_far:
            value["usage"] = self.usage
        elif self._ask.usage_at_end:
            value["usage"] = None
        return event(value)

    def _shape(self, choice: _Choice, logprobs: Sequence[NamedLogprobs] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        if self._ask.chat:
            return chat_logprobs(logprobs, str)
        shaped = text_logprobs(logprobs, str)
        shaped["text_offset"] = [choice.offset + offset for offset in shaped["text_offset"]]
        choice.offset += sum(map(len, shaped["tokens"]))
        return shaped
