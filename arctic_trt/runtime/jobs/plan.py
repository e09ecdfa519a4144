"""From a line to requests: the line's parameters over the command line's, checked against the engine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arctic_trt.checkpoint.digests import DIGESTS
from arctic_trt.engine.config import BuildConfig
from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import FILES, Tokenizer
from arctic_trt.runtime.inputs import tokenize
from arctic_trt.runtime.jobs.input_file import Shard
from arctic_trt.runtime.jobs.lines import INVALID_REQUEST, MAX_CHOICES, Line, LineError, texts
from arctic_trt.runtime.requests import Request, plan_requests, word_ids
from arctic_trt.runtime.sampler import plan_sampling

INDICES = 2**31
"""Requests are named by int32 between ranks; no two of one name are ever under way together."""
FIELD_OF_FLAG = {"random_seed": "seed", "max_output_len": "max_tokens"}
ENGINE_FLAGS = ("max_input_len", "max_seq_len", "max_batch_size", "tokenizer_dir", "kv_cache_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What the command line says for lines that do not; ``sampling`` holds arguments of :func:`plan_sampling`."""

    max_output_len: int | None = None
    sampling: Mapping[str, float | None] = field(default_factory=dict)
    end_ids: tuple[int, ...] = ()
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    chat: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        given = {name: value for name, value in self.sampling.items() if value is not None}
        return {
            "max_output_len": self.max_output_len,
            "end_ids": list(self.end_ids),
            "stop_words": list(self.stop_words),
            "bad_words": list(self.bad_words),
            "chat": self.chat,
            **given,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Makes requests for one engine; without a tokenizer only of token ids."""

    limits: BuildConfig
    vocab_size: int
    tokenizer: Tokenizer | None
    defaults: Defaults

    def requests(self, line: Line) -> list[Request]:
        """A request for each of the line's choices; raises :class:`LineError` for what the engine cannot do."""
        try:
            return self._requests(line)
        except UsageError as error:
            raise LineError(INVALID_REQUEST, in_fields(str(error))) from None

    def _requests(self, line: Line) -> list[Request]:
        defaults, body = self.defaults, line.body
        prompt = tokenize(line.prompt, self.tokenizer, chat=defaults.chat)
        stop_words = defaults.stop_words if body.stop is None else texts(body.stop)
        bad_words = defaults.bad_words if body.bad_words is None else texts(body.bad_words)
        if (stop_words or bad_words) and self.tokenizer is None:
            raise UsageError(f"{'stop' if stop_words else 'bad_words'} needs a tokenizer.", "Give --tokenizer_dir.")
        (request,) = plan_requests(
            [prompt],
            self.limits,
            self.vocab_size,
            max_new_tokens=line.max_tokens or defaults.max_output_len or max(1, self.limits.max_seq_len - len(prompt)),
            sampling=plan_sampling(**{**defaults.sampling, **line.sampling}),  # type: ignore[arg-type]
            end_ids=frozenset(defaults.end_ids),
            stop_words=stop_words,
            bad_words=word_ids(bad_words, self.tokenizer),
            logprobs=line.logprobs,
        )
        first = (line.number - 1) * MAX_CHOICES
        return [
            # a seed of the line's own promises the same results wherever the line stands
            replace(request, index=(first + choice) % INDICES, stream=None if body.seed is None else choice)
            for choice in range(body.n)
        ]


def in_fields(message: str) -> str:
    """An error that names flags and a prompt's number, in the names that a line has for them."""

    def field_of(match: re.Match[str]) -> str:
        flag = match[1]
        return match[0] if flag in ENGINE_FLAGS else FIELD_OF_FLAG.get(flag, flag)

    return re.sub(r"--(\w+)", field_of, re.sub(r"([Pp])rompt \d+ ", _the_prompt, message))


def _the_prompt(match: re.Match[str]) -> str:
    return "The prompt " if match[1] == "P" else "the prompt "


def job_settings(
    engine_dir: Path, engine: Mapping[str, Any], tokenizer_dir: Path, defaults: Defaults, shard: Shard
) -> dict[str, Any]:
    """Everything but the input that the results depend on, as JSON has it.

    The engine counts by its configuration and its digests of tensors, the tokenizer by its files; where they lie is left out.
    """
    record = engine_dir / DIGESTS
    tokenizer_files = [path for path in (tokenizer_dir / name for name in FILES) if path.exists()]
    return {
        "engine": _digest(json.dumps(engine, sort_keys=True).encode(), record.read_bytes() if record.exists() else b""),
        "tokenizer": _digest(*(path.read_bytes() for path in tokenizer_files)),
        "shard": str(shard),
        **defaults.as_dict(),
    }


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()
