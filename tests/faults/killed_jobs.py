"""A batch job that dies within its N-th write to the output, or when somebody kills it. Runs in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import arctic_trt.runtime.jobs.job  # noqa: F401 - loaded once, before the processes fork
from arctic_trt.cli.main import run_cli


@dataclass(frozen=True)
class Death:
    """In the middle of the ``at_write``-th write, of which a ``share`` gets to the file."""

    at_write: int
    share: float


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.faults.killed_jobs", "transformers.tokenization_utils_tokenizers"])


def start(argv: list[str], errors: Path, *, pace_s: float = 0.0, death: Death | None = None) -> BaseProcess:
    """Begin ``argv`` in another process, with stderr in the file ``errors``, and a rest before each write."""
    process = PROCESSES.Process(target=_run, args=(argv, errors, pace_s, death))
    process.start()
    return process


def _run(argv: list[str], errors: Path, pace_s: float, death: Death | None) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    original, count = os.write, 0

    def write(descriptor: int, data: bytes) -> int:
        nonlocal count
        time.sleep(pace_s)
        if death is not None and count == death.at_write:
            original(descriptor, data[: int(death.share * len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return original(descriptor, data)

    os.write = write
    raise SystemExit(run_cli(argv))
