"""``arctic-trt verify``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arctic_trt.cli.options import DIRECTORY, output_options
from arctic_trt.cli.reporting import report_option, write_report
from arctic_trt.output import Output, duration, gigabytes

if TYPE_CHECKING:
    from arctic_trt.report.verify.findings import Verification

EPILOG = """\b
Examples, after quantizing and before a GPU hour is spent:
  arctic-trt verify arctic-fp8-tp8
  arctic-trt verify arctic-fp8-tp8 --against snowflake-arctic-instruct
  arctic-trt verify arctic-engine --against arctic-fp8-tp8

Exit code 4 and a table for what is wrong. Warnings deserve a look and do not fail. docs/verification.md says what is caught."""

SHOWN = 20
REFRESH_S = 0.5


@click.command("verify", epilog=EPILOG, short_help="Check a checkpoint or an engine, by itself and against what it was made of.")
@click.argument("path", metavar="CKPT_OR_ENGINE", type=click.Path(path_type=Path))
@click.option("--against", type=DIRECTORY, help="Of a checkpoint its Hugging Face original, of a torch engine its checkpoint.")
@click.option("--sample", type=click.FloatRange(0, 1, min_open=True), help="Look at this share of the matrices.")
@click.option("--full", is_flag=True, help="Look at all of them.  [default]")
@report_option
@output_options
def command(output: Output, path: Path, against: Path | None, sample: float | None, full: bool, no_report: bool) -> None:
    """Check a checkpoint or an engine: files, names, shapes, scales, values; with --against every byte.

    Needs no GPU, and memory for a few experts. What is found goes into a checkpoint's report too.
    """
    if sample is not None and full:
        raise click.UsageError("--sample and --full exclude each other.", click.get_current_context())
    from arctic_trt.report.verify.run import is_checkpoint, verify

    began = time.perf_counter()
    found = verify(path, against, share=sample or 1.0, on_progress=_Progress(output, began))
    seconds = time.perf_counter() - began
    record = record_of(found, path, seconds, against, sample or 1.0)
    output.result(record)
    show_findings(found, output)
    _summarize(found, path, seconds, output)
    if is_checkpoint(path) and not no_report:
        write_report(path, output, verify=record)
    fail_if_wrong(found, path)


def record_of(found: Verification, path: Path, seconds: float, against: Path | None, share: float) -> dict[str, Any]:
    """What ``report/verify.json`` keeps; ``share`` is that of the matrices that were looked at."""
    depth = {"against": str(against) if against else None, "share": share}
    return {**depth, **found.as_dict(), "path": str(path), "seconds": round(seconds, 3)}


class _Progress:
    """A line now and then; a verification of 480 GB takes its time."""

    def __init__(self, output: Output, began: float) -> None:
        self._output, self._began, self._spoke = output, began, began
        self._pause = REFRESH_S

    def __call__(self, found: Verification) -> None:
        now = time.perf_counter()
        if now - self._spoke > self._pause:
            self._spoke, self._pause = now, min(60.0, 2 * self._pause)
            rate = f"{gigabytes(found.bytes_read)} at {gigabytes(found.bytes_read / (now - self._began))}/s"
            self._output.note(f"looked at {rate}, {len(found.errors)} errors")


def show_findings(found: Verification, output: Output) -> None:
    """The findings as a table, errors first."""
    rows = [(item["severity"], item["kind"], item["file"], item["sentence"]) for item in found.as_dict()["findings"]]
    if rows:
        title = f"Findings ({SHOWN} of {len(rows)})" if len(rows) > SHOWN else "Findings"
        styles = {"error": "red", "warning": "yellow"}
        output.table(title, rows[:SHOWN], ("severity", "kind", "file", "what"), always=True, styles=styles)


def _summarize(found: Verification, path: Path, seconds: float, output: Output) -> None:
    if found.qualities:
        rows = [(item.tensor, f"{item.sqnr_db:.1f} dB") for item in found.worst()]
        output.table("Most noise from quantization", rows, ("tensor", "signal to noise"))
    output.table(
        "Verified" if found.passed else "Not verified",
        [
            ("path", str(path)),
            ("tensors", str(found.tensors)),
            ("read", f"{gigabytes(found.bytes_read)} at {gigabytes(found.bytes_read / max(seconds, 1e-9))}/s"),
            ("errors", str(len(found.errors))),
            ("warnings", str(len(found.findings) - len(found.errors))),
            ("time", duration(seconds)),
        ],
    )


def fail_if_wrong(found: Verification, path: Path) -> None:
    """Raise :class:`VerificationError` with the first of the errors, if there are any."""
    from arctic_trt.errors import VerificationError

    if not found.passed:
        more = f" and {len(found.errors) - 1} more" if len(found.errors) > 1 else ""
        raise VerificationError(f"{path} is not right: {found.errors[0].sentence}{more}", "Copy it again, or make it again.")
