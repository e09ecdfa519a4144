"""Text in, text out, with the engine in between. See :mod:`arctic_trt.triton.bls`."""

from typing import Any

import triton_python_backend_utils as triton

from arctic_trt.triton.bls import Bls


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        self.model = Bls(triton, args)

    def execute(self, requests: list[Any]) -> None:
        self.model.execute(requests)

    def finalize(self) -> None:
        self.model.close()
