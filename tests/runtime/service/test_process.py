"""Why ranks ended, from their exit code and what they said last."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from arctic_trt.errors import ArcticTrtError, RefusedError, UsageError
from arctic_trt.runtime.service.process import BACKING, RanksProcess, explain
from tests.support.waiting import wait_until

MPI_SAYS = [
    "-" * 70,
    "prterun noticed that process rank 3 with PID 24320 on node vm exited on",
    "signal 9 (Killed).",
    "-" * 70,
]


@pytest.mark.parametrize(
    ("code", "lines", "killed", "kind", "message"),
    [
        (2, ["INFO: x", "arctic-trt: error: No such engine. Look.", "-- more --"], False, UsageError, "No such engine. Look."),
        (3, ["arctic-trt: error: Too few ranks."], False, RefusedError, "Too few ranks."),
        (1, ["arctic-trt: error: First.", "arctic-trt: error: Second."], False, ArcticTrtError, "First."),
        (137, MPI_SAYS, False, ArcticTrtError, "Rank 3 ended by a signal (Killed)."),
        (-11, ["hm", " "], False, ArcticTrtError, "The ranks ended by signal SIGSEGV; the last that they said is: 'hm'."),
        (0, [], False, ArcticTrtError, "The ranks ended with exit code 0 and said nothing."),
        (-9, ["busy"], True, ArcticTrtError, "The ranks had to be killed."),
    ],
)
def test_why_ranks_ended(code: int, lines: list[str], killed: bool, kind: type[ArcticTrtError], message: str) -> None:
    error = explain(code, lines, killed=killed)
    assert type(error) is kind and str(error) == message


def test_files_of_ranks_are_removed_and_lie_where_they_were_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKING, str(tmp_path))
    program = f"import os; [open(os.path.join(os.environ[key], 'left'), 'w') for key in ('TMPDIR', {BACKING!r})]; print('done')"
    process = RanksProcess(lambda path: [sys.executable, "-c", program])
    assert wait_until(lambda: process.ended, 10)
    assert all((directory / "left").exists() for directory in process._directories)
    assert [directory.parent for directory in process._directories][1] == tmp_path
    assert "'done'" in str(process.end(0))
    assert not any(directory.exists() for directory in process._directories)


def test_ranks_know_nothing_of_a_launcher_of_the_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    process = RanksProcess(lambda path: [sys.executable, "-c", "import os; print(os.environ.get('OMPI_COMM_WORLD_RANK'))"])
    assert "'None'" in str(process.end(10))


def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(RefusedError, match=r"cannot be started \(AF_UNIX path too long\)\. TMPDIR"):
        RanksProcess(lambda path: ["true"])
    assert os.listdir(long) == []
