"""Death, a full disk and Ctrl-C in the middle: nothing half-written passes for whole, and the same command completes the work."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished
from tests.faults import dying
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.jobs import Job, lasting, tree

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "arctic_trt"]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.faults.dying"])


def run_and_die(argv: list[str], die_at: int | None) -> tuple[int, list[str]] | None:
    """(exit code, changes to the disk) of a run in another process, or None if it died as it should."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=dying.run, args=(argv, die_at, sender))
    process.start()
    sender.close()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return None
    return receiver.recv()  # type: ignore[no-any-return]


def moments(changes: list[str], every: int) -> list[int]:
    """Each change to a name or to what is durable, and one write in ``every``."""
    writes = [i for i, name in enumerate(changes) if name == "pwrite"]
    return sorted({i for i, name in enumerate(changes) if name != "pwrite"} | set(writes[::every]) | {writes[-1]})


def test_killed_at_any_moment_the_same_command_gives_the_same_bytes(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    finished = run_and_die(job.argv("-q"), None)
    assert finished is not None and finished[0] == 0
    expected, changes = lasting(job.output_dir), finished[1]
    assert len(changes) > 100 and changes[-1] == "unlink", "the marker goes last"
    for moment in moments(changes, every=20):
        shutil.rmtree(job.output_dir)
        assert run_and_die(job.argv("-q"), moment) is None
        assert arctic_trt(*job.argv("-q")) == Finished(0, "", ""), f"after death at change {moment}, {changes[moment]}"
        assert lasting(job.output_dir) == expected


def test_killed_while_overwriting_the_same_command_gives_the_same_bytes(job: Job, arctic_trt: Callable[..., Finished]) -> None:
    """The old checkpoint has more ranks, which must not survive beside the new ones."""
    old = Job(job.model_dir, job.calib, job.output_dir, {"--tp_size": 4})
    assert arctic_trt(*old.argv()).code == 0
    finished = run_and_die(job.argv("-q", "--overwrite"), None)
    assert finished is not None and finished[0] == 0
    expected, changes = lasting(job.output_dir), finished[1]
    for moment in moments(changes, every=60)[:20]:
        assert arctic_trt(*old.argv("--overwrite")).code == 0
        assert run_and_die(job.argv("-q", "--overwrite"), moment) is None
        assert arctic_trt(*job.argv("-q", "--overwrite")) == Finished(0, "", ""), f"after death at {moment}, {changes[moment]}"
        assert lasting(job.output_dir) == expected


@pytest.fixture
def long_job(job: Job, tmp_path: Path) -> Job:
    """A job of many layers, to be met in the middle from outside."""
    job.model_dir = random_checkpoint(tmp_path / "long", {**SMALL, "num_hidden_layers": 48})
    return job


@contextmanager
def started(job: Job, line: str) -> Iterator[subprocess.Popen[str]]:
    """The job in a process of its own, once it has printed a line that begins with ``line``."""
    process = subprocess.Popen(
        [*PROGRAM, *job.argv()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        try:
            assert process.stderr is not None
            assert any(text.startswith(line) for text in process.stderr)
            yield process
        finally:
            process.kill()


def test_kill_9_from_outside(long_job: Job, arctic_trt: Callable[..., Finished]) -> None:
    for line in ("layer 1/48", "layer 9/48"):
        with started(long_job, line) as process:
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert "config.json" not in (tree(long_job.output_dir) or {})
    assert arctic_trt(*long_job.argv("-q")) == Finished(0, "", "")
    resumed = lasting(long_job.output_dir)
    shutil.rmtree(long_job.output_dir)
    assert arctic_trt(*long_job.argv("-q")).code == 0
    assert lasting(long_job.output_dir) == resumed


def test_ctrl_c_ends_in_130_with_the_command_that_goes_on(long_job: Job, arctic_trt: Callable[..., Finished]) -> None:
    with started(long_job, "layer 3/48") as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    words = shlex.split(err.splitlines()[-1].removeprefix("arctic-trt: error: Interrupted. To go on: "))
    assert words == ["arctic-trt", *long_job.argv()]
    assert not long_job.output_dir.exists()
    assert arctic_trt(*words[1:]).code == 0


@pytest.mark.parametrize(
    ("call", "moment"),
    [("ftruncate", 1), ("pwrite", 0), ("pwrite", 3), ("pwrite", 90), ("fsync", 2), ("fsync", -3), ("replace", 1)],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    call: str, moment: int, job: Job, arctic_trt: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the ``moment``-th call and stays so; -3 is the third from the end, which writes config.json."""
    original, count = getattr(os, call), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if full is not None and count > full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    full: int | None = None
    monkeypatch.setattr(os, call, counted)
    assert arctic_trt(*job.argv()).code == 0
    shutil.rmtree(job.output_dir)
    full, count = moment % count, 0
    done = arctic_trt(*job.argv("-q"))
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"arctic-trt: error: {job.output_dir}/") and done.err.count("\n") == 1
    assert "cannot be written: No space left on device" in done.err
    assert not job.output_dir.exists()


@pytest.mark.parametrize("limit", [0, 5000, 20_000])
def test_a_file_size_limit_is_one_sentence_and_leaves_nothing(limit: int, job: Job) -> None:
    done = subprocess.run(
        [*PROGRAM, *job.argv("-q")],
        capture_output=True,
        check=False,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == (3 if limit == 0 else 1) and done.stdout == ""
    assert done.stderr.startswith(f"arctic-trt: error: {job.output_dir}") and done.stderr.count("\n") == 1
    assert "cannot be written: File too large" in done.stderr
    assert not job.output_dir.exists()
