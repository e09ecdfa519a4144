"""Tokens that the device chooses: how, in plain torch; where the next step finds them; and their way to the host.

Legend: K choices of a step, V vocab, N candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arctic_trt.runtime.cuda.staging import staging_buffer
from arctic_trt.runtime.outcome import BROKEN
from arctic_trt.runtime.step import Choice


def choose_row(logits_V: Tensor, choice: Choice) -> int:
    """The token that :mod:`arctic_trt.runtime.sampler` chooses, candidates in the same order, or :data:`BROKEN`."""
    if not logits_V.isfinite().all():
        return BROKEN
    if choice.temperature == 0:
        return int(logits_V.argmax())
    ids = _largest(logits_V, int(choice.top_k) or len(logits_V))
    weights = ((logits_V[ids] - logits_V.max()) / torch.tensor(choice.temperature, dtype=torch.float32)).exp()
    if choice.top_p < 1:
        goal = choice.top_p * weights.sum(dtype=torch.float64)
        sums = weights.sort(descending=True).values.cumsum(0, dtype=torch.float64)
        kept = _largest(weights, int((sums < goal).sum()) + 1)
        ids, weights = ids[kept], weights[kept]
    weights = weights.where(weights >= torch.tensor(choice.min_p, dtype=torch.float32), 0)
    sums = weights.cumsum(0, dtype=torch.float64)
    able = weights > 0
    found = (sums > choice.uniform * sums[-1]) & able
    return int(ids[found.nonzero()[0, 0] if found.any() else able.nonzero()[-1, 0]])


def _largest(values_N: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest, all if there are fewer: those above the last, then the first of those equal to it."""
    if count >= len(values_N):
        return torch.arange(len(values_N), device=values_N.device)
    smallest = values_N.topk(count).values[-1]
    above = (values_N > smallest).nonzero().flatten()
    return torch.cat((above, (values_N == smallest).nonzero().flatten()[: count - len(above)]))


@dataclass(frozen=True, slots=True)
class Arriving:
    """Tokens on their way to the host."""

    token_K: Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        found: list[int] = self.token_K.tolist()
        return found


class ChosenTokens:
    """Memory for the tokens of a step, ``most`` of them: ``token_K`` int32 on ``device``, where the next step finds them.

    In host memory there are two places by turns: while the host has yet to read one step's, the next one's may arrive.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        self.token_K = torch.zeros(most, dtype=torch.int32, device=device)
        self._host = [staging_buffer(most, device) for _ in range(2)]
        self._arrived = [torch.cuda.Event() if device.type == "cuda" else None for _ in range(2)]
        self._turn = 0

    def bring(self, count: int) -> Arriving:
        """Send the first ``count`` to the host; the call before the last must have been waited for."""
        self._turn = 1 - self._turn
        token_K, arrived = self._host[self._turn][:count], self._arrived[self._turn]
        token_K.copy_(self.token_K[:count], non_blocking=True)
        if arrived is not None:
            arrived.record()
        return Arriving(token_K, arrived)
