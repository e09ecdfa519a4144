"""From the tokens of a response to its text. See :mod:`arctic_trt.triton.stages`."""

from typing import Any

import triton_python_backend_utils as triton

from arctic_trt.triton.stages import Postprocessing


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        self.model = Postprocessing(triton, args)

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.model.execute(requests)
