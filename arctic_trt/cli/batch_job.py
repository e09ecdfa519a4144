"""What ``arctic-trt run`` shows of a batch job: a live line on a terminal, a plain one every few seconds in a log."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from arctic_trt.cli.options import join_job
from arctic_trt.cli.progress import REFRESH_S
from arctic_trt.errors import ArcticTrtError
from arctic_trt.output import Output, duration

if TYPE_CHECKING:
    from arctic_trt.runtime.jobs.job import JobOptions, JobResult, Meter

LOG_EVERY_S = 5.0


def run_batch_job(options: JobOptions, output: Output) -> None:
    """Do a batch job; raises :class:`ArcticTrtError` if not one of its lines could be done."""
    from arctic_trt.runtime.jobs.job import run_job

    join_job(output)
    with terminable(), JobProgress(output) as progress:
        result = run_job(options, progress)
    if result is None:
        return
    _show(result, output)
    if result.hopeless:
        raise ArcticTrtError(
            f"Not one of the {result.meter.lines} lines of {options.input_file} could be done.",
            f"{result.output_file} says why, line by line.",
        )


@contextmanager
def terminable() -> Iterator[None]:
    """Take SIGTERM, which batch systems and mpirun send, for Ctrl-C: files are closed, and the job can be resumed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class JobProgress:
    """Context manager around a job, whose progress callback it is."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._status: Any = None
        self._every_s = LOG_EVERY_S
        self._next = time.monotonic() + LOG_EVERY_S

    def __enter__(self) -> JobProgress:
        if self._output.terminal:
            from rich.console import Console
            from rich.status import Status

            self._every_s, self._next = REFRESH_S, 0.0
            self._status = Status("starting", console=Console(stderr=True))
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._status:
            self._status.stop()

    def __call__(self, meter: Meter) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._every_s
        if self._status:
            self._status.update(progress_line(meter))
        else:
            self._output.note(progress_line(meter))


def progress_line(meter: Meter) -> str:
    """Where the job is and how fast it goes, at this moment."""
    left = meter.seconds_left
    errors = f"  errors {meter.errors}" if meter.errors else ""
    return (
        f"lines {meter.done}/{meter.lines}{errors}  {meter.tokens_per_second:.1f} tokens/s  "
        f"eta {'unknown' if left is None else duration(left)}"
    )


def _show(result: JobResult, output: Output) -> None:
    meter = result.meter
    output.result(result.as_dict())
    output.table(
        "Done",
        [
            ("results", str(result.output_file)),
            ("lines", str(meter.lines)),
            ("completed", str(meter.completed)),
            ("errors", str(meter.errors)),
            ("done before", str(meter.skipped_done)),
            ("prompt tokens", str(meter.prompt_tokens)),
            ("output tokens", f"{meter.output_tokens}, {meter.output_tokens / meter.seconds:.1f} a second"),
            ("time", duration(meter.seconds)),
        ],
    )
