"""Compiling once, for this processor, and saying why where it cannot be done."""

from __future__ import annotations

import logging
import multiprocessing
import os
from pathlib import Path

import pytest

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.runtime.kernels import CpuKernels
from arctic_trt.runtime.native import choose, library
from arctic_trt.runtime.native.kernels import NativeKernels
from arctic_trt.runtime.native.library import NotCompiledError

load = library.load.__wrapped__


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "arctic-trt" / "kernels"


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_what_was_compiled_is_kept(cache: Path) -> None:
    load()
    [first] = cache.glob("*.so")
    before = first.stat()
    load()
    assert first.stat() == before
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_other_sources_or_another_processor_are_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = library.find_compiler(os.environ) or ""
    digests = [library._digest(compiler), library._digest(compiler)]
    monkeypatch.setattr(library, "_processor", lambda: "another")
    digests.append(library._digest(compiler))
    monkeypatch.setattr(library, "SOURCES", library.SOURCES[1:])
    digests.append(library._digest(compiler))
    assert digests[0] == digests[1] and len(set(digests)) == 3


def _load_there(directory: str) -> int:
    os.environ["XDG_CACHE_HOME"] = directory
    library.load.__wrapped__()
    return os.getpid()


def test_ranks_that_start_together_compile_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = tmp_path / "calls"
    compiler = script(
        tmp_path / "counting",
        f'case "$*" in *-shared*) echo x >> {counter};; esac\nexec {library.find_compiler(os.environ)} "$@"',
    )
    monkeypatch.setenv("CC", str(compiler))
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(_load_there, [str(tmp_path)] * 3, chunksize=1))) >= 1
    assert counter.read_text().count("x") == 1


def test_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(NotCompiledError, match="no C compiler is installed"):
        load()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(script(tmp_path / "broken", "echo 'no such luck' >&2; exit 1")))
    with pytest.raises(NotCompiledError, match="broken failed: no such luck"):
        load()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_cache_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "arctic-trt").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NotCompiledError, match="cannot be made or loaded: Not a directory"):
        load()


def test_a_damaged_library(cache: Path) -> None:
    cache.mkdir(parents=True)
    path = cache / f"{library._digest(library.find_compiler(os.environ) or '')}.so"
    path.write_bytes(b"not a library")
    with pytest.raises(NotCompiledError, match=path.name):
        load()


def test_the_compiled_kernels_are_chosen() -> None:
    assert isinstance(choose.choose_kernels({}), NativeKernels)
    assert isinstance(choose.choose_kernels({choose.VARIABLE: "compiled"}), NativeKernels)
    assert isinstance(choose.choose_kernels({choose.VARIABLE: "portable"}), CpuKernels)
    with pytest.raises(UsageError, match="ARCTIC_TRT_CPU_KERNELS=fast is none of auto, compiled, portable"):
        choose.choose_kernels({choose.VARIABLE: "fast"})


def test_falling_back_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(threads: int) -> NativeKernels:
        raise NotCompiledError("no C compiler is installed")

    monkeypatch.setattr(choose, "NativeKernels", fails)
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose.choose_kernels({}), CpuKernels)
    assert "cannot be compiled (no C compiler is installed)" in caplog.text
    with pytest.raises(RefusedError, match="cannot be compiled: no C compiler"):
        choose.choose_kernels({choose.VARIABLE: "compiled"})
