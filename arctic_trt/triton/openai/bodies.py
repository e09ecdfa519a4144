"""What clients ask for, checked where it comes in: what is unknown is an error, and what cannot be done too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from arctic_trt.runtime.jobs.lines import (
    EXPECTED,
    MAX_CHOICES,
    Asked,
    ChatMessage,
    LineError,
    Strict,
    TextPart,
    decode_line,
    refuse_half_characters,
    sentence,
    texts,
)
from arctic_trt.triton.openai.errors import ApiError

BODY = "The request's body"


class StreamOptions(Strict):
    """``continuous_usage_stats`` gives the usage so far with every chunk, as other servers do that have it."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class TextFormat(Strict):
    """The only format of answers."""

    type: Literal["text"]


class _Served(Asked):
    """What both interfaces have beside a batch job's parameters; many have one value only, which changes nothing."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> _Served:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream true")
        return self


class ChatBody(_Served):
    """``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None


class CompletionBody(_Served):
    """``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: int | None = None
    echo: Literal[False] | None = None

    @model_validator(mode="after")
    def _check_choices(self) -> CompletionBody:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not n, expected all choices to be asked for")
        if not self.prompt:
            raise ValueError("prompt is empty, expected at least one character or token")
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise ValueError(f"{len(self.prompts)} prompts with n {self.n} exceed {MAX_CHOICES} choices")
        return self

    @property
    def prompts(self) -> tuple[str | list[int], ...]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        several = [each for each in self.prompt if not isinstance(each, int)]
        return tuple(several) or ([each for each in self.prompt if isinstance(each, int)],)


WORDING = {
    **EXPECTED,
    "prompt": "a text, token ids, or a list of either",
    "stream": "true or false",
    "echo": "false, the only value that is offered",
    "store": "false, the only value that is offered",
    "logit_bias": "no entries: it is not offered",
    "tools": "an empty list: tools are not offered",
    "type": "'text', the only one that is offered",
}
FIELDS = {
    *ChatBody.model_fields,
    *CompletionBody.model_fields,
    *StreamOptions.model_fields,
    *ChatMessage.model_fields,
    *TextPart.model_fields,
}
AnyBody = TypeVar("AnyBody", bound=_Served)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request for ``n`` choices of each of ``prompts``, which are fields as :meth:`Engine.generate` takes them."""

    chat: bool
    model: str | None
    prompts: tuple[Mapping[str, Any], ...]
    n: int
    stream: bool
    usage_at_end: bool
    usage_so_far: bool


ParseAsk = Callable[[bytes], Ask]


def parse_chat(data: bytes) -> Ask:
    """The body of a chat; raises :class:`ApiError`."""
    body = _parse(data, ChatBody)
    # a developer's message is what used to be called a system's
    role = {"developer": "system"}
    messages = [{"role": role.get(turn.role, turn.role), "content": turn.text} for turn in body.messages]
    return _ask(body, [{"messages": messages}], chat=True)


def parse_completion(data: bytes) -> Ask:
    """The body of a completion; raises :class:`ApiError`."""
    body = _parse(data, CompletionBody)
    return _ask(body, [{"prompt": prompt} for prompt in body.prompts], chat=False)


def _parse(data: bytes, kind: type[AnyBody]) -> AnyBody:
    try:
        value = decode_line(data, BODY)
        refuse_half_characters(value, BODY)
        return kind.model_validate(_without_nulls(value))
    except LineError as error:
        raise ApiError(400, error.message) from None
    except ValidationError as error:
        place = error.errors(include_url=False)[0]["loc"]
        raise ApiError(400, sentence(error, FIELDS, WORDING), param=str(place[0]) if place else None) from None


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """Clients send null for what they do not ask for, also in the messages that they got as answers."""
    given = {name: each for name, each in value.items() if each is not None}
    messages = given.get("messages")
    if isinstance(messages, list):
        given["messages"] = [_without_nulls(each) if isinstance(each, dict) else each for each in messages]
    return given


def _ask(body: _Served, prompts: list[dict[str, Any]], *, chat: bool) -> Ask:
    fields: dict[str, Any] = {**body.sampling, "n": body.n, "stream": body.stream}
    optional = {
        "max_tokens": body.max_completion_tokens or body.max_tokens,
        "stop": list(texts(body.stop or [])) or None,
        "bad_words": list(texts(body.bad_words or [])) or None,
        "logprobs": body.num_logprobs,
        "ignore_eos": body.ignore_eos or None,
    }
    fields |= {name: value for name, value in optional.items() if value is not None}
    options = body.stream_options or StreamOptions()
    return Ask(
        chat=chat,
        model=body.model,
        prompts=tuple({**prompt, **fields} for prompt in prompts),
        n=body.n,
        stream=body.stream,
        usage_at_end=options.include_usage,
        usage_so_far=options.continuous_usage_stats,
    )
