"""An output directory is complete, or marked as unfinished work of ours, or not there; nobody's other files are touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from arctic_trt.checkpoint.output_dir import JOURNAL, MARKER, OutputDir, check_occupied, check_space, read_marker, write_json
from arctic_trt.errors import ArcticTrtError, CheckpointError, RefusedError, UsageError
from tests.support.jobs import tree


def fill(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"old {name}")
    return path


FINISHED = (
    "config.json",
    "rank0.safetensors",
    "rank11.safetensors",
    "report/quantize.json",
    "report/sensitivity.yaml",
    "tokenizer.json",
)


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


OURS = {"version": "1", "headers": "a" * 64, "tp_size": 8}
RECORD = f"{JOURNAL}/layer_0000.json"
UNFINISHED = (RECORD, f"{JOURNAL}/layer_0000.state", "rank0.safetensors.partial")


def job(path: Path, fingerprint: dict[str, object] | None = None, *, overwrite: bool = False) -> OutputDir:
    return OutputDir(path, kind="checkpoint", fingerprint=OURS if fingerprint is None else fingerprint, overwrite=overwrite)


def break_off(path: Path, error: BaseException, *names: str, keep: bool = True) -> None:
    """Unfinished work of the job :data:`OURS`."""

    def work() -> None:
        with job(path) as out:
            assert not out.resuming
            fill(path, *names)
            out.keep = keep
            raise error

    with pytest.raises(type(error)):
        work()


class TestResuming:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "out"

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), ArcticTrtError("no room"), ValueError("oops"), RefusedError("no")])
    def test_work_worth_keeping_is_kept_and_found_again(self, path: Path, error: BaseException) -> None:
        break_off(path, error, *UNFINISHED)
        before = tree(path)
        assert set(before or {}) == {MARKER, JOURNAL, *UNFINISHED}
        with job(path) as out:
            assert out.resuming and tree(path) == before
        assert list(tree(path) or {}) == ["rank0.safetensors.partial"], "the job itself names its files"

    @pytest.mark.parametrize("error", [CheckpointError("damaged"), UsageError("wrong")])
    def test_what_bad_input_made_is_not_kept(self, path: Path, error: BaseException) -> None:
        break_off(path, error, *UNFINISHED)
        assert not path.exists()

    def test_what_nothing_can_be_resumed_from_is_not_kept(self, path: Path) -> None:
        break_off(path, KeyboardInterrupt(), *UNFINISHED, keep=False)
        assert not path.exists()

    @pytest.mark.parametrize(
        ("other", "difference"),
        [
            ({**OURS, "tp_size": 4}, "differs in tp_size (8 then, 4 now)."),
            ({**OURS, "headers": "b" * 64}, "differs in headers."),
            ({**OURS, "version": "2", "tp_size": 1}, "differs in version (1 then, 2 now), tp_size (8 then, 1 now)."),
            ({"version": "1", "headers": "a" * 64}, "differs in tp_size."),
            ({**OURS, "more": 1}, "differs in more."),
            ({}, "differs in version, headers, tp_size."),
        ],
    )
    def test_another_job_is_refused_with_what_differs(self, path: Path, other: dict[str, object], difference: str) -> None:
        break_off(path, KeyboardInterrupt(), *UNFINISHED)
        before = tree(path)
        for attempt in (job(path, other).check, job(path, other).__enter__):
            with pytest.raises(RefusedError) as caught:
                attempt()
            assert f"out holds unfinished work that {difference} Repeat the command that began it" in str(caught.value)
        assert tree(path) == before

    def test_another_kind_is_refused(self, path: Path) -> None:
        break_off(path, KeyboardInterrupt(), *UNFINISHED)
        with pytest.raises(RefusedError, match="differs in kind"):
            OutputDir(path, kind="engine", fingerprint=OURS).check()

    def test_overwrite_starts_over_where_another_job_left_off(self, path: Path) -> None:
        break_off(path, KeyboardInterrupt(), *UNFINISHED)
        with job(path, {"version": "9"}, overwrite=True) as out:
            assert not out.resuming and list(tree(path) or {}) == [MARKER]
            assert (read_marker(path) or {})["fingerprint"] == {"version": "9"}
        assert tree(path) == {}

    def test_overwrite_resumes_the_same_job(self, path: Path) -> None:
        break_off(path, KeyboardInterrupt(), *UNFINISHED)
        with job(path, overwrite=True) as out:
            assert out.resuming

    def test_a_job_without_a_fingerprint_never_resumes(self, path: Path) -> None:
        def work() -> None:
            with job(path, {}) as out:
                out.keep = True
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work()
        with job(path, {}) as out:
            assert not out.resuming

    @pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"kind": "checkpoint"}'])
    def test_a_marker_that_says_nothing_is_taken_over(self, path: Path, content: str) -> None:
        fill(path, *UNFINISHED)
        (path / MARKER).write_text(content)
        with job(path) as out:
            assert not out.resuming and list(tree(path) or {}) == [MARKER]

    def test_a_journal_without_a_marker_is_never_believed(self, path: Path) -> None:
        fill(path, RECORD)
        with job(path, overwrite=True) as out:
            assert not out.resuming and list(tree(path) or {}) == [MARKER]

    def test_starting_over_deletes_what_was_left(self, path: Path) -> None:
        break_off(path, KeyboardInterrupt(), *UNFINISHED, "rank7.safetensors")
        with job(path) as out:
            out.start_over()
            assert list(tree(path) or {}) == [MARKER]

    def test_foreign_files_beside_unfinished_work_are_refused(self, path: Path) -> None:
        break_off(path, KeyboardInterrupt(), *UNFINISHED)
        fill(path, f"{JOURNAL}/sub/notes.txt")
        before = tree(path)
        with pytest.raises(RefusedError, match=r"already holds \.arctic-trt-journal/sub/notes\.txt"):
            job(path).__enter__()
        assert tree(path) == before

    def test_a_completed_directory_that_is_still_marked_is_unmarked(self, path: Path) -> None:
        break_off(path, KeyboardInterrupt(), *UNFINISHED[:2], "rank0.safetensors", "config.json")
        assert job(path).is_ours() and not job(path, {"other": 1}).is_ours()
        for _ in range(2):
            job(path).settle()
            assert sorted(tree(path) or {}) == ["config.json", "rank0.safetensors"]
        assert job(path, {"other": 1}).is_ours(), "nobody has left a marker"


class TestLock:
    def test_a_directory_is_written_by_one_process(self, tmp_path: Path) -> None:
        path = tmp_path / "out"
        with job(path) as out:
            for overwrite in (False, True):
                second = job(path, overwrite=overwrite)
                for attempt in (second.check, second.__enter__, second.settle):
                    with pytest.raises(RefusedError, match=r"Another process is writing .*out"):
                        attempt()
            assert list(tree(path) or {}) == [MARKER]
            out.write_json("config.json", {})
        assert list(tree(path) or {}) == ["config.json"]

    def test_the_lock_is_held_before_there_is_a_marker(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two that start together must not both find an empty directory."""
        path, first = tmp_path / "out", job(tmp_path / "out")
        claim, refused = first._claim, []

        def claim_while_another_comes() -> None:
            with pytest.raises(RefusedError, match="Another process is writing"):
                job(path).__enter__()
            refused.append(True)
            claim()

        monkeypatch.setattr(first, "_claim", claim_while_another_comes)
        with first:
            assert refused and list(tree(path) or {}) == [MARKER]

    def test_the_lock_is_gone_with_its_holder(self, tmp_path: Path) -> None:
        for error in (CheckpointError("damaged"), KeyboardInterrupt()):
            break_off(tmp_path / "out", error)
        with job(tmp_path / "out"):
            pass

    def test_where_locks_do_not_work_there_is_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def unsupported(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", unsupported)
        with job(tmp_path / "out"):
            pass
        assert "out cannot be locked (No locks available): make sure that no other process writes there" in caplog.text


def test_a_failing_clean_up_does_not_hide_the_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with (
        pytest.raises(ValueError, match="the cause"),
        monkeypatch.context() as patch,
        OutputDir(tmp_path / "out", kind="checkpoint"),
    ):
        fill(tmp_path / "out", "rank0.safetensors")
        patch.setattr(os, "unlink", broken)
        raise ValueError("the cause")
    assert (tmp_path / "out" / MARKER).exists(), "what could not be removed is still marked"


def test_a_disk_that_fails_at_the_very_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with (
        pytest.raises(ArcticTrtError, match="out cannot be written: Input/output error"),
        OutputDir(tmp_path / "out", kind="checkpoint"),
    ):
        monkeypatch.setattr(os, "fsync", broken)
    assert (tmp_path / "out" / MARKER).exists()


def test_what_makes_a_directory_complete_is_deleted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a death in the middle could leave something that looks complete."""
    path = fill(tmp_path / "out", RECORD, *FINISHED)
    done: list[str] = []
    unlink, fsync = os.unlink, os.fsync

    def record_unlink(path: Path, **options: object) -> None:
        done.append(Path(path).name)
        unlink(path, **options)  # type: ignore[arg-type]

    def record_fsync(descriptor: int) -> None:
        done.append("fsync")
        fsync(descriptor)

    monkeypatch.setattr(os, "unlink", record_unlink)
    monkeypatch.setattr(os, "fsync", record_fsync)
    with OutputDir(path, kind="checkpoint", overwrite=True):
        pass
    deleted = done[done.index("config.json") :]
    assert deleted[:2] == ["config.json", "fsync"] and set(deleted) >= {"rank0.safetensors", "tokenizer.json"}
