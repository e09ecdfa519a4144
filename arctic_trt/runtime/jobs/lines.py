"""One line of a batch job, in OpenAI's batch form or flat, checked where it comes in: what is unknown is an error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arctic_trt.runtime.inputs import Prompt

INVALID_JSON, INVALID_REQUEST, DUPLICATE = "invalid_json", "invalid_request", "duplicate_custom_id"
MAX_CHOICES = 128
MAX_LOGPROBS = 20
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
)
"""Fields that :func:`plan_sampling` takes."""
SHOWN = 40
EXPECTED = {
    "prompt": "a text or a list of token ids",
    "content": "a text or a list of text parts",
    "stop": "a text or a list of texts",
    "bad_words": "a text or a list of texts",
    "logprobs": f"true, false or a number up to {MAX_LOGPROBS}",
    "stream": "false: results go to the output file",
}


class LineError(Exception):
    """A line that becomes an error line, with one of the codes above."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Strict(BaseModel):
    """No unknown fields, and no number that is given as a text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """A part of a message; there are no others."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn of a conversation."""

    role: str
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Asked(Strict):
    """How to answer, in the names of OpenAI's completions and chat completions; None is for the default."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    bad_words: str | list[str] | None = None
    logprobs: bool | Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    model: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Asked:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ, expected one of them")
        if self.top_logprobs is not None and self.logprobs is not True:
            raise ValueError("top_logprobs goes with logprobs true")
        return self

    @property
    def sampling(self) -> dict[str, float]:
        """The fields of :data:`SAMPLING` that are given."""
        return {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to name beside each token's own logarithm of its probability; None for neither."""
        if isinstance(self.logprobs, bool):
            return (self.top_logprobs or 0) if self.logprobs else None
        return self.logprobs


class Body(Asked):
    """A line's request."""

    prompt: str | list[int] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    stream: Literal[False] | None = None

    @model_validator(mode="after")
    def _check(self) -> Body:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected exactly one of prompt and messages")
        return self


class Envelope(Strict):
    """A line in OpenAI's batch form."""

    custom_id: str | None = None
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: Body

    @model_validator(mode="after")
    def _check(self) -> Envelope:
        if (self.url == CHAT) != (self.body.messages is not None):
            raise ValueError(f"{self.url} takes {'messages' if self.url == CHAT else 'a prompt'}")
        return self


class Flat(Body):
    """A line whose parameters stand beside its ``custom_id``."""

    custom_id: str | None = None


FIELDS = {*Flat.model_fields, *Envelope.model_fields, *ChatMessage.model_fields, *TextPart.model_fields}


@dataclass(frozen=True, slots=True)
class Line:
    """A request as it was given; ``number`` is the line's place in the file, from 1."""

    number: int
    custom_id: str
    body: Body

    @property
    def chat(self) -> bool:
        return self.body.messages is not None

    @property
    def prompt(self) -> Prompt:
        body, where = self.body, "The prompt"
        if body.messages is not None:
            return Prompt(where=where, messages=tuple({"role": turn.role, "content": turn.text} for turn in body.messages))
        return Prompt(where=where, text=body.prompt) if isinstance(body.prompt, str) else _ids(where, body.prompt or [])

    @property
    def max_tokens(self) -> int | None:
        return self.body.max_completion_tokens or self.body.max_tokens

    @property
    def sampling(self) -> dict[str, float]:
        return self.body.sampling

    @property
    def logprobs(self) -> int | None:
        return self.body.num_logprobs


def decode_line(data: bytes, what: str = "The line") -> dict[str, Any]:
    """The JSON object that ``data`` is; raises :class:`LineError`, which calls it ``what``."""
    try:
        value = json.loads(data.decode())
    except json.JSONDecodeError as error:
        raise LineError(INVALID_JSON, f"{what} is not JSON: {error.msg} at column {error.colno}.") from None
    except (ValueError, RecursionError) as error:
        raise LineError(INVALID_JSON, f"{what} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise LineError(INVALID_JSON, f"{what} is a {type(value).__name__}, expected a JSON object.")
    return value


def custom_id_of(value: Mapping[str, Any], number: int) -> str:
    """The line's own name if it gives a text as such, else one by its number."""
    given = value.get("custom_id")
    return given if isinstance(given, str) else f"line-{number}"


def parse_line(value: dict[str, Any], number: int) -> Line:
    """Check what :func:`decode_line` gave; raises :class:`LineError` naming the field, what was found and what was expected."""
    refuse_half_characters(value)
    try:
        body = Envelope.model_validate(value).body if "body" in value else Flat.model_validate(value)
    except ValidationError as error:
        raise LineError(INVALID_REQUEST, sentence(error, FIELDS, EXPECTED)) from None
    return Line(number, custom_id_of(value, number), body)


def refuse_half_characters(value: dict[str, Any], what: str = "The line") -> None:
    """Raise :class:`LineError` for half a character, which passes for JSON, but is no text."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise LineError(INVALID_REQUEST, f"{what} holds half a character, {error.object[error.start]!a}.") from None


def texts(given: str | list[str]) -> tuple[str, ...]:
    """A field that takes one text or several, without empty ones."""
    return tuple(text for text in ([given] if isinstance(given, str) else given) if text)


def _ids(where: str, ids: list[int]) -> Prompt:
    return Prompt(where=where, token_ids=tuple(ids))


def sentence(error: ValidationError, fields: Set[str], expected: Mapping[str, str]) -> str:
    """What the first problem is; of its place only indices and ``fields`` are named, ``expected`` has their types in words."""
    problem = error.errors(include_url=False)[0]
    path = [part for part in problem["loc"] if isinstance(part, int) or part in fields]
    field = ".".join(map(str, path))
    if problem["type"] == "extra_forbidden":
        return f"The parameter {problem['loc'][-1]!r} is not known."
    if problem["type"] == "missing":
        return f"{field} is missing."
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{field + ': ' if field else ''}{reason}."
    named = next((part for part in reversed(path) if isinstance(part, str)), "")
    wanted = f"expected {expected[named]}" if named in expected else reason[:1].lower() + reason[1:]
    shown = repr(problem["input"])
    return f"{field} {shown if len(shown) <= SHOWN else shown[:SHOWN] + '...'} is not valid, {wanted}."
