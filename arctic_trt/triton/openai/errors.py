"""Failures as OpenAI's clients know them: a status, and a JSON object with the key ``error``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arctic_trt.triton.openai.engine import EngineError

INVALID, SERVER, LIMIT = "invalid_request_error", "server_error", "rate_limit_error"
RETRY_AFTER_S = "1"
OF_ENGINE: Mapping[str, tuple[int, str, str | None]] = {
    "invalid": (400, INVALID, None),
    "busy": (429, LIMIT, "queue_full"),
    "unavailable": (503, SERVER, "unavailable"),
    "internal": (500, SERVER, "internal_error"),
}
"""Status, type and code of each kind of :class:`EngineError`."""


class ApiError(Exception):
    """An answer other than what was asked for; ``param`` names the field at fault."""

    def __init__(
        self, status: int, message: str, *, kind: str = INVALID, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What a client that may try again has to know; a body that was not read to its end leaves the connection useless."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status in (429, 503):
            return {"Retry-After": RETRY_AFTER_S}
        return {"Connection": "close"} if self.status in (408, 413) else {}


def of_engine(error: EngineError) -> ApiError:
    """The same failure for a client."""
    status, kind, code = OF_ENGINE[error.kind]
    return ApiError(status, error.message, kind=kind, code=code)
