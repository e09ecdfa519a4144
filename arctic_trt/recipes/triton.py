"""What ``arctic-trt triton`` is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from arctic_trt.recipes.base import Recipe

PORTS = ("http_port", "grpc_port", "metrics_port", "openai_port")
PYTHON_ONLY = ("queue_timeout", "priority_levels", "request_timeout", "device", "kv_cache_memory")


class TritonRecipe(Recipe):
    """A model repository, and how it is served; field names are the flags and the keys of its YAML, ``engine_dir`` the argument.

    Timeouts are seconds.
    """

    engine_dir: Path
    model_repo: Path
    tokenizer_dir: Path | None = None
    backend: Literal["python", "tensorrtllm"] = "python"
    overwrite: bool = False
    device: Literal["auto", "cpu", "cuda"] | None = None
    kv_cache_memory: str | None = None
    max_tokens_in_paged_kv_cache: int | None = Field(None, ge=1)
    max_queue_size: int = Field(0, ge=0)
    queue_timeout: float | None = Field(None, gt=0)
    priority_levels: int | None = Field(None, ge=1)
    request_timeout: float | None = Field(None, gt=0)
    serve: bool = False
    host: str = "127.0.0.1"
    http_port: int = Field(8000, ge=1, le=65535)
    grpc_port: int = Field(8001, ge=1, le=65535)
    metrics_port: int = Field(8002, ge=1, le=65535)
    openai_port: int = Field(9000, ge=1, le=65535)
    api_key: str | None = Field(None, min_length=1, repr=False)
    max_request_bytes: int = Field(4 << 20, ge=1)
    drain_timeout: int = Field(30, ge=0)

    @model_validator(mode="after")
    def _check_ports(self) -> TritonRecipe:
        flags: dict[int, str] = {}
        for name in PORTS:
            other = flags.setdefault(getattr(self, name), name)
            if other != name:
                raise ValueError(f"--{other} and --{name} are both {getattr(self, name)}, expected ports of their own")
        return self

    @model_validator(mode="after")
    def _check_backend(self) -> TritonRecipe:
        if self.serve and self.backend != "python":
            raise ValueError(
                f"--serve starts repositories of --backend python, not of {self.backend}: start TensorRT-LLM's own container"
            )
        useless = [name for name in PYTHON_ONLY if getattr(self, name) is not None and self.backend != "python"]
        if useless:
            raise ValueError(f"--{useless[0]} is for --backend python alone")
        return self

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer lies: beside the engine unless told otherwise."""
        return self.tokenizer_dir or self.engine_dir
