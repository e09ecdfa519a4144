"""The output of a batch job: whole lines, each once, whenever the process is killed.

A result is one line, written at once; only the last line can be torn, and then it is cut off and its request is done again. A
line's ``id`` carries its request's place in the input, so that the file itself says what is done. Beside it, ``FILE.job.json``
says of which input and settings these are the results.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arctic_trt.checkpoint.output_dir import differences, named_errors, write_json
from arctic_trt.errors import RefusedError
from arctic_trt.runtime.jobs.input_file import InputMark, Shard
from arctic_trt.runtime.jobs.results import ID

logger = logging.getLogger(__name__)

FORMAT = 1
SYNC_EVERY_S = 1.0
OTHER_FILE = "Choose another --output_file, or remove this one to start over."
WRITTEN_ID = re.compile(re.escape(ID) + r"([1-9][0-9]*)")


class NoResultError(Exception):
    """A line that is no whole result of ours."""


@dataclass(frozen=True, slots=True)
class Resume:
    """What an output file holds: ``done[index]`` is 1 for finished lines; what follows ``num_bytes`` is to be cut off."""

    done: bytearray
    num_done: int
    num_errors: int
    num_bytes: int


def plan_resume(lines: Iterable[bytes], num_lines: int, shard: Shard, name: object = "The output") -> Resume:
    """Look at the lines of an existing output for an input of ``num_lines``.

    A line that is torn, or that a power loss has left without its content, can only be at the end. Raises
    :class:`RefusedError` naming the line for one in between, and for results that cannot belong to this job.
    """
    done, num_done, num_errors, num_bytes, unreadable = bytearray(num_lines), 0, 0, 0, 0
    for number, line in enumerate(lines, 1):
        try:
            index, failed = read_result(line)
        except NoResultError:
            unreadable = unreadable or number
            continue
        if unreadable:
            raise RefusedError(
                f"{name} line {unreadable} is not a result of a batch job, but results follow it.",
                "Remove that line to have its request done again, or choose another --output_file.",
            )
        if index >= num_lines or index not in shard or done[index]:
            what = "is there twice" if index < num_lines and done[index] else f"is none of this job's (--shard {shard})"
            raise RefusedError(f"{name} line {number} is the result of input line {index + 1}, which {what}.", OTHER_FILE)
        done[index] = 1
        num_done += 1
        num_errors += failed
        num_bytes += len(line)
    return Resume(done, num_done, num_errors, num_bytes)


def read_result(line: bytes) -> tuple[int, bool]:
    """(index of the request's line in the input, whether it is an error line); raises :class:`NoResultError`."""
    try:
        if not line.endswith(b"\n"):
            raise NoResultError
        value = json.loads(line.decode())
        match = WRITTEN_ID.fullmatch(value["id"])
        error = value["error"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise NoResultError from None
    if match is None:
        raise NoResultError
    return int(match[1]) - 1, error is not None


class OutputFile:
    """An output file that this process has for itself; make one with :func:`open_output`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._synced = time.monotonic()

    @property
    def empty(self) -> bool:
        return os.fstat(self._descriptor).st_size == 0

    def lines(self) -> Iterator[bytes]:
        """The lines that are there, with their ends."""
        with self.path.open("rb") as file:
            yield from file

    def cut(self, num_bytes: int) -> None:
        """Forget what follows the first ``num_bytes``."""
        surplus = os.fstat(self._descriptor).st_size - num_bytes
        if surplus:
            logger.info("%s ends within a result: %d bytes are cut off, and that request is done again.", self.path, surplus)
            with named_errors(self.path):
                os.truncate(self._descriptor, num_bytes)

    def append(self, line: bytes) -> None:
        """Add a line. It survives the death of this process at once, a power loss after at most about a second.

        Raises :class:`ArcticTrtError` when the disk refuses.
        """
        with named_errors(self.path):
            while line:
                line = line[os.write(self._descriptor, line) :]
            if time.monotonic() - self._synced >= SYNC_EVERY_S:
                self.sync()

    def sync(self) -> None:
        """Make all lines durable."""
        with named_errors(self.path):
            os.fdatasync(self._descriptor)
        self._synced = time.monotonic()


@contextmanager
def open_output(path: Path) -> Iterator[OutputFile]:
    """Create or open ``path`` and keep others out; raises :class:`RefusedError` if another process writes it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise RefusedError(f"--output_file {path} cannot be written: {error.strerror}.", "Choose another one.") from None
    try:
        _lock(path, descriptor)
        output = OutputFile(path, descriptor)
        yield output
        output.sync()
    finally:
        os.close(descriptor)


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RefusedError(
            f"Another process is writing {path}.", "Wait for it, or give each instance its --shard and --output_file."
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): make sure that no other process writes it.", path, error.strerror)


def record_path(path: Path) -> Path:
    """Where the record of the job is whose results are in ``path``."""
    return path.with_name(path.name + ".job.json")


def read_record(output: OutputFile, settings: Mapping[str, Any]) -> InputMark | None:
    """What the input was like when results were last written, None for a new output.

    Raises :class:`RefusedError` for an output that is not a batch job's or that belongs to one with other ``settings``.
    """
    if output.empty:
        return None
    record = record_path(output.path)
    try:
        value = json.loads(record.read_text(encoding="utf-8"))
        then, known = value["settings"], InputMark(value["input"]["lines"], value["input"]["digest"])
        readable = value["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError):
        readable = False
    if not readable:
        raise RefusedError(f"{output.path} is not empty, and {record} does not say which job's it is.", OTHER_FILE)
    if then != settings:
        raise RefusedError(
            f"{output.path} belongs to a job that differs in {differences(then, settings)}.",
            "Repeat the command that began it to resume, or choose another --output_file.",
        )
    return known


def write_record(output: OutputFile, settings: Mapping[str, Any], mark: InputMark) -> None:
    """Say which job's results are in ``output``; comes before the first of them."""
    record = record_path(output.path)
    with named_errors(record):
        write_json(record, {"format": FORMAT, "settings": dict(settings), "input": mark.as_dict()})
