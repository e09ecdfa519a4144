"""Text to token ids, for the C++ backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb

from arctic_trt.errors import UsageError
from arctic_trt.triton.legacy import PREPROCESSED
from arctic_trt.triton.legacy_text import Arrays, LegacyText, Tensors, decoded, words_of
from arctic_trt.triton.stub import arrays_of, settings_of


class TritonPythonModel:
    """Tokenizes one request at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        self.text = LegacyText(Path(settings_of(args)["tokenizer_dir"]))

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        given = arrays_of(request)
        try:
            return pb.InferenceResponse([pb.Tensor(PREPROCESSED[name], array) for name, array in self.ask(given).items()])
        except UsageError as error:
            return pb.InferenceResponse(error=pb.TritonError(str(error), pb.TritonError.INVALID_ARG))

    def ask(self, given: Tensors) -> Arrays:
        """Raises UsageError for what cannot be asked of the ensemble."""
        numbers = {name: array.reshape(-1)[0].item() for name, array in given.items() if array.dtype != object}
        if numbers.get("STREAM"):
            raise UsageError("The ensemble does not stream.", "Ask tensorrt_llm_bls, whose pieces of text add up.")
        return self.text.ask(
            decoded(given["QUERY"].reshape(-1)[0], "text_input"),
            numbers["REQUEST_OUTPUT_LEN"],
            words_of(given, "STOP_WORDS_DICT"),
            words_of(given, "BAD_WORDS_DICT"),
            numbers.get("END_ID"),
            numbers.get("PAD_ID"),
        )
