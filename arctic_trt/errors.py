"""The few kinds of failure a user can meet, each with the exit code that scripts can rely on."""

from __future__ import annotations


class ArcticTrtError(Exception):
    """A failure that one sentence explains.

    ``message`` names the file, tensor or flag, what was expected and what was found; ``hint`` says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class CheckpointError(ArcticTrtError):
    """The bytes of a checkpoint or an engine are not what they should be (exit 1)."""


class UsageError(ArcticTrtError):
    """A flag, a recipe or a configuration file asks for something impossible (exit 2)."""

    exit_code = 2


class RefusedError(ArcticTrtError):
    """Starting would be pointless or harmful: disk, memory, versions, world size, occupied output (exit 3)."""

    exit_code = 3


class VerificationError(ArcticTrtError):
    """A finished checkpoint or engine failed its verification (exit 4)."""

    exit_code = 4
