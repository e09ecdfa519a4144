"""The report on disk: records of commands, and what is drawn from all of them. Every file appears whole or not at all."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arctic_trt.checkpoint.output_dir import CARD, MARKER, is_own_card, lock_directory, write_bytes
from arctic_trt.errors import RefusedError
from arctic_trt.report.page.card import draw_card
from arctic_trt.report.page.figures import PICTURES
from arctic_trt.report.page.page import draw_page
from arctic_trt.report.page.records import REPORT_DIR, read_records

PAGE = f"{REPORT_DIR}/report.html"
logger = logging.getLogger(__name__)


def save_record(checkpoint_dir: Path, name: str, record: Mapping[str, Any]) -> None:
    """Write ``report/NAME.json``, from which :func:`update_report` draws; raises OSError where the disk cannot be written."""
    with _directory(checkpoint_dir) as report_dir:
        write_bytes(report_dir / f"{name}.json", (json.dumps(record, indent=2) + "\n").encode())


def update_report(checkpoint_dir: Path) -> Path:
    """Draw the page, its pictures and the model card from the records that are there; returns the path of the page.

    The page is written last: where it is, everything else is. A README.md that is not ours stays as it is. Raises OSError
    where the disk cannot be written, and :class:`RefusedError` while another process writes there or the checkpoint is
    unfinished.
    """
    records = read_records(checkpoint_dir)
    page = draw_page(records)
    card = draw_card(records, page.pictures)
    with _directory(checkpoint_dir) as report_dir:
        _write_card(checkpoint_dir / CARD, card)
        for picture in page.pictures:
            write_bytes(report_dir / f"{picture.name}.png", picture.light)
        _remove_pictures_but(report_dir, {f"{picture.name}.png" for picture in page.pictures})
        write_bytes(checkpoint_dir / PAGE, _encode(page.html))
    return checkpoint_dir / PAGE


@contextmanager
def _directory(checkpoint_dir: Path) -> Iterator[Path]:
    """``report/``, made if need be, while nobody else writes the checkpoint."""
    lock = lock_directory(checkpoint_dir)
    try:
        if (checkpoint_dir / MARKER).exists():
            raise RefusedError(f"{checkpoint_dir} is unfinished.", "Repeat the command that began it.")
        (checkpoint_dir / REPORT_DIR).mkdir(exist_ok=True)
        yield checkpoint_dir / REPORT_DIR
    finally:
        os.close(lock)


def _write_card(path: Path, card: str) -> None:
    if path.exists() and not is_own_card(path):
        logger.info("%s is not a model card of ours and stays as it is.", path)
    else:
        write_bytes(path, _encode(card))


def _remove_pictures_but(report_dir: Path, names: set[str]) -> None:
    """Pictures of records that are there no more would tell of another checkpoint."""
    for name in {f"{name}.png" for name in PICTURES} - names:
        (report_dir / name).unlink(missing_ok=True)


def _encode(text: str) -> bytes:
    """UTF-8, in which file names that are none are spelled out."""
    return text.encode("utf-8", "backslashreplace")
