"""The logger's name and severities. Source: ``tensorrt_llm/logger.py`` of 1.0 to 1.2; like the real one it prints to stdout."""

from __future__ import annotations

import sys

severity_map = {
    "internal_error": 0,
    "error": 1,
    "warning": 2,
    "info": 3,
    "verbose": 4,
    "debug": 5,
    "trace": 6,
}


class Logger:
    """One line a message, marked with its severity."""

    def __init__(self) -> None:
        self.level = "error"

    def set_level(self, min_severity: str) -> None:
        if min_severity not in severity_map:
            raise AssertionError(f"Requested log level {min_severity} is invalid.")
        self.level = min_severity

    def log(self, severity: str, *message: object) -> None:
        if severity_map[severity] <= severity_map[self.level]:
            print(f"[TRT-LLM] [{severity[0].upper()}]", *message, file=sys.stdout, flush=True)

    def error(self, *message: object) -> None:
        self.log("error", *message)

    def warning(self, *message: object) -> None:
        self.log("warning", *message)

    def info(self, *message: object) -> None:
        self.log("info", *message)

    def debug(self, *message: object) -> None:
        self.log("debug", *message)


logger = Logger()
