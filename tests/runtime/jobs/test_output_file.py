"""An output that is torn anywhere, that is another's, or whose disk is full."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.errors import ArcticTrtError, RefusedError
from arctic_trt.runtime.jobs.input_file import InputMark, Shard
from arctic_trt.runtime.jobs.lines import LineError
from arctic_trt.runtime.jobs.output_file import (
    open_output,
    plan_resume,
    read_record,
    read_result,
    record_path,
    write_record,
)
from arctic_trt.runtime.jobs.results import error_line

MARK = InputMark(9, "d1")
LINES = [error_line(number, f"näme{number}", LineError("code", "mess\nage")) for number in (3, 1, 9, 4)]
WHOLE = b"".join(LINES)


def resume(data: bytes, num_lines: int = 9, shard: Shard = Shard()):  # type: ignore[no-untyped-def]  # noqa: B008
    return plan_resume(data.splitlines(keepends=True), num_lines, shard, "out.jsonl")


def test_every_beginning_of_an_output_can_be_continued() -> None:
    for length in range(len(WHOLE) + 1):
        found = resume(WHOLE[:length])
        kept = WHOLE[: found.num_bytes]
        assert WHOLE.startswith(kept) and (not kept or kept.endswith(b"\n"))
        assert found.num_done == kept.count(b"\n") == sum(found.done) == found.num_errors
        assert length - len(kept) < max(map(len, LINES)), "no whole line is given up"


@given(st.integers(0, len(WHOLE)), st.binary(max_size=20).filter(lambda tail: b"}\n" not in tail), st.randoms())
def test_what_a_power_loss_leaves_at_the_end_is_cut_off(length: int, tail: bytes, draw) -> None:  # type: ignore[no-untyped-def]
    kept = WHOLE[: resume(WHOLE[:length]).num_bytes]
    for garbage in (tail, b"\0" * draw.randrange(1, 9000), b"\0\n\0\n"):
        assert resume(kept + garbage).num_bytes == len(kept)


def test_a_file_that_is_cut_and_continued_has_each_line_once(tmp_path: Path) -> None:
    for length in range(0, len(WHOLE), 7):
        path = tmp_path / "out.jsonl"
        path.write_bytes(WHOLE[:length])
        with open_output(path) as output:
            found = plan_resume(output.lines(), 9, Shard())
            output.cut(found.num_bytes)
            for line in LINES:
                if not found.done[read_result(line)[0]]:
                    output.append(line)
        lines = path.read_bytes().splitlines(keepends=True)
        assert sorted(lines) == sorted(LINES) and b"".join(lines)[: found.num_bytes] == WHOLE[: found.num_bytes]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"x\n" + WHOLE, r"out\.jsonl line 1 is not a result of a batch job, but results follow it"),
        (LINES[0] + b'{"id": "other", "error": null}\n' + LINES[1], "line 2 is not a result"),
        (LINES[0] + b'{"id": "batch_req_0", "error": null}\n' + LINES[1], "line 2 is not a result"),
        (LINES[0] + b"\n" + LINES[1], "line 2 is not a result"),
        (WHOLE + LINES[0], "line 5 is the result of input line 3, which is there twice"),
        (
            error_line(10, "a", LineError("", "")),
            r"line 1 is the result of input line 10, which is none of this job's \(--shard 0/1\)",
        ),
    ],
)
def test_an_output_that_cannot_be_continued(data: bytes, complaint: str) -> None:
    with pytest.raises(RefusedError, match=complaint):
        resume(data)


def test_another_shard_s_results_are_refused() -> None:
    assert resume(LINES[0] + LINES[1], shard=Shard(0, 2)).num_done == 2
    with pytest.raises(RefusedError, match=r"input line 4, which is none of this job's \(--shard 0/2\)"):
        resume(WHOLE, shard=Shard(0, 2))


def test_the_record_says_whose_results_these_are(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    settings = {"engine": "e", "temperature": 0.5}
    with open_output(path) as output:
        assert read_record(output, settings) is None
        write_record(output, settings, MARK)
        assert read_record(output, {"engine": "another"}) is None, "there are no results yet"
        output.append(LINES[0])
        assert read_record(output, settings) == MARK
        with pytest.raises(RefusedError, match=r"belongs to a job that differs in temperature \(0\.5 then, 0\.7 now\)"):
            read_record(output, {**settings, "temperature": 0.7})
        for spoilt in ("", "{}", "[]", json.dumps({"format": 2, "settings": settings, "input": MARK.as_dict()})):
            record_path(path).write_text(spoilt)
            with pytest.raises(RefusedError, match=r"is not empty, and .*out\.jsonl\.job\.json does not say which job's it is"):
                read_record(output, settings)
        record_path(path).unlink()
        with pytest.raises(RefusedError, match="does not say which job's it is"):
            read_record(output, settings)


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    with (
        open_output(tmp_path / "out.jsonl"),
        pytest.raises(RefusedError, match=r"Another process is writing .*out\.jsonl"),
        open_output(tmp_path / "out.jsonl"),
    ):
        pass
    with open_output(tmp_path / "out.jsonl") as output:
        assert output.empty
    with (
        pytest.raises(RefusedError, match=r"--output_file .* cannot be written: No such file"),
        open_output(tmp_path / "a" / "b"),
    ):
        pass


def test_results_are_made_durable_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    now = 100.0
    monkeypatch.setattr(os, "fdatasync", synced.append)
    monkeypatch.setattr("time.monotonic", lambda: now)
    with open_output(tmp_path / "out.jsonl") as output:
        for _ in range(25):
            now += 0.125
            output.append(LINES[0])
        assert len(synced) == 3
    assert len(synced) == 4, "and at the end"


@pytest.mark.parametrize("call", ["write", "fdatasync"])
def test_a_full_disk_is_one_sentence(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[[int, bytes], int] = os.write

    def full(descriptor: int, data: bytes = b"") -> int:
        if len(data) > 10:
            return original(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "out.jsonl"
    with open_output(path) as output:
        output.append(LINES[0])
    with (
        pytest.raises(ArcticTrtError, match=r"out\.jsonl cannot be written: No space left on device\. Make room and run"),
        monkeypatch.context() as patch,
        open_output(path) as output,
    ):
        patch.setattr(os, call, full)
        output.append(LINES[1])
        output.sync()
    found = resume(path.read_bytes())
    assert path.read_bytes()[: found.num_bytes] in (LINES[0], LINES[0] + LINES[1])
