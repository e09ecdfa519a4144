"""From the tokens of a response to its text. See :mod:`arctic_trt.triton.text`."""

import json
from pathlib import Path

import triton_python_backend_utils as triton

from arctic_trt.triton.text import Texts


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.texts = Texts(Path(parameters["tokenizer_dir"]["string_value"]))

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        arrays = self.texts.outputs({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        return triton.InferenceResponse(output_tensors=[triton.Tensor(name, array) for name, array in arrays.items()])
