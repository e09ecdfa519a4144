"""A command line that dies of SIGKILL at a chosen change to the disk. Runs in a process of its own; see test_faults.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

import arctic_trt.quantize.pipeline  # noqa: F401 - loaded once, before the processes fork
from arctic_trt.cli.main import run_cli

CHANGES = ("pwrite", "ftruncate", "fsync", "replace", "unlink", "mkdir", "rmdir")


def run(argv: list[str], die_at: int | None, report: Connection) -> None:
    """Run ``argv``; at the ``die_at``-th change to the disk, die before it, or in the middle of it if it is a write.

    Sends the exit code and the names of all changes to ``report`` if the end is reached.
    """
    torch.set_num_threads(1)
    done: list[str] = []
    for name in CHANGES:
        setattr(os, name, _counted(name, getattr(os, name), done, die_at))
    code = run_cli(argv)
    report.send((code, done))


def _counted(name: str, original: Callable[..., Any], done: list[str], die_at: int | None) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if len(done) == die_at:
            if name == "pwrite":
                descriptor, data, offset = args
                original(descriptor, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(name)
        return original(*args, **kwargs)

    return call
