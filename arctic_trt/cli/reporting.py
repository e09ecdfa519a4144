"""The report that the commands leave in a checkpoint; see :mod:`arctic_trt.report.page`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from arctic_trt.errors import ArcticTrtError
from arctic_trt.output import Output

logger = logging.getLogger(__name__)


def report_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--no_report``."""
    return click.option("--no_report", is_flag=True, help="Do not write report/report.html and README.md.")(command)


def write_report(checkpoint_dir: Path, output: Output, **records: Mapping[str, Any]) -> None:
    """Keep ``records`` by name as JSON and draw everything anew. A disk that refuses is worth a warning, and no failure."""
    from arctic_trt.report.page.write import save_record, update_report

    try:
        for name, record in records.items():
            save_record(checkpoint_dir, name, record)
        page = update_report(checkpoint_dir)
    except (OSError, ArcticTrtError) as error:
        reason = f"{error.filename or checkpoint_dir}: {error.strerror}" if isinstance(error, OSError) else str(error)
        logger.warning("The report was not written: %s", reason)
    else:
        output.note(f"report: {page}")
