"""Clearing up after a run, by its name alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from arctic_trt.triton.janitor import Janitor, clear_up, find_processes
from arctic_trt.triton.server import MARK, name_run
from tests.support.serving import wait_until

SLEEP = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]


def start(name: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(SLEEP, env={**os.environ, MARK: name}, start_new_session=True)
    wait_until(lambda: process.pid in find_processes(name), "its start")
    return process


def test_processes_and_files_of_a_run_go_and_those_of_others_stay(tmp_path: Path) -> None:
    name, other = name_run(), name_run()
    shared, directory = tmp_path / "shm", tmp_path / "run"
    (shared / f"{name}-mpi" / "deep").mkdir(parents=True)
    for path in (shared / f"{name}0123", shared / f"{other}0123", shared / f"{name}-mpi" / "deep" / "segment"):
        path.write_text("x")
    directory.mkdir()
    ours, theirs = start(name), start(other)
    try:
        clear_up(name, directory, shared)
        assert ours.wait(5) == -signal.SIGKILL and theirs.poll() is None
        assert [path.name for path in shared.iterdir()] == [f"{other}0123"] and not directory.exists()
        assert find_processes(other) == [theirs.pid]
    finally:
        theirs.kill()
        theirs.wait()


def test_clearing_up_twice_is_no_failure(tmp_path: Path) -> None:
    clear_up(name_run(), tmp_path / "absent", tmp_path)


def test_a_janitor_works_when_told_to_and_not_when_signalled(tmp_path: Path) -> None:
    name, directory = name_run(), tmp_path / "run"
    directory.mkdir()
    janitor, ours = Janitor(name, directory), start(name)
    assert directory.exists() and ours.poll() is None
    janitor.finish()
    assert ours.wait(5) == -signal.SIGKILL and not directory.exists()
