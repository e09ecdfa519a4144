"""Which backend builds, with and without TensorRT-LLM."""

from __future__ import annotations

import logging

import pytest

from arctic_trt.engine.backends import resolve_backend
from arctic_trt.errors import RefusedError, UsageError


@pytest.mark.parametrize(
    ("requested", "installed", "expected"),
    [
        ("auto", False, "torch"),
        ("auto", True, "tensorrt_llm"),
        ("torch", False, "torch"),
        ("torch", True, "torch"),
        ("tensorrt_llm", True, "tensorrt_llm"),
    ],
)
def test_resolving(requested: str, installed: bool, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "arctic_trt"):
        assert resolve_backend(requested, installed) == expected
    assert ("using the torch backend" in caplog.text) == (requested == "auto" and not installed)


def test_asking_for_what_is_absent_is_refused_with_the_way_to_get_it() -> None:
    with pytest.raises(RefusedError, match=r"pip install tensorrt-llm==1\.2\.1.*--backend torch") as caught:
        resolve_backend("tensorrt_llm", False)
    assert caught.value.exit_code == 3


def test_unknown_backend() -> None:
    with pytest.raises(UsageError, match="--backend onnx is unknown"):
        resolve_backend("onnx", True)
