"""Loads only while the engine's ranks are up, so that the server is ready only then. See :mod:`arctic_trt.triton.gate`."""

import json

import triton_python_backend_utils as triton

from arctic_trt.triton.gate import is_shut


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args):
        if is_shut(json.loads(args["model_config"])):
            raise triton.TritonModelException("The engine's ranks are down.")

    def execute(self, requests):
        error = triton.TritonError("This model takes no requests: ask arctic_bls or ensemble.", triton.TritonError.INVALID_ARG)
        return [triton.InferenceResponse(error=error) for _ in requests]
