"""Jobs of several layers, and processes to be met in the middle from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support.checkpoints import SMALL, random_checkpoint, random_ids, write_samples
from tests.support.jobs import Job

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "arctic_trt"]
LAYERS = 6
Started = Callable[[Job, str], AbstractContextManager["subprocess.Popen[str]"]]


@pytest.fixture
def layered_job(job: Job, tmp_path: Path) -> Job:
    """A job of a few layers."""
    job.model_dir = random_checkpoint(tmp_path / "layered", {**SMALL, "num_hidden_layers": LAYERS})
    return job


@pytest.fixture
def long_job(job: Job, tmp_path: Path) -> Job:
    """A job of so many layers, each with so many batches, that it is still at work when a test gets there."""
    write_samples(job.calib, random_ids(SMALL["vocab_size"], [16] * 25))
    job.model_dir = random_checkpoint(tmp_path / "long", {**SMALL, "num_hidden_layers": 48})
    return job


@contextmanager
def _started(job: Job, line: str) -> Iterator[subprocess.Popen[str]]:
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


@pytest.fixture
def started() -> Started:
    """The job in a process of its own, once it has printed a line that begins with the given text."""
    return _started
