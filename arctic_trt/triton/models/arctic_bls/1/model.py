"""Text in, text out, with the engine in between. See :mod:`arctic_trt.triton.bls`."""

import triton_python_backend_utils as triton

from arctic_trt.triton.bls import open_bls


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args):
        self.bls = open_bls(triton, args)

    def execute(self, requests):
        self.bls.execute(requests)

    def finalize(self):
        self.bls.close()
