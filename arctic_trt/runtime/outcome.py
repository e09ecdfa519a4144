"""What comes of a step on rank 0, which may still be computing it: asking waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

BROKEN = -1
"""Instead of a token: the logits to choose from are not finite."""


class Outcome(Protocol):
    """Ask before the next but one step is executed, and for logits before the next."""

    def logits(self) -> Tensor:
        """Float32 [W, V] in host memory, of the wanted positions of chunks without a choice, in the step's order."""

    def tokens(self) -> list[int]:
        """One for each chunk with a choice, in the step's order, or :data:`BROKEN`."""


@dataclass(frozen=True, slots=True)
class Logits:
    """The outcome of a step without choices, which has been computed."""

    logits_WV: Tensor

    def logits(self) -> Tensor:
        return self.logits_WV

    def tokens(self) -> list[int]:
        return []
