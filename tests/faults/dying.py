"""A command line that dies at a chosen change to the disk. Runs in a process of its own; see test_faults.py."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

import arctic_trt.quantize.pipeline  # noqa: F401 - loaded once, before the processes fork
from arctic_trt.checkpoint import tensors
from arctic_trt.cli.main import run_cli

CHANGES = ("pwrite", "fdatasync", "fsync", "replace", "unlink", "mkdir", "rmdir")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.faults.dying"])


@dataclass(frozen=True)
class Death:
    """A signal at the ``at``-th change to the disk, in the middle of it if it is a write; or when a file gets a certain name."""

    at: int | None = None
    name: str | None = None
    after: bool = False
    signal: int = signal.SIGKILL

    def due(self, count: int, call: str, args: tuple[Any, ...]) -> bool:
        if self.name is not None:
            return call == "replace" and str(args[1]).endswith(self.name)
        return count == self.at


@dataclass(frozen=True)
class Outcome:
    """How a run ended: by a signal (negative code) or with an exit code and the names of all changes in order."""

    code: int
    changes: list[str]


def run_and_die(argv: list[str], death: Death | None = None) -> Outcome:
    """Run ``argv`` in another process."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_run, args=(argv, death, sender))
    process.start()
    sender.close()
    process.join()
    assert process.exitcode is not None
    return Outcome(process.exitcode, []) if process.exitcode < 0 else receiver.recv()


def _run(argv: list[str], death: Death | None, report: Connection) -> None:
    torch.set_num_threads(1)
    done: list[str] = []
    lock = threading.Lock()
    for name in CHANGES:
        setattr(os, name, _counted(name, getattr(os, name), done, lock, death))
    tensors.reserve = _counted("reserve", tensors.reserve, done, lock, death)
    code = run_cli(argv)
    report.send(Outcome(code, done))


def _counted(
    name: str, original: Callable[..., Any], done: list[str], lock: threading.Lock, death: Death | None
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with lock:
            due = death is not None and death.due(len(done), name, args)
            done.append(name)
        if not due:
            return original(*args, **kwargs)
        assert death is not None
        if name == "pwrite":
            descriptor, data, offset = args
            original(descriptor, data[: len(data) // 2], offset)
        if death.after:
            original(*args, **kwargs)
        os.kill(os.getpid(), death.signal)
        return None if death.after else original(*args, **kwargs)  # a signal that is not deadly at once

    return call


def race(argv: list[str], start: Any, codes: Any) -> None:
    """Run ``argv`` at the moment at which others do, and report the exit code."""
    torch.set_num_threads(1)
    start.wait()
    codes.put(run_cli(argv))
