"""An MPI job in which something goes wrong ends as a whole, soon, with one message, and leaves no process behind."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.runtime.conftest import Model
from tests.support.engines import ROOT, mpi_environ, mpirun, mpirun_command, write_prompts
from tests.support.waiting import alive, wait_until

pytestmark = pytest.mark.mpi

LIMIT_S = 10.0
START_S = 15.0  # two ranks import torch, perhaps while the other core is busy


@pytest.fixture(scope="module")
def engine(tiny: Model) -> Path:
    return tiny.engine("tiny-tp2", tp_size=2)


@pytest.fixture
def run(engine: Path, tiny: Model, tmp_path: Path) -> list[object]:
    """The words of a run long enough to be disturbed."""
    prompts = write_prompts(tmp_path / "prompts.npy", tiny.prompts(5))
    return ["run", "--engine_dir", engine, "--input_file", prompts, "--max_output_len", "200", "--end_id", "-1"]


def complaints(text: str) -> list[str]:
    return re.findall(r"arctic-trt: error: (.*)", text)


def test_a_wrong_world_size_is_refused_once(run: list[object]) -> None:
    job = mpirun(3, "-m", "arctic_trt", *run)
    assert (job.code, job.out) == (3, "")
    (complaint,) = complaints(job.err)
    assert complaint.startswith("This engine needs 2 ranks (tp 2 x pp 1), got 3. Start it as: mpirun -n 2")


def test_wrong_usage_is_reported_once(run: list[object]) -> None:
    job = mpirun(2, "-m", "arctic_trt", *run, "--top_q", "1")
    assert (job.code, job.out) == (2, "")
    assert len(complaints(job.err)) == 1 and "--top_q" in job.err


def test_a_missing_rank_file_is_reported_once_for_its_rank(run: list[object], engine: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(engine, tmp_path / "engine")
    (broken / "rank1.safetensors").unlink()
    job = mpirun(2, "-m", "arctic_trt", *run, "--engine_dir", broken)
    assert (job.code, job.out) == (1, "")
    (complaint,) = complaints(job.err)
    assert complaint.startswith(f"rank 1: {broken}/rank1.safetensors does not exist")


def test_a_rank_that_raises_ends_the_job(run: list[object]) -> None:
    began = time.monotonic()
    job = mpirun(2, "-m", "tests.support.faulty_run", "raise", "1", *run)
    assert time.monotonic() - began < START_S + LIMIT_S
    assert (job.code, job.out) == (1, "")
    (complaint,) = complaints(job.err)
    assert complaint.startswith("rank 1: Unexpected ValueError: the fault of this test")


def test_a_rank_that_is_killed_ends_the_job(run: list[object]) -> None:
    began = time.monotonic()
    job = mpirun(2, "-m", "tests.support.faulty_run", "die", "1", *run)
    assert time.monotonic() - began < START_S + LIMIT_S
    assert job.code != 0 and job.out == ""
    assert re.search(r"process rank 1 with PID \d+.*signal 9", job.err, re.DOTALL)


def test_no_rank_outlives_a_killed_launcher(run: list[object], tmp_path: Path) -> None:
    words = mpirun_command(2, "-m", "tests.support.faulty_run", "report", "0", *run)
    with subprocess.Popen(
        words, cwd=ROOT, env=mpi_environ(PIDS=str(tmp_path)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as job:
        reports = [tmp_path / str(rank) for rank in range(2)]
        assert wait_until(lambda: all(report.exists() for report in reports), START_S + LIMIT_S), "the ranks never started"
        pids = [int(report.read_text().split()[0]) for report in reports]
        assert all(map(alive, pids))
        job.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not any(map(alive, pids)), LIMIT_S)
