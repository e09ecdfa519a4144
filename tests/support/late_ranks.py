"""Ranks that compute a step only when somebody asks what came of it, or of a later one: as late as a device may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from arctic_trt.runtime.outcome import Outcome
from arctic_trt.runtime.step import Step

Compute = Callable[[Step], Outcome | None]


class LateRanks:
    """``most_ahead`` is the largest number of steps that were asked for and not computed."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._waiting: list[LateOutcome] = []
        self.most_ahead = 0
        self.steps: list[Step] = []

    def execute(self, step: Step) -> Outcome:
        self.steps.append(step)
        self._waiting.append(LateOutcome(self, step))
        self.most_ahead = max(self.most_ahead, len(self._waiting))
        return self._waiting[-1]

    def compute(self, wanted: LateOutcome) -> Outcome:
        while wanted.found is None:
            late = self._waiting.pop(0)
            late.found = self._compute(late.step)
        return wanted.found


@dataclass(eq=False)
class LateOutcome:
    ranks: LateRanks
    step: Step
    found: Outcome | None = None

    def logits(self) -> Tensor:
        assert not self.step.foreseen
        return self.ranks.compute(self).logits()

    def tokens(self) -> list[int]:
        return self.ranks.compute(self).tokens()
