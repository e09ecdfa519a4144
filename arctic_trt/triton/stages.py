"""The models ``preprocessing`` and ``postprocessing`` of the ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arctic_trt.errors import UsageError
from arctic_trt.runtime.service.protocol import INVALID
from arctic_trt.triton.stub import Stub, arrays_of, settings_of
from arctic_trt.triton.tensors import CLIENT_INPUTS, read_values, refuse_unknown
from arctic_trt.triton.text import Texts, prompt_arrays


class Preprocessing:
    """From a prompt in any of its forms to token ids; ``triton`` and ``args`` are what a model of Triton's has."""

    def __init__(self, triton: Any, args: Mapping[str, str]) -> None:
        self._stub = Stub(triton)
        self._texts = Texts(settings_of(args))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each of ``requests``."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            refuse_unknown(request.parameters())
            ids = self._texts.prompt_ids(read_values(arrays_of(request), CLIENT_INPUTS))
        except UsageError as error:
            return self._stub.refusal(str(error), INVALID)
        return self._stub.response(prompt_arrays(ids))


class Postprocessing:
    """From a response of ``arctic`` to its text; ``triton`` and ``args`` are what a model of Triton's has."""

    def __init__(self, triton: Any, args: Mapping[str, str]) -> None:
        self._stub = Stub(triton)
        self._texts = Texts(settings_of(args))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each of ``requests``."""
        return [self._stub.response(self._texts.outputs(arrays_of(request))) for request in requests]
