"""From text, a conversation or token ids to token ids. See :mod:`arctic_trt.triton.text`."""

import json
from pathlib import Path

import triton_python_backend_utils as triton

from arctic_trt.errors import UsageError
from arctic_trt.triton.tensors import CLIENT_INPUTS, read_values, refuse_unknown
from arctic_trt.triton.text import Texts, prompt_arrays


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.texts = Texts(Path(parameters["tokenizer_dir"]["string_value"]))

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            refuse_unknown(request.parameters())
            values = read_values({tensor.name(): tensor.as_numpy() for tensor in request.inputs()}, CLIENT_INPUTS)
            arrays = prompt_arrays(self.texts.prompt_ids(values))
        except UsageError as error:
            return triton.InferenceResponse(error=triton.TritonError(str(error), triton.TritonError.INVALID_ARG))
        return triton.InferenceResponse(output_tensors=[triton.Tensor(name, array) for name, array in arrays.items()])
