"""A disk that fills up: one sentence, and what is worth keeping is kept for the same command to go on with."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.checkpoint import tensors
from arctic_trt.checkpoint.output_dir import MARKER
from tests.conftest import Finished
from tests.faults.conftest import PROGRAM, ROOT
from tests.faults.test_faults import DONE
from tests.support.checkpoints import random_ids, write_samples
from tests.support.jobs import Job, digests, read_report, tree

ArcticTrt = Callable[..., Finished]


class FullDisk:
    """From the ``moment``-th call of one function on, there is no space left; None for a disk that never fills up."""

    def __init__(self) -> None:
        self.moment: int | None = None
        self.count = 0

    def limit(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.moment is not None and self.count > self.moment:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        return call


def check_sentence(done: Finished, job: Job) -> None:
    assert (done.code, done.out) == (1, ""), done
    assert done.err.startswith(f"arctic-trt: error: {job.output_dir}") and done.err.count("\n") == 1
    assert "cannot be written: No space left on device" in done.err
    assert done.err.endswith("Make room and run the same command again.\n")


@pytest.mark.parametrize(
    ("call", "share", "kept"),
    [
        ("reserve", 0.5, False),
        ("pwrite", 0.0, False),
        ("pwrite", 0.02, False),
        ("pwrite", 0.1, False),
        ("pwrite", 0.5, True),
        ("pwrite", 0.9, True),
        ("fdatasync", 0.0, False),
        ("fdatasync", 0.7, True),
        ("fsync", 0.1, False),
        ("fsync", 0.5, True),
        ("fsync", 0.9, True),
        ("replace", 0.5, True),
        ("replace", 0.95, True),
    ],
)
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(
    call: str, share: float, kept: bool, layered_job: Job, arctic_trt: ArcticTrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from a certain share of all the calls of one kind on, until space is made."""
    job, disk, home = layered_job, FullDisk(), tensors if call == "reserve" else os
    monkeypatch.setattr(home, call, disk.limit(getattr(home, call)))
    assert arctic_trt(*job.argv()).code == 0
    expected = digests(job.output_dir)
    shutil.rmtree(job.output_dir)
    disk.moment, disk.count = max(1 if "sync" in call else 0, int(share * disk.count)), 0
    check_sentence(arctic_trt(*job.argv("-q")), job)
    assert job.output_dir.exists() is kept
    if kept:
        assert (job.output_dir / MARKER).exists()
        disk.count = disk.moment
        assert arctic_trt(*job.argv("-q")).code == 1, "nothing has changed, and nothing more is lost"
        assert job.output_dir.exists()
    disk.moment = None
    assert arctic_trt(*job.argv("-q")) == DONE
    assert digests(job.output_dir) == expected and (read_report(job.output_dir)["resumed_layers"] > 0) is kept


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("only root may mount a file system, and not everywhere")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_is_really_full(layered_job: Job, arctic_trt: ArcticTrt, small_disk: Path) -> None:
    """The rank files fit, and so does the state after the first layer; the second state does not."""
    job, rows = layered_job, [40] * 60
    write_samples(job.calib, random_ids(64, rows))
    assert arctic_trt(*job.argv()).code == 0
    expected, state_bytes = digests(job.output_dir), 2 * 32 * sum(rows)
    output_bytes = sum(path.stat().st_blocks * 512 for path in job.output_dir.rglob("*"))
    job.output_dir = small_disk / "out"
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * ((1 << 20) - output_bytes - int(1.6 * state_bytes)))
    done = arctic_trt(*job.argv("-q"))
    check_sentence(done, job)
    assert ".state cannot be written" in done.err
    assert (job.output_dir / MARKER).exists()
    ballast.unlink()
    assert arctic_trt(*job.argv("-q")) == DONE
    assert digests(job.output_dir) == expected and read_report(job.output_dir)["resumed_layers"] >= 1


TEMPORARY_BYTES = 4  # with which Python tries a temporary directory, for one of the packages that torch imports where it is there


@pytest.mark.parametrize("limit", [TEMPORARY_BYTES, 5000, 20_000])
def test_a_file_size_limit_is_one_sentence_and_leaves_nothing(limit: int, job: Job) -> None:
    done = subprocess.run(
        [*PROGRAM, *job.argv("-q")],
        capture_output=True,
        check=False,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == (3 if limit == TEMPORARY_BYTES else 1) and done.stdout == ""
    assert done.stderr.startswith(f"arctic-trt: error: {job.output_dir}") and done.stderr.count("\n") == 1
    assert "cannot be written: File too large" in done.stderr
    assert tree(job.output_dir) is None
