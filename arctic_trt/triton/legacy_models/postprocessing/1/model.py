"""Token ids of finished sequences to text, for the C++ backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb

from arctic_trt.triton.legacy_text import LegacyText, strings, words_of
from arctic_trt.triton.stub import arrays_of, settings_of


class TritonPythonModel:
    """Detokenizes one response at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        self.text = LegacyText(Path(settings_of(args)["tokenizer_dir"]))

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        given = arrays_of(request)
        stop_words = words_of(given, "STOP_WORDS_DICT")
        rows = zip(given["TOKENS_BATCH"][0], given["SEQUENCE_LENGTH"][0], strict=True)
        texts = [self.text.whole(ids[:length].tolist(), stop_words) for ids, length in rows]
        return pb.InferenceResponse([pb.Tensor("OUTPUT", strings(texts))])
