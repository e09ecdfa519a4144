"""An output directory is complete, or marked as unfinished work of ours, or not there; nobody's other files are touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from arctic_trt.checkpoint.output_dir import MARKER, OutputDir, check_occupied, check_space, write_json
from arctic_trt.errors import ArcticTrtError, RefusedError, UsageError
from tests.support.jobs import tree


def fill(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"old {name}")
    return path


FINISHED = ("config.json", "rank0.safetensors", "rank11.safetensors", "report/quantize.json", "tokenizer.json")


def test_leaving_normally_completes_the_directory(tmp_path: Path) -> None:
    with OutputDir(tmp_path / "a/out", kind="checkpoint") as out:
        assert (out.path / MARKER).exists()
        out.write_json("report/quantize.json", {"b": 1})
        out.write_json("config.json", {"a": 1})
    assert sorted(tree(tmp_path / "a/out") or {}) == ["config.json", "report", "report/quantize.json"]
    assert json.loads((tmp_path / "a/out/config.json").read_text()) == {"a": 1}


def test_leaving_with_an_exception_leaves_what_was_there_before(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "new/deeper/out", tmp_path / "empty"):
        with pytest.raises(KeyboardInterrupt), OutputDir(path, kind="checkpoint") as out:
            out.write_json("report/quantize.json", {})
            fill(path, "rank0.safetensors.partial", "config.json")
            raise KeyboardInterrupt
    assert tree(tmp_path) == {"empty": None}


@pytest.mark.parametrize("name", FINISHED)
def test_finished_work_is_refused_without_overwrite_and_replaced_with_it(tmp_path: Path, name: str) -> None:
    path = fill(tmp_path / "out", name)
    with (
        pytest.raises(RefusedError, match=rf"out is not empty: it holds {name}.*--overwrite"),
        OutputDir(path, kind="checkpoint"),
    ):
        pass
    with OutputDir(path, kind="checkpoint", overwrite=True) as out:
        out.write_json("config.json", {"new": True})
    assert tree(path) == {"config.json": b'{\n  "new": true\n}\n'}


@pytest.mark.parametrize(
    "name", ["notes.txt", "model.safetensors", "rank0.engine.txt", "sub/config.json", "report/notes.txt", "report/a/b.json"]
)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("unfinished", [False, True])
def test_foreign_files_are_never_deleted(tmp_path: Path, name: str, overwrite: bool, unfinished: bool) -> None:
    path = fill(tmp_path / "out", name, "config.json", *([MARKER] if unfinished else []))
    before = tree(path)
    with pytest.raises(RefusedError, match=f"already holds {name}"), OutputDir(path, kind="checkpoint", overwrite=overwrite):
        pass
    assert tree(path) == before


def test_a_foreign_file_that_appears_meanwhile_survives_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="oops"), OutputDir(tmp_path / "out", kind="checkpoint") as out:
        fill(out.path, "report/notes.txt", "notes.txt", "rank0.safetensors")
        raise ValueError("oops")
    assert sorted(tree(tmp_path / "out") or {}) == ["notes.txt", "report", "report/notes.txt"]


@pytest.mark.parametrize("left", [(MARKER,), (MARKER, "rank0.safetensors.partial"), (MARKER, *FINISHED), (MARKER + ".partial",)])
def test_unfinished_work_is_taken_over(tmp_path: Path, left: tuple[str, ...]) -> None:
    path = fill(tmp_path / "out", *left)
    with OutputDir(path, kind="checkpoint") as out:
        assert list(tree(path) or {}) == [MARKER]
        out.write_json("config.json", {})
    assert list(tree(path) or {}) == ["config.json"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "out")
    with pytest.raises(UsageError, match="out is a file, expected a directory"):
        check_occupied(tmp_path / "out", overwrite=True)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "file")
    with (
        pytest.raises(RefusedError, match="file/out cannot be written: Not a directory"),
        OutputDir(tmp_path / "file/out", kind="x"),
    ):
        pass


def test_a_disk_without_room_for_the_marker_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RefusedError, match="out cannot be written: No space left"), OutputDir(tmp_path / "a/out", kind="x"):
        pass
    assert tree(tmp_path) == {}


def test_a_disk_that_fills_up_is_named_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(ArcticTrtError, match=r"config\.json cannot be written: No space left"),
        OutputDir(tmp_path / "out", kind="x") as out,
        monkeypatch.context() as patch,
    ):
        patch.setattr(os, "fsync", full)
        out.write_json("config.json", {})
    assert tree(tmp_path) == {}


def test_json_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert tree(tmp_path) == {"a.json": b'{\n  "old": 1\n}\n'}


def test_space_is_checked_where_the_directory_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=1_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_space(tmp_path / "a/b", 1_000_000_000)
    assert asked == [tmp_path]
    with pytest.raises(RefusedError, match=r"a/b needs 2\.00 GB, but its disk has 1\.00 GB free"):
        check_space(tmp_path / "a/b", 2_000_000_000)


def test_what_overwrite_will_delete_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    (tmp_path / "rank0.safetensors").write_bytes(b"x" * 100_000)
    check_space(tmp_path, 100_000)
