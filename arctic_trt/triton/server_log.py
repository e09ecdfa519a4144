"""What tritonserver, its stubs and the ranks write: sorted by weight, without the noise of a machine that has no GPU."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO

LINE = re.compile(r'([IWEF])\d{4} [\d:.]+ \d+ \S+?:\d+\] ?"?(.*?)"?$')
"""A record of the server's own: its weight, date, time, process, place in the source, and text."""
NOISE = re.compile(
    r"CudaDriverHelper|pinned (system )?memory|CUDA memory pool|NVML|DCGM|unable to create stream|Signal \(\d+\) received|"
    r"Failed to create instance|failed to load|which has no loaded version|models that are not available"
)
"""Nothing to worry about without a GPU; and failures to load, which whoever asked for the model is told."""
TABLE = re.compile(r"[+|]|At:$|  (/|<frozen )|$")
"""Tables, and the stacks that a model's failure is printed with."""
LOADING, LOADED = re.compile(r"loading: (\w+):\d+"), re.compile(r"successfully loaded '(\w+)'")
FAILED = re.compile(r"failed to load '(\w+)'[^:]*: (.*)")
TRAIL = re.compile(r"^\w+: |(\\n|\s)*(At:.*)?$")
"""What surrounds a failure's own words: its kind, and the stack."""
LEVELS = {"I": logging.DEBUG, "W": logging.WARNING, "E": logging.ERROR, "F": logging.ERROR}
KEPT_LINES = 20

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ServerLog:
    """Reads one server's output; ``on_model`` is told of each model that begins (False) and has finished (True) loading."""

    on_model: Callable[[str, bool], None]
    failures: dict[str, str] = field(default_factory=dict)
    """Models that did not load, and why."""
    _last: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    _ours: bool = False

    def follow(self, stream: IO[str]) -> None:
        """Read ``stream`` to its end."""
        for line in stream:
            self.take(line.rstrip())

    def take(self, line: str) -> None:
        """One line; those that do not begin as the server's do belong to a table of its, or are a model's or a rank's words."""
        match = LINE.match(line)
        if match is None:
            if NOISE.search(line) or TABLE.match(line):
                logger.debug("%s", line)
            else:
                self._last.append(line)
                logger.info("%s", line)
            return
        weight, text = match.groups()
        if found := FAILED.search(text):
            self.failures[found[1]] = TRAIL.sub("", found[2])
        elif found := LOADING.search(text) or LOADED.search(text):
            self.on_model(found[1], found.re is LOADED)
        if NOISE.search(text):
            weight = "I"
        if weight != "I":
            self._last.append(text)
        logger.log(LEVELS[weight], "tritonserver: %s", text)

    def last_words(self) -> str:
        """Why the server ended, as far as it said: the models that did not load, else the last warning; perhaps nothing."""
        if self.failures:
            return "; ".join(f"{model} did not load: {why}" for model, why in self.failures.items())
        return self._last[-1] if self._last else ""
