"""Logits of the GPU's network against the CPU engine's, step by step: how far apart, and how far they may be.

The engines round differently. Activations of FP8 products are e4m3 on both; between products the CPU keeps float32, while a GPU
rounds queries, weights of positions and the output head's input to bf16, and adds up in another order, so that now and then an
activation takes the neighbouring e4m3 code. Each further rounding to e4m3 makes more of a difference, whatever it was: those of
float32 sums, 1e-6, are some percent after two layers. So logits tell roundings from mistakes and nothing finer, and operations
are compared one by one elsewhere. No fixed number says how much is too much for some model: the bound is measured on the model
itself. The plain twins with everything between products rounded to bf16, as an engine that computes in bf16 does, are compared
with the CPU engine on the same steps. A network may be 1.25 times as far away on average, and at its worst position twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from arctic_trt.model.mapping import Rank
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.kv_cache import KvCache
from arctic_trt.runtime.step import Chunk, Step

MEAN_FACTOR, WORST_FACTOR = 1.25, 2.0


class Forward(Protocol):
    """A rank's network."""

    rank: Rank
    cache: KvCache

    def forward(self, step: Step) -> Tensor | None: ...


@dataclass(frozen=True, slots=True)
class Sizes:
    """``whole`` tokens of a prompt in one step, ``parts`` of another in one step each, then ``decoded`` tokens of both."""

    whole: int
    parts: tuple[int, int]
    decoded: int

    @property
    def lengths(self) -> tuple[int, int]:
        return self.whole + 2 * self.decoded, sum(self.parts) + self.decoded


@dataclass(frozen=True, slots=True)
class Apart:
    """Differences of the logits of some steps: their mean, the worst position's mean, equal likeliest tokens, the spread."""

    mean: float
    worst: float
    same_token: float
    spread: float


class Rounded:
    """Operations whose float32 results are rounded to bf16."""

    def __init__(self, inner: object) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        def rounding(*arguments: Any) -> Any:
            results = method(*arguments)
            return [_rounded(each) for each in results] if isinstance(results, list) else _rounded(results)

        return rounding


def _rounded(x: Any) -> Any:
    return x.bfloat16().float() if isinstance(x, Tensor) and x.dtype == torch.float32 else x


def plan_steps(sizes: Sizes, vocab_size: int, room: KvRoom) -> dict[str, list[Step]]:
    """Steps by what they try, in their order; tokens are random and always the same."""
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in sizes.lengths)
    first = room.blocks_for(len(one))

    def chunk(sequence: int, start: int, end: int) -> Chunk:
        offset, tokens = (0, one) if sequence == 0 else (first, other)
        blocks = range(room.blocks_for(start), room.blocks_for(end))
        mine = tuple(offset + block for block in blocks)
        return Chunk(sequence=sequence, start=start, tokens=tuple(tokens[start:end]), blocks=mine, logits_from=0)

    alone = range(sizes.whole, sizes.whole + sizes.decoded)
    together = zip(range(alone.stop, alone.stop + sizes.decoded), range(sum(sizes.parts), sizes.lengths[1]), strict=True)
    return {
        "prefill": [Step(chunks=(chunk(0, 0, sizes.whole),))],
        "decode": [Step(chunks=(chunk(0, place, place + 1),)) for place in alone],
        "prompt in parts": [
            Step(chunks=(chunk(1, 0, sizes.parts[0]),)),
            Step(chunks=(chunk(1, sizes.parts[0], sum(sizes.parts)),)),
        ],
        "batch": [Step(chunks=(chunk(0, here, here + 1), chunk(1, there, there + 1))) for here, there in together],
    }


def room_for(sizes: Sizes) -> KvRoom:
    return KvRoom(sum(KvRoom(0).blocks_for(length) for length in sizes.lengths))


@torch.inference_mode()
def logits_of(network: Forward, plan: dict[str, list[Step]], columns: int) -> dict[str, Tensor]:
    """The first ``columns`` logits of every position [W, columns] by what the steps try, in host memory."""
    found: dict[str, Tensor] = {}
    for kind, steps in plan.items():
        parts = []
        for step in steps:
            network.cache.assign(step)
            logits_WV = network.forward(step)
            assert logits_WV is not None, "a rank that is alone has the logits"
            parts.append(logits_WV[:, :columns].float().cpu().clone())
        found[kind] = torch.cat(parts)
    network.cache.clear()
    return found


def compare(found: Tensor, wanted: Tensor) -> Apart:
    """Of logits [W, V]."""
    error_W = (found - wanted).abs().mean(-1)
    same = (found.argmax(-1) == wanted.argmax(-1)).float().mean()
    return Apart(error_W.mean().item(), error_W.max().item(), same.item(), wanted.std().item())


def within(found: Apart, bound: Apart) -> bool:
    """Whether ``found`` is no further away than rounding to bf16; false for anything that is not a number."""
    return found.mean <= MEAN_FACTOR * bound.mean and found.worst <= WORST_FACTOR * bound.worst


def rows_of(found: dict[str, Tensor], wanted: dict[str, Tensor], rounded: dict[str, Tensor]) -> Sequence[tuple[str, bool, str]]:
    """For each kind of step its name, whether it is within bounds, and the figures in words."""
    rows = []
    for kind, logits in found.items():
        apart, bound = compare(logits, wanted[kind]), compare(rounded[kind], wanted[kind])
        figures = (
            f"mean error {apart.mean:.4f} (at most {MEAN_FACTOR * bound.mean:.4f}), worst position {apart.worst:.4f} "
            f"(at most {WORST_FACTOR * bound.worst:.4f}), same likeliest token {apart.same_token:.1%} of {len(logits)}, "
            f"logits' deviation {apart.spread:.2f}"
        )
        rows.append((kind, within(apart, bound), figures))
    return rows
