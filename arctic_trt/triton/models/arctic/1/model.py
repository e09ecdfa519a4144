"""The engine: this process leads its ranks. See :mod:`arctic_trt.triton.engine`."""

from typing import Any

import triton_python_backend_utils as triton

from arctic_trt.triton.engine import Engine


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        self.model = Engine(triton, args)

    def execute(self, requests: list[Any]) -> None:
        self.model.execute(requests)

    def finalize(self) -> None:
        self.model.close()
