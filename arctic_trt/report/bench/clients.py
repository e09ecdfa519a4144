"""How servers are asked over HTTP: Triton's generate extension and OpenAI's completions, both as streams of events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any, Protocol
from urllib.parse import urlsplit

from arctic_trt.errors import UsageError
from arctic_trt.report.bench.workload import BenchPrompt

PATIENCE_S = 600.0
"""For a connection, and between two pieces of an answer: a queue may be long."""
DONE = "[DONE]"
SHOWN = 200
"""Characters of an error's body that are repeated."""


class ServerError(Exception):
    """An answer that is not the completion that was asked for; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One event of an answer: whether it carries output, and the number of tokens so far where the server says it."""

    is_output: bool
    tokens_so_far: int | None = None


class Client(Protocol):
    """One kind of server."""

    where: str
    """The address that is asked, for messages."""

    def stream(self, prompt: BenchPrompt, max_new_tokens: int) -> Iterator[Piece]:
        """Ask for a greedy completion.

        Raises :class:`ServerError` for an answer that is an error or breaks off, ``OSError`` and ``HTTPException`` for a
        connection that does.
        """


class TritonClient:
    """``POST /v2/models/MODEL/generate_stream`` of Triton, with the inputs of TensorRT-LLM's ensemble."""

    def __init__(self, url: str, model: str) -> None:
        self._address = _Address(url, f"/v2/models/{model}/generate_stream")
        self.where = self._address.url

    def stream(self, prompt: BenchPrompt, max_new_tokens: int) -> Iterator[Piece]:
        """An event is a token."""
        body = {"text_input": prompt.text, "max_tokens": max_new_tokens, "stream": True}
        for event in self._address.post(body):
            if "text_output" not in event:
                raise ServerError(f"{self.where} sent an event without text_output: {json.dumps(event)[:SHOWN]}.")
            yield Piece(is_output=True)


class OpenAiClient:
    """``POST /v1/completions``, with prompts as token ids.

    ``ignore_eos``, which vLLM, SGLang and TensorRT-LLM's server know, asks for all tokens; others stop where they like.
    """

    def __init__(self, url: str, model: str) -> None:
        path = "/completions" if urlsplit(url).path.rstrip("/").endswith("/v1") else "/v1/completions"
        self._address = _Address(url, path)
        self._model = model
        self.where = self._address.url

    def stream(self, prompt: BenchPrompt, max_new_tokens: int) -> Iterator[Piece]:
        """An event is a token unless the usage at the end says otherwise."""
        body = {
            "model": self._model,
            "prompt": prompt.token_ids,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for event in self._address.post(body, end=DONE):
            choices, usage = event.get("choices") or [{}], event.get("usage") or {}
            last = bool(choices[0].get("finish_reason"))
            yield Piece(bool(choices[0].get("text")) or ("text" in choices[0] and not last), usage.get("completion_tokens"))


class _Address:
    """Where requests go."""

    def __init__(self, url: str, path: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url} is not the address of a server.", "It looks like http://localhost:8000.")
        self._connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._place = parts.netloc.rpartition("@")[2]
        self._path = parts.path.rstrip("/") + path
        self.url = f"{parts.scheme}://{self._place}{self._path}"

    def post(self, body: dict[str, Any], *, end: str | None = None) -> Iterator[dict[str, Any]]:
        """The objects of a stream of events, until ``end`` or, without one, until the server closes it."""
        connection = self._connect(self._place, timeout=PATIENCE_S)
        try:
            connection.request("POST", self._path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            self._check(response)
            for data in parse_events(_lines(response)):
                if data == end:
                    return
                yield self._decode(data)
            if end is not None:
                raise ServerError(f"{self.url}: the stream broke off before {end}.")
        finally:
            connection.close()

    def _check(self, response: HTTPResponse) -> None:
        if response.status != 200:
            said = " ".join(response.read(10 * SHOWN).decode(errors="replace").split())[:SHOWN]
            raise ServerError(f"{self.url} answered {response.status} {response.reason}: {said or 'nothing'}.")

    def _decode(self, data: str) -> dict[str, Any]:
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise ServerError(f"{self.url} sent an event that is not a JSON object: {data[:SHOWN]}.")
        if event.get("error"):
            raise ServerError(f"{self.url} answered with an error: {json.dumps(event['error'])[:SHOWN]}.")
        return event


def _lines(response: HTTPResponse) -> Iterator[bytes]:
    """As its own ``readline`` gives them, which however takes a connection that breaks for the end of the stream."""
    rest = b""
    while received := response.read1():
        *whole, rest = (rest + received).split(b"\n")
        yield from whole
    if rest:
        yield rest


def parse_events(lines: Iterable[bytes]) -> Iterator[str]:
    """The data of each event of a stream of server-sent events.

    Raises :class:`ServerError` where the stream ends within an event.
    """
    data: list[str] = []
    for raw in lines:
        line = raw.decode(errors="replace").rstrip("\r\n")
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []
    if data:
        raise ServerError(f"The stream broke off within an event: {data[0][:SHOWN]}.")
