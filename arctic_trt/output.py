"""What a person or a program gets to see: results on stdout, everything else on stderr.

On a terminal tables and progress are drawn by rich; in a log they are plain lines that grep finds; with ``--json`` stdout
carries exactly one object.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class Output:
    """Sink of one command; created by the command line and passed down only within it."""

    def __init__(self, *, json_mode: bool = False, verbosity: int = 0) -> None:
        self.json_mode = json_mode
        self.verbosity = verbosity
        self.plain = False
        """Draw nothing, wherever the output seems to go: mpirun gives its ranks a terminal even when it has none itself."""

    def mute(self) -> None:
        """Say nothing any more, results included: another process of the job speaks."""
        self.verbosity, self.json_mode, self.text, self.piece = -1, False, _nothing, _nothing  # type: ignore[method-assign]
        self.configure_logging()

    @property
    def quiet(self) -> bool:
        return self.verbosity < 0

    @property
    def terminal(self) -> bool:
        """Whether stderr is a terminal that a live display may redraw."""
        return sys.stderr.isatty() and not self.quiet and not self.plain

    def note(self, text: str) -> None:
        """A line of progress or advice, on stderr, silenced by ``-q``."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def text(self, text: str, end: str = "\n") -> None:
        """Part of the result for a person; nothing in JSON mode."""
        if not self.json_mode:
            print(text, end=end, flush=True)

    def piece(self, text: str) -> None:
        """A streamed fragment: stdout for a person, stderr when stdout is reserved for JSON."""
        print(text, end="", file=sys.stderr if self.json_mode else sys.stdout, flush=True)

    def table(
        self,
        title: str,
        rows: Sequence[Sequence[str]],
        header: Sequence[str] = (),
        *,
        always: bool = False,
        styles: Mapping[str, str] | None = None,
    ) -> None:
        """Names and values, or as many columns as ``header`` has, as part of the result for a person.

        ``-q`` silences it unless ``always``: a table that is all a command was asked for. On a terminal, cells that are a key
        of ``styles`` are drawn in its style; all are shown as they are, brackets included.
        """
        if self.json_mode or (self.quiet and not always):
            return
        if sys.stdout.isatty() and not self.plain:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text

            table = Table(*(header or ["" for _ in rows[0]]), title=Text(title), title_justify="left", show_header=bool(header))
            for row in rows:
                table.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in row))
            Console().print(table)
            return
        lines = [header, *rows] if header else rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print(title)
        for line in lines:
            print("  " + "  ".join(map(str.ljust, line, widths)).rstrip())

    def result(self, value: Mapping[str, Any]) -> None:
        """The one object of ``--json``; nothing otherwise."""
        if self.json_mode:
            print(json.dumps(value), flush=True)

    def configure_logging(self) -> None:
        """Send the package's log records to stderr: warnings always, notices unless ``-q``, details with ``-v``."""
        level = {-1: logging.ERROR, 0: logging.INFO}.get(self.verbosity, logging.DEBUG)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger = logging.getLogger("arctic_trt")
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _nothing(text: str, end: str = "") -> None:
    pass


def gigabytes(count: float) -> str:
    """Bytes as people read them, decimal units."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as people read them: ``3.2 s``, ``4 min 10 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
