"""A batch job that dies within its N-th write to the output, or when somebody kills it. Runs in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

import arctic_trt.runtime.jobs.job  # noqa: F401 - loaded once, before the processes fork
from arctic_trt.cli.main import run_cli

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.faults.killed_jobs", "transformers.tokenization_utils_tokenizers"])


def start(
    argv: list[str], errors: Path, die_at_write: int | None = None, share: float = 0.5
) -> multiprocessing.process.BaseProcess:
    """Begin ``argv`` in another process, with stderr in the file ``errors``.

    With ``die_at_write`` it writes only a ``share`` of that line's bytes, and dies.
    """
    process = PROCESSES.Process(target=_run, args=(argv, errors, die_at_write, share))
    process.start()
    return process


def _run(argv: list[str], errors: Path, die_at_write: int | None, share: float) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    if die_at_write is not None:
        os.write = _deadly(os.write, die_at_write, share)
    raise SystemExit(run_cli(argv))


def _deadly(original: Callable[[int, bytes], int], left: int, share: float) -> Callable[[int, bytes], int]:
    def write(descriptor: int, data: bytes) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            original(descriptor, data[: int(share * len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(descriptor, data)

    return write
