"""Log probabilities in the two shapes that OpenAI's interfaces have for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

from arctic_trt.model.tokenizer import Tokenizer

NameOf = Callable[[Any], str]
BYTE = re.compile("<0x([0-9A-F]{2})>")
BYTES = "bytes:"
"""How OpenAI's interfaces spell a token that is no text: ``bytes:\\xe2``."""


class Scored(Protocol):
    """A token's logarithm of its probability beside the likeliest ones; tokens are what a :data:`NameOf` takes."""

    @property
    def token(self) -> Any: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> Sequence[tuple[Any, float]]: ...


def names_of(tokenizer: Tokenizer | None) -> NameOf:
    """A token's text with its leading space; without a tokenizer the id."""
    if tokenizer is None:
        return str

    def name_of(token: int) -> str:
        piece = str(tokenizer.hf.convert_ids_to_tokens(token))
        byte = BYTE.fullmatch(piece)
        return f"{BYTES}\\x{byte[1].lower()}" if byte else piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")

    return name_of


def text_logprobs(logprobs: Sequence[Scored], name_of: NameOf) -> dict[str, Any]:
    """For ``/v1/completions``: lists side by side; offsets count characters of the tokens' texts."""
    tokens = [name_of(each.token) for each in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [{name_of(token): logprob for token, logprob in each.top} for each in logprobs],
        "text_offset": [0, *accumulate(map(len, tokens))][:-1],
    }


def chat_logprobs(logprobs: Sequence[Scored], name_of: NameOf) -> dict[str, Any]:
    """For ``/v1/chat/completions``: an item a token."""

    def item(token: Any, logprob: float) -> dict[str, Any]:
        name = name_of(token)
        return {"token": name, "logprob": logprob, "bytes": _bytes_of(name)}

    content = [
        {**item(each.token, each.logprob), "top_logprobs": [item(token, logprob) for token, logprob in each.top]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


def _bytes_of(name: str) -> list[int]:
    if name.startswith(f"{BYTES}\\x"):
        return [int(name[-2:], 16)]
    return list(name.encode())
