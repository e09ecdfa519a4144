"""What is turned away before anything is read: requests without the key, and bodies that are too large."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

from arctic_trt.triton.openai.errors import ApiError
from arctic_trt.triton.openai.relay import Message, Receive, Send

App = Callable[[Any, Receive, Send], Awaitable[None]]
GUARDED = "/v1/"


class Guard:
    """Around an ASGI application."""

    def __init__(self, app: App, *, api_key: str | None, max_request_bytes: int) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._max_bytes = max_request_bytes

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            self._check_length(headers.get(b"content-length", b"0"))
        except ApiError as error:
            await send_error(error, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _check_key(self, path: str, given: bytes) -> None:
        if self._expected is None or not path.startswith(GUARDED):
            return
        if not hmac.compare_digest(given, self._expected):
            found = "The API key is wrong" if given else "There is no API key"
            raise ApiError(401, f"{found}, expected the header Authorization: Bearer KEY.", code="invalid_api_key")

    def _check_length(self, length: bytes) -> None:
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large(f"{int(length)} bytes")

    def _bounded(self, receive: Receive) -> Receive:
        """``receive``, which fails once a body of unannounced length has become too large."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._too_large("more")
            return message

        return counted

    def _too_large(self, found: str) -> ApiError:
        return ApiError(
            413, f"The request's body has {found}, expected at most {self._max_bytes} bytes.", code="request_too_large"
        )


async def send_error(error: ApiError, send: Send) -> None:
    """Answer with ``error``."""
    body = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
