"""The hidden command: not in the help, tied to whoever starts it, and as many ranks as it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.cli import service
from arctic_trt.launch import RANK_KEYS, SIZE_KEYS
from tests.conftest import Finished


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No launcher; keeps what a process would have been tied to, which for a test's own is nothing to try."""
    tied: list[int] = []
    for name in (*RANK_KEYS, *SIZE_KEYS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(service, "die_with_parent", tied.append)
    return tied


def test_it_is_in_no_help(arctic_trt: Callable[..., Finished]) -> None:
    assert "service" not in arctic_trt("--help").out
    assert "--socket" in arctic_trt("service", "--help").out


def test_several_ranks_are_started_by_mpirun(
    arctic_trt: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, alone: list[int], tmp_path: Path
) -> None:
    class BecameError(Exception):
        pass

    def become(count: int, arguments: list[str]) -> None:
        raise BecameError(count, arguments)

    words = ["service", "--engine_dir", str(tmp_path), "--socket", "s", "--world_size", "4"]
    monkeypatch.setattr(service, "become_mpirun", become)
    monkeypatch.setattr("sys.argv", ["arctic-trt", *words])
    assert f"Unexpected BecameError: (4, {words})" in arctic_trt(*words).err
    assert len(alone) == 1


def test_ranks_get_what_was_given(
    arctic_trt: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, alone: list[int], tmp_path: Path
) -> None:
    served: list[Any] = []
    monkeypatch.setattr("arctic_trt.runtime.service.ranks.run_service", served.append)
    words = ["--tokenizer_dir", tmp_path / "t", "--kv_cache_memory", "2GiB", "--max_tokens_in_paged_kv_cache", "99"]
    assert arctic_trt("service", "--engine_dir", tmp_path, "--socket", "s", *words).code == 0
    (options,) = served
    assert (options.engine_dir, options.tokenizer_dir, options.socket) == (tmp_path, tmp_path / "t", Path("s"))
    assert (options.kv_budget.memory_bytes, options.kv_budget.max_tokens) == (2 << 30, 99)
    assert len(alone) == 1, "tied to its parent"


def test_an_engine_that_is_none_is_an_error(arctic_trt: Callable[..., Finished], tmp_path: Path) -> None:
    finished = arctic_trt("service", "--engine_dir", tmp_path, "--socket", "s")
    assert finished.code == 2 and "config.json" in finished.err
