"""Which experts calibration reached: an expert that saw few tokens has little say in its layer's activation scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FEW = 0.1
"""An expert is under-covered with less than this share of its layer's mean."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """``tokens`` is [layers][experts]; ``without`` and ``few`` are disjoint lists of (layer, expert)."""

    tokens: Sequence[Sequence[int]]
    without: list[tuple[int, int]]
    few: list[tuple[int, int]]

    @property
    def experts(self) -> int:
        return sum(map(len, self.tokens))

    def mean(self, layer: int) -> float:
        """Tokens an expert of ``layer``."""
        return sum(self.tokens[layer]) / len(self.tokens[layer])

    def summary(self) -> str:
        """One sentence."""
        if not self.without + self.few:
            return f"All {self.experts:,} experts saw at least a tenth of their layer's mean."
        return (
            f"{len(self.without)} of {self.experts:,} experts saw no token, "
            f"{len(self.few)} more saw fewer than a tenth of their layer's mean."
        )


def assess_coverage(tokens: Sequence[Sequence[int]]) -> Coverage:
    """Find the experts that no token, or few tokens, reached."""
    without, few = [], []
    for layer, counts in enumerate(tokens):
        mean = sum(counts) / len(counts)
        for expert, count in enumerate(counts):
            if count == 0:
                without.append((layer, expert))
            elif count < FEW * mean:
                few.append((layer, expert))
    return Coverage(tokens, without, few)
