"""Tokens on their way through the model, one layer at a time: hidden states of all samples, whatever computes a layer.

Attention and the dense path run in the batches that were asked for; an expert's tokens are gathered from all batches into one
matrix product, which is what makes a pass over 128 experts cheap. Where the machine's matrix kernels sum in another order for
another number of rows, that moves the last bit of an activation; nothing else does: the result depends neither on threads nor
on memory nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from arctic_trt.errors import CheckpointError
from arctic_trt.model.layer import Observe, Routing
from arctic_trt.quantize.fp8 import amax
from arctic_trt.quantize.memory import EXPERT_ROWS
from arctic_trt.quantize.rows import Rows
from arctic_trt.quantize.stream import Unit, WorkPool
from arctic_trt.quantize.team import Team

Dense = TypeVar("Dense")
Expert = TypeVar("Expert")
DenseIn = TypeVar("DenseIn", contravariant=True)
ExpertIn = TypeVar("ExpertIn", contravariant=True)
ROW_STEP = 128


class Arithmetic(Protocol[DenseIn, ExpertIn]):
    """What a layer computes, on weights in the form in which its stream delivers them."""

    def dense(self, weights: DenseIn, x_BTD: Tensor, observe: Observe) -> tuple[Tensor, Tensor, Routing]:
        """(hidden states [B, T, D] without the experts' part, what the experts read [B*T, D], and which read it)."""
        ...

    def expert(self, weights: ExpertIn, x_TD: Tensor, observe: Observe) -> Tensor:
        """An expert's output [T, D], not yet weighted."""
        ...


@dataclass(slots=True)
class SiteAmax:
    """Running maximum of |x| at each quantized site of one layer, in the activations' own dtype."""

    layer: int
    values: dict[str, Tensor] = field(default_factory=dict)

    def observe(self, site: str, x: Tensor) -> None:
        """Widen ``site`` by ``x``; raises :class:`CheckpointError` when ``x`` is not finite."""
        value = amax(x).cpu()
        if not torch.isfinite(value):
            raise CheckpointError(
                f"The activations at {site} of layer {self.layer} contain NaN or infinity.",
                "Check the checkpoint's weights and the calibration data.",
            )
        self._widen(site, value)

    def merge(self, other: SiteAmax) -> None:
        """Widen by everything that ``other`` has seen."""
        for site, value in other.values.items():
            self._widen(site, value)

    def _widen(self, site: str, value: Tensor) -> None:
        seen = self.values.get(site)
        self.values[site] = value if seen is None else torch.maximum(seen, value)


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one expert adds to some tokens: y_TD in the rows' dtype, weighted, for ascending indices ``token``."""

    token: Tensor
    y_TD: Tensor
    amax: SiteAmax


class TokenPass(Generic[Dense, Expert]):
    """The tokens of some samples on their way through the model.

    Per layer: :meth:`enter` with the dense weights, :meth:`visits` and :meth:`add` for each expert, :meth:`leave`. Three matrices
    [tokens, hidden] are kept meanwhile, made by ``new_rows``; between layers only ``hidden`` has content. Weights are given on
    ``device``; rows stay in host memory and visit it in parts.
    """

    def __init__(
        self,
        batches: Sequence[Tensor],
        arithmetic: Arithmetic[Dense, Expert],
        top_k: int,
        new_rows: Callable[[int], Rows],
        team: Team,
        device: str = "cpu",
    ) -> None:
        self.device = device
        self.num_tokens = sum(ids.numel() for ids in batches)
        self.hidden = new_rows(self.num_tokens)
        self._arithmetic = arithmetic
        self._top_k = top_k
        self._batches = batches
        self._team = team
        self._moe_x = new_rows(self.num_tokens)
        self._moe_y = new_rows(self.num_tokens)
        self._routing = Routing(torch.empty(0, 0), torch.empty(0, 0))
        self._amax = SiteAmax(-1)

    @torch.inference_mode()
    def embed(self, embedding_VD: Tensor) -> None:
        """Begin: look up every token."""
        for begin, ids in self._spans(range(len(self._batches))):
            self.hidden.write(begin, embedding_VD[ids.flatten()])

    @torch.inference_mode()
    def enter(self, layer: int, unit: Unit[Dense], pool: WorkPool) -> None:
        """Run attention, residual MLP and router of ``layer`` over all batches, this process over its share of them."""
        self._amax = SiteAmax(layer)
        chosen_TK = torch.zeros(self.num_tokens, self._top_k, dtype=torch.int64)
        share_TK = torch.zeros(self.num_tokens, self._top_k)
        spans = self._spans(self._team.share(len(self._batches)))
        works = (unit.releasing(partial(self._dense, layer, unit.weights, begin, ids)) for begin, ids in spans)
        for (begin, ids), (routing, site_amax) in zip(spans, pool.each(works), strict=True):
            rows = slice(begin, begin + ids.numel())
            chosen_TK[rows], share_TK[rows] = routing.chosen_TK, routing.share_TK
            self._amax.merge(site_amax)
        self._team.exchange(self._moe_x, self._row_ranges())
        self._routing = Routing(self._team.sum(chosen_TK), self._team.sum(share_TK))
        self._moe_y.clear()

    def tokens_of(self, expert: int) -> int:
        """How many tokens the router sends to ``expert``."""
        return len(self._routing.tokens_of(expert)[0])

    def visits(self, expert: int, unit: Unit[Expert]) -> list[Callable[[], Contribution]]:
        """The work of passing the tokens routed to ``expert`` through it, in parts that any thread may run.

        The results are :meth:`add`-ed in ascending order of the experts, the order of the additions in the original code.
        """
        token, slot = self._routing.tokens_of(expert)
        share_T = self._routing.share_TK[token, slot]
        works = []
        for begin in range(0, len(token), EXPERT_ROWS):
            part = slice(begin, begin + EXPERT_ROWS)
            visit = partial(self._visit, self._amax.layer, unit.weights, token[part], share_T[part])
            works.append(unit.releasing(visit))
        return works

    @torch.inference_mode()
    def add(self, contribution: Contribution) -> None:
        """Take in what an expert adds."""
        self._moe_y.add(contribution.token, contribution.y_TD)
        self._amax.merge(contribution.amax)

    @torch.inference_mode()
    def _dense(self, layer: int, dense: Dense, begin: int, ids: Tensor) -> tuple[Routing, SiteAmax]:
        """One batch through everything but the experts; its rows move on to the post-attention, post-MLP sum."""
        site_amax = SiteAmax(layer)
        x_BTD = self.hidden.read(begin, begin + ids.numel()).view(*ids.shape, -1).to(self.device)
        y_BTD, moe_x_TD, routing = self._arithmetic.dense(dense, x_BTD, site_amax.observe)
        self._moe_x.write(begin, moe_x_TD.cpu())
        self.hidden.write(begin, y_BTD.flatten(0, 1).cpu())
        return Routing(routing.chosen_TK.cpu(), routing.share_TK.cpu()), site_amax

    @torch.inference_mode()
    def _visit(self, layer: int, weights: Expert, token: Tensor, share_T: Tensor) -> Contribution:
        site_amax = SiteAmax(layer)
        x_TD = F.pad(self._moe_x.gather(token).to(self.device), (0, 0, 0, padded_rows(len(token)) - len(token)))
        y_TD = self._arithmetic.expert(weights, x_TD, site_amax.observe)[: len(token)].cpu()
        return Contribution(token, (y_TD * share_T[:, None]).to(y_TD.dtype), site_amax)

    @torch.inference_mode()
    def leave(self) -> dict[str, Tensor]:
        """Advance the hidden states to the next layer and return the amax of every site of this one."""
        self._team.add_up(self._moe_y, self.num_tokens)
        for begin, ids in self._spans(self._team.share(len(self._batches))):
            end = begin + ids.numel()
            self.hidden.write(begin, self.hidden.read(begin, end) + self._moe_y.read(begin, end))
        self._team.exchange(self.hidden, self._row_ranges())
        return self._team.maximum(self._amax.values)

    def close(self) -> None:
        for rows in (self.hidden, self._moe_x, self._moe_y):
            rows.close()

    def _spans(self, mine: range) -> list[tuple[int, Tensor]]:
        """(first row, ids) of the given batches."""
        begins = [0]
        for ids in self._batches:
            begins.append(begins[-1] + ids.numel())
        return [(begins[index], self._batches[index]) for index in mine]

    def _row_ranges(self) -> list[tuple[int, int]]:
        """Which rows each process of the team has computed."""
        ranges = []
        for member in range(self._team.size):
            spans = self._spans(self._team.share(len(self._batches), member))
            ranges.append((spans[0][0], spans[-1][0] + spans[-1][1].numel()) if spans else (0, 0))
        return ranges


def padded_rows(count: int) -> int:
    """``count`` rounded up to one of few sizes; rows of zeros change neither the others nor any maximum.

    Matrix libraries prepare, and keep, a kernel for every shape they meet: hundreds of megabytes when each expert has its own.
    """
    step = ROW_STEP if count > ROW_STEP else max(8, 1 << (count - 1).bit_length())
    return -(-count // step) * step
