"""Loads only while the engine's ranks are up, so that the server is ready only then. See :mod:`arctic_trt.triton.gate`."""

from typing import Any

import triton_python_backend_utils as triton

from arctic_trt.triton.gate import STATE, UP
from arctic_trt.triton.stub import settings_of


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        if settings_of(args)[STATE] != UP:
            raise triton.TritonModelException("The engine's ranks are down.")

    def execute(self, requests: list[Any]) -> list[Any]:
        error = triton.TritonError("This model takes no requests: ask arctic_bls or ensemble.", triton.TritonError.INVALID_ARG)
        return [triton.InferenceResponse(error=error) for _ in requests]
