"""What a running server is told and asked over HTTP: whether it is ready, and to load its models again."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass

from arctic_trt.errors import ArcticTrtError
from arctic_trt.triton.server import KEY_HEADER

ASK_TIMEOUT_S = 5.0
UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Admin:
    """The server at ``address``, ``HOST:PORT``; ``key`` opens what it guards."""

    address: str
    key: str

    def is_ready(self, path: str = "/v2/health/ready") -> bool:
        """Whether ``path`` answers 200."""
        try:
            return self._ask("GET", path, timeout_s=ASK_TIMEOUT_S)[0] == http.client.OK
        except (OSError, http.client.HTTPException):
            return False

    def load(self, model: str) -> None:
        """Load ``model``, and wait until it is loaded; raises :class:`ArcticTrtError` with the server's words when it is not."""
        self._change(model, "load")

    def unload(self, model: str) -> None:
        """Have ``model`` unloaded once its requests have ended; raises :class:`ArcticTrtError` when the server does not."""
        self._change(model, "unload")

    def loaded(self) -> set[str]:
        """Models that are loaded, or still unloading; raises :class:`ArcticTrtError` when the server does not say."""
        try:
            status, text = self._ask("POST", "/v2/repository/index", "{}", timeout_s=ASK_TIMEOUT_S)
            models = json.loads(text) if status == http.client.OK else None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ArcticTrtError(f"tritonserver did not list its models: {error or type(error).__name__}.") from None
        if models is None:
            raise ArcticTrtError(f"tritonserver did not list its models: {text}")
        return {model["name"] for model in models if model.get("state", UNAVAILABLE) != UNAVAILABLE}

    def _change(self, model: str, verb: str) -> None:
        try:
            status, text = self._ask("POST", f"/v2/repository/models/{model}/{verb}", "{}")
        except (OSError, http.client.HTTPException) as error:
            raise ArcticTrtError(f"tritonserver did not {verb} {model}: {error or type(error).__name__}.") from None
        if status != http.client.OK:
            raise ArcticTrtError(f"tritonserver did not {verb} {model}: {text}")

    def _ask(self, method: str, path: str, body: str | None = None, *, timeout_s: float | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.address, timeout=timeout_s)
        try:
            connection.request(method, path, body, {KEY_HEADER: self.key})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()
