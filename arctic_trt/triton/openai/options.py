"""What the front end has to know before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAiOptions:
    """Where Triton is, where to listen, and how much to take.

    ``grpc_url`` is ``HOST:PORT`` of Triton's gRPC, ``model`` what clients call the model that Triton calls ``triton_model``.
    With an ``api_key`` every request below ``/v1`` has to bring it. ``max_request_bytes`` counts a request's body,
    ``max_concurrent`` the requests that are read or answered at a time, ``body_timeout_s`` bounds how long a body may take,
    ``drain_timeout_s`` how long answers under way may take after the signal to stop.
    """

    grpc_url: str
    model: str = "arctic"
    triton_model: str = "arctic_bls"
    host: str = "127.0.0.1"
    port: int = 9000
    api_key: str | None = field(default=None, repr=False)
    max_request_bytes: int = 4 << 20
    max_concurrent: int = 512
    body_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
