"""Which backend builds, with and without TensorRT-LLM."""

from __future__ import annotations

import logging

import pytest

from arctic_trt.engine.backends import choose_backend, resolve_backend
from arctic_trt.errors import RefusedError, UsageError


@pytest.mark.parametrize(
    ("requested", "version", "expected"),
    [
        ("auto", None, "torch"),
        ("auto", "1.2.1", "tensorrt_llm"),
        ("auto", "1.3.0rc22", "torch"),
        ("auto", "0.20.0", "torch"),
        ("torch", None, "torch"),
        ("torch", "1.2.1", "torch"),
        ("torch", "1.3.0", "torch"),
        ("tensorrt_llm", "1.0.0", "tensorrt_llm"),
        ("tensorrt_llm", "1.2.0rc6", "tensorrt_llm"),
    ],
)
def test_resolving(requested: str, version: str | None, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "arctic_trt"):
        assert resolve_backend(requested, version) == expected
    assert ("using the torch backend" in caplog.text) == (requested == "auto" and expected == "torch")


def test_asking_for_what_is_absent_is_refused_with_the_way_to_get_it() -> None:
    with pytest.raises(RefusedError, match=r"pip install tensorrt-llm==1\.2\.1.*--backend torch") as caught:
        resolve_backend("tensorrt_llm", None)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("version", "complaint"),
    [("1.3.0rc22", "engines were removed from TensorRT-LLM after 1.2"), ("0.21.0", "0.21.0 is installed, expected 1.0 to 1.2")],
)
def test_a_version_that_cannot_build_is_refused(version: str, complaint: str) -> None:
    with pytest.raises(RefusedError, match=complaint):
        resolve_backend("tensorrt_llm", version)


def test_a_dry_run_needs_nothing_installed() -> None:
    assert choose_backend("tensorrt_llm", dry_run=True) == "tensorrt_llm"
    assert choose_backend("auto", dry_run=True) == "torch"
    with pytest.raises(RefusedError):
        choose_backend("tensorrt_llm")


def test_unknown_backend() -> None:
    with pytest.raises(UsageError, match="--backend onnx is unknown"):
        resolve_backend("onnx", "1.2.1")
