"""The record of a long job: a layer is either in it, with everything the next one needs, or has not happened.

A layer is committed only after its bytes in the output files are durable. Its record is then made durable in turn (temporary
name, fsync, rename, fsync of the directory), after the state that the next layer starts from. Whatever moment the power fails,
the last record that exists describes bytes that exist.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arctic_trt.checkpoint.output_dir import JOURNAL, named_errors, write_json


class Journal:
    """Committed layers of the job in ``output_dir``, in the directory ``.arctic-trt-journal`` there."""

    def __init__(self, output_dir: Path) -> None:
        self.directory = output_dir / JOURNAL

    def open(self) -> None:
        """Create the directory if this is the job's first run."""
        with named_errors(self.directory):
            self.directory.mkdir(exist_ok=True)

    def records(self) -> list[dict[str, Any]]:
        """Records of the committed layers, in order from layer 0."""
        records: list[dict[str, Any]] = []
        while (path := self._record(len(records))).exists():
            records.append(json.loads(path.read_text(encoding="utf-8")))
        return records

    def commit(self, layer: int, record: Mapping[str, Any]) -> None:
        """Record ``layer``, whose bytes and whose :meth:`state` are durable; the state before it is no longer needed."""
        with named_errors(self._record(layer)):
            write_json(self._record(layer), record)
        for path in self.directory.glob(f"layer_{layer - 1:04d}*.state") if layer else ():
            path.unlink(missing_ok=True)

    def state(self, layer: int, part: str = "") -> Path:
        """Where the state after ``layer``, or the named part of it, lies."""
        return self.directory / f"layer_{layer:04d}{part and '-' + part}.state"

    def _record(self, layer: int) -> Path:
        return self.directory / f"layer_{layer:04d}.json"
