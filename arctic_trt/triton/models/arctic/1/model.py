"""The engine: this process leads its ranks. See :mod:`arctic_trt.triton.engine`."""

import triton_python_backend_utils as triton

from arctic_trt.triton.engine import open_engine


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args):
        self.engine = open_engine(triton, args)

    def execute(self, requests):
        self.engine.execute(requests)

    def finalize(self):
        self.engine.close()
