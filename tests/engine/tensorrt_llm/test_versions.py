"""Versions of TensorRT-LLM: which build engines, and which flags each has."""

from __future__ import annotations

import pytest

from arctic_trt.engine.tensorrt_llm.versions import DROPPED, Versions, check_flags, check_supported, release_of, why_unsupported
from arctic_trt.errors import RefusedError, UsageError


@pytest.mark.parametrize(
    ("version", "release"), [("1.2.1", (1, 2)), ("1.2.0rc3", (1, 2)), ("1.10", (1, 10)), ("0.20.0.post1", (0, 20))]
)
def test_releases(version: str, release: tuple[int, int]) -> None:
    assert release_of(version) == release == Versions(version, None).release


def test_a_version_that_cannot_be_read() -> None:
    with pytest.raises(UsageError, match="'main' has a version that cannot be read"):
        release_of("main")


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "1.2.0rc6", "1.2.1"])
def test_versions_that_build_engines(version: str) -> None:
    assert why_unsupported(version) is None
    check_supported(version)


@pytest.mark.parametrize("version", ["0.21.0", "1.3.0rc22", "1.4.0rc1", "2.0.0"])
def test_versions_that_do_not(version: str) -> None:
    with pytest.raises(RefusedError, match=r"Install tensorrt-llm==1\.2\.1, or use --backend torch"):
        check_supported(version)


@pytest.mark.parametrize("name", DROPPED)
def test_a_dropped_flag_is_refused_from_the_first_version_without_it(name: str) -> None:
    for version in ("1.0.0", "1.1.0"):
        check_flags([name], Versions(version, None))
    with pytest.raises(UsageError, match=rf"--{name} was removed in TensorRT-LLM 1\.2\. Leave it out"):
        check_flags(["moe_plugin", name], Versions("1.2.1", None))
