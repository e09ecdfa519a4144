"""Rows in memory and rows in a file are the same rows; what is saved comes back, or its damage is named."""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arctic_trt.errors import ArcticTrtError, CheckpointError
from arctic_trt.quantize import rows as rows_module
from arctic_trt.quantize.rows import FileRows, MemoryRows, Rows, load_rows, runs, save_rows, sync_file

TOKENS, HIDDEN = 12, 3
VERBS = ("write", "add", "gather", "read", "clear")


def values(count: int, seed: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(params=["memory", "file"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rows]:
    rows = MemoryRows(TOKENS, HIDDEN) if request.param == "memory" else FileRows(TOKENS, HIDDEN, tmp_path)
    yield rows
    rows.close()


def apply(rows: Rows, verb: str, tokens: list[int], seed: int) -> Tensor:
    """Do one thing to ``rows``; returns what it gave, if anything."""
    index = torch.tensor(tokens, dtype=torch.int64)
    begin, end = (tokens[0], tokens[-1] + 1) if tokens else (0, 0)
    if verb == "write":
        rows.write(begin, values(end - begin, seed))
    elif verb == "add":
        rows.add(index, values(len(tokens), seed))
    elif verb == "clear":
        rows.clear()
    elif verb == "gather":
        return rows.gather(index)
    else:
        return rows.read(begin, end).clone()
    return torch.empty(0)


@given(st.lists(st.tuples(st.sampled_from(VERBS), st.sets(st.integers(0, TOKENS - 1))), max_size=12))
def test_a_file_is_like_memory(steps: list[tuple[str, set[int]]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        memory, file = MemoryRows(TOKENS, HIDDEN), FileRows(TOKENS, HIDDEN, Path(directory))
        for seed, (verb, tokens) in enumerate(steps):
            assert apply(memory, verb, sorted(tokens), seed).equal(apply(file, verb, sorted(tokens), seed))
            assert memory.read(0, TOKENS).equal(file.read(0, TOKENS))
        file.close()


def test_rows_begin_as_zeros_and_are_replaced_in_place(rows: Rows) -> None:
    assert not rows.read(0, TOKENS).any()
    rows.write(2, values(3, 1))
    expected = torch.zeros(TOKENS, HIDDEN).bfloat16()
    expected[2:5] = values(3, 1)
    assert rows.read(0, TOKENS).equal(expected) and rows.read(3, 4).equal(expected[3:4])


def test_what_was_gathered_is_a_copy(rows: Rows) -> None:
    rows.write(0, values(TOKENS, 1))
    rows.gather(torch.tensor([1, 2])).zero_()
    assert rows.read(0, TOKENS).equal(values(TOKENS, 1))


def test_a_sum_is_rounded_once(rows: Rows) -> None:
    rows.write(0, torch.full((TOKENS, HIDDEN), 256.0).bfloat16())
    rows.add(torch.tensor([0, 5]), torch.full((2, HIDDEN), 1.5).bfloat16())
    assert rows.read(0, 2).float().tolist() == [[258.0] * 3, [256.0] * 3]


def test_a_matrix_that_is_not_contiguous_is_written_like_its_copy(rows: Rows) -> None:
    x = torch.arange(2 * HIDDEN).view(HIDDEN, 2).bfloat16().T
    rows.write(4, x)
    assert rows.read(4, 6).equal(x)


def test_no_file_is_to_be_seen(tmp_path: Path) -> None:
    rows = FileRows(TOKENS, HIDDEN, tmp_path)
    assert list(tmp_path.iterdir()) == []
    rows.close()


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = FileRows(TOKENS, HIDDEN, tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(ArcticTrtError, match=r"Spilling hidden states to disk failed: No space left.*--memory_budget"):
        rows.write(0, values(1, 0))
    rows.close()


def test_short_transfers_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = FileRows(TOKENS, HIDDEN, tmp_path)
    pwritev, preadv = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: pwritev(fd, [buffers[0][:5]], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    rows.write(1, values(9, 2))
    assert rows.read(1, 10).equal(values(9, 2))
    rows.close()


@given(st.sets(st.integers(0, 40)))
def test_runs_cover_the_indices_and_nothing_else(tokens: set[int]) -> None:
    index = torch.tensor(sorted(tokens), dtype=torch.int64)
    found = runs(index)
    assert [i for begin, end, first in found for i in range(first, first + end - begin)] == index.tolist()
    assert [begin for begin, _, _ in found[1:]] == [end for _, end, _ in found[:-1]]
    borders = itertools.pairwise(found)
    assert all(first + (end - begin) < after for (begin, end, first), (_, _, after) in borders), "as long as they can be"


@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_what_is_saved_comes_back(rows: Rows, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows.write(0, values(TOKENS, 3))
    checksum = save_rows(rows, TOKENS, tmp_path / "a.state")
    sync_file(tmp_path / "a.state")
    monkeypatch.setattr(rows_module, "CHUNK_ROWS", chunk)
    assert save_rows(rows, TOKENS, tmp_path / "b.state") == checksum
    assert (tmp_path / "b.state").read_bytes() == (tmp_path / "a.state").read_bytes()
    rows.clear()
    load_rows(rows, TOKENS, tmp_path / "a.state", checksum)
    assert rows.read(0, TOKENS).equal(values(TOKENS, 3))


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"\1" + data[1:]])
def test_a_damaged_file_is_named(rows: Rows, tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a.state"
    rows.write(0, values(TOKENS, 3))
    checksum = save_rows(rows, TOKENS, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"a\.state has been damaged since it was written"):
        load_rows(rows, TOKENS, path, checksum)


def test_a_missing_file_is_named(rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.state cannot be read: No such file"):
        load_rows(rows, TOKENS, tmp_path / "a.state", 0)


def test_a_state_that_cannot_be_written_is_named(rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(ArcticTrtError, match=r"b/a\.state cannot be written: No such file"):
        save_rows(rows, TOKENS, tmp_path / "b" / "a.state")
