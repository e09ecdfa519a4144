"""Arctic's forward pass on one rank and one GPU: a step in, chosen tokens or float32 logits out on rank 0.

Router and experts read the normed *input* of the layer, so they run on a stream of their own beside attention and residual MLP;
their sums meet before the layer's second reduction. A step that takes one token of each sequence is one CUDA graph, recorded
beforehand for some numbers of sequences, of which the next larger is taken.

All ranks of the last stage have all logits, choose alike, and keep what they chose for the next step; each tells it to its
partner in the first stage. So a step may be asked for before the host knows the tokens of the last one.

Legend: T tokens, D hidden, V vocab, W positions whose logits are wanted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.layer import rotary_tables
from arctic_trt.model.mapping import Rank
from arctic_trt.runtime.communicator import Communicator
from arctic_trt.runtime.cuda.choose import Arriving, ChosenTokens
from arctic_trt.runtime.cuda.graphs import Recorded, out_of_memory_is_refused, record
from arctic_trt.runtime.cuda.ops import FusedOps, NormOutput
from arctic_trt.runtime.cuda.staging import (
    Layout,
    Staged,
    Staging,
    fill,
    places_of_choices,
    plan_decode_layout,
    plan_layout,
    staged,
)
from arctic_trt.runtime.kernels import Projection
from arctic_trt.runtime.kv_cache import KvCache
from arctic_trt.runtime.layer import plan_shape
from arctic_trt.runtime.network import bring_to_rank_0
from arctic_trt.runtime.scheduler import PROMPT_LOGITS_A_STEP
from arctic_trt.runtime.step import Chunk, Step
from arctic_trt.runtime.weights import LayerWeights, RankWeights

Held = TypeVar("Held", Tensor, Projection)
EXACT_SUM_TOKENS = 64
"""Up to this many tokens ranks add up float32; more are added in bf16, where the bytes are what takes time."""


Decode = tuple[Tensor, Tensor | None]
"""Of a recorded step: the integers that it reads, and its logits on the last stage."""


class CudaNetwork:
    """One rank of an engine; :meth:`forward` is called on all ranks with the same step.

    ``weights`` and ``cache`` lie on ``device``, whose cache has a block more than its room, for what is not kept. ``graphs`` are
    the numbers of sequences for which :meth:`prepare` records decode steps, none without a GPU. Steps have at most
    ``max_choices``.
    """

    def __init__(
        self,
        config: ArcticConfig,
        rank: Rank,
        weights: RankWeights,
        cache: KvCache,
        comm: Communicator,
        ops: FusedOps,
        *,
        device: torch.device,
        max_seq_len: int,
        max_choices: int = 256,
        graphs: Sequence[int] = (),
    ) -> None:
        self.config, self.rank, self.cache, self.comm = config, rank, cache, comm
        self.weights = replace(weights, layers=[replace(layer, router=narrowed(layer.router)) for layer in weights.layers])
        self._ops, self._device, self._graphs = ops, device, sorted(graphs)
        self._shape = plan_shape(config, rank)
        self._max_seq_len = min(max_seq_len, config.max_position_embeddings)
        tables = rotary_tables(torch.arange(self._max_seq_len), config.head_dim, config.rope_theta)
        self._rotary = tables[0].to(device), tables[1].to(device)
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._recorded: dict[int, Recorded[Decode]] = {}
        self._staging = Staging(device)
        self._chosen = ChosenTokens(max_choices, device)
        self._before = Step()

    @torch.inference_mode()
    def prepare(self, most_tokens: int) -> None:
        """Record decode steps, and run the largest step that can come, one of ``most_tokens``; the cache has got its room.

        All ranks do so together. Raises :class:`RefusedError` where the device has not the memory for it.
        """
        self._recorded = record(self._graphs, self._decode, self._device)
        longest = min(most_tokens, self._max_seq_len)
        counts = [longest] * (most_tokens // longest) + [most_tokens % longest] * bool(most_tokens % longest)
        with out_of_memory_is_refused(f"A step of {most_tokens} tokens", self._device):
            step = nobodys_step(counts, PROMPT_LOGITS_A_STEP + len(counts))
            layout = plan_layout(step, self._group, self._shape.kv_heads, self._width)
            self._run(self._stage_nobodys(step, layout)[1], step.num_logits)

    def _decode(self, sequences: int) -> Callable[[], Decode]:
        """A decode step of ``sequences``, to be recorded."""
        layout = plan_decode_layout(sequences, self._group, self._shape.kv_heads, self._width)
        array, step = self._stage_nobodys(nobodys_step([1] * sequences, sequences), layout)
        return lambda: (array, self._run(step, layout.wanted))

    def _stage_nobodys(self, step: Step, layout: Layout) -> tuple[Tensor, Staged]:
        """A :func:`nobodys_step` on the device, where all sequences have the spare block for each of theirs."""
        room = self.cache.room
        tables = {chunk.sequence: [room.num_blocks] * room.blocks_for(len(chunk.tokens)) for chunk in step.chunks}
        host = torch.empty(layout.size, dtype=torch.int32)
        fill(host.numpy(), layout, step, {}, tables, room.block_tokens, room.num_blocks * room.block_tokens)
        array = host.to(self._device)
        return array, staged(array, layout)

    def forget(self) -> None:
        """Let go of what :meth:`prepare` recorded."""
        self._recorded.clear()

    def forward(self, step: Step) -> Tensor | None:
        """Logits [W, V] of chunks without a choice on rank 0, None on the others and where there are none.

        Keys and values of the step's tokens stay in the cache, what was chosen until the next step. Nothing waits for the device.
        """
        sequences = self._recorded_size(step)
        if sequences is None:
            layout = plan_layout(step, self._group, self._shape.kv_heads, self._width)
            array = torch.empty(layout.size, dtype=torch.int32, device=self._device)
            self._stage(step, layout, array)
            logits_WV = self._run(staged(array, layout), step.num_logits)
        else:
            logits_WV = self._replay(step, sequences)
        rows = [] if step.foreseen else rows_without_choice(step)
        if logits_WV is not None and 0 < len(rows) < len(logits_WV):
            logits_WV = logits_WV[rows]
        logits_WV = bring_to_rank_0(logits_WV, len(rows), self.rank, self.config.vocab_size, self.comm)
        return logits_WV if rows else None

    def bring_chosen(self) -> Arriving:
        """What the last step chose, on its way to the host."""
        return self._chosen.bring(self._before.num_choices)

    @property
    def _group(self) -> int:
        return self._shape.heads // self._shape.kv_heads

    @property
    def _width(self) -> int:
        return self.cache.room.blocks_for(self._max_seq_len)

    def _recorded_size(self, step: Step) -> int | None:
        """For how many sequences a graph can take this step, None if none can."""
        if step.num_tokens != len(step.chunks) or step.num_logits != len(step.chunks):
            return None
        return min((size for size in self._recorded if size >= len(step.chunks)), default=None)

    def _stage(self, step: Step, layout: Layout, array: Tensor) -> None:
        """Have the device read ``step`` into ``array``."""
        host, room, chosen = self._staging.take(layout.size), self.cache.room, places_of_choices(self._before)
        fill(host.numpy(), layout, step, chosen, self.cache.tables, room.block_tokens, room.num_blocks * room.block_tokens)
        array.copy_(host, non_blocking=True)
        self._staging.sent()
        self._before = step

    def _replay(self, step: Step, sequences: int) -> Tensor | None:
        layout = plan_decode_layout(sequences, self._group, self._shape.kv_heads, self._width)
        recorded = self._recorded[sequences]
        array, logits_WV = recorded.result
        self._stage(step, layout, array)
        recorded.graph.replay()
        return None if logits_WV is None else logits_WV[: step.num_logits]

    def _run(self, step: Staged, num_logits: int) -> Tensor | None:
        """Everything between the step's integers and this stage's result; recorded as it is."""
        x_TD = self._embed(step) if self.rank.is_first_stage else self._receive_hidden(len(step.token_T))
        partial_TD: Tensor | None = None
        for weights, pages in zip(self.weights.layers, self.cache.pages, strict=True):
            x_TD, partial_TD = self._layer(x_TD, partial_TD, weights, pages, step)
        logits_WV: Tensor | None = None
        if self.rank.is_last_stage:
            logits_WV = self._logits(x_TD, partial_TD, step.wanted_W) if num_logits else None
        else:
            sum_TD = x_TD if partial_TD is None else x_TD + partial_TD.float()
            self.comm.send(sum_TD, self.rank.index + self.rank.mapping.tp_size)
        if len(step.row_K):
            self._choose(logits_WV, step)
        return logits_WV

    def _choose(self, logits_WV: Tensor | None, step: Staged) -> None:
        """Keep what is chosen where the next step looks for it, in the last stage and in the first."""
        chosen_K, partner = self._chosen.token_K[: len(step.row_K)], self.rank.tp_rank
        if logits_WV is not None:
            self._ops.choose(logits_WV, step.row_K, step.choice_KF, chosen_K)
            if partner != self.rank.index:
                self.comm.send(chosen_K.float(), partner)
        elif self.rank.is_first_stage:
            last = (self.rank.mapping.pp_size - 1) * self.rank.mapping.tp_size
            chosen_K.copy_(self.comm.receive((len(chosen_K),), last + partner))

    def _embed(self, step: Staged) -> Tensor:
        """Each rank looks up the tokens of its rows and leaves zeros for the others."""
        rows_VD = _there(self.weights.embedding)
        x_TD = self._ops.embed(step.token_T, self._chosen.token_K, rows_VD, self.rank.tp_rank * len(rows_VD))
        self.comm.all_reduce(x_TD)
        return x_TD

    def _receive_hidden(self, tokens: int) -> Tensor:
        return self.comm.receive((tokens, self.config.hidden_size), self.rank.index - self.rank.mapping.tp_size)

    def _layer(
        self, x_TD: Tensor, partial_TD: Tensor | None, weights: LayerWeights, pages: Tensor, step: Staged
    ) -> tuple[Tensor, Tensor]:
        """The post-attention sum, and what experts and residual MLP add to it, which the next layer's norm adds up."""
        ops, eps = self._ops, self._shape.eps
        reduced = torch.float32 if len(x_TD) <= EXACT_SUM_TOKENS else torch.bfloat16
        outputs = [
            NormOutput(weights.input_norm, weights.qkv),
            NormOutput(weights.post_norm, weights.expert_fc),
            NormOutput(weights.post_norm, None),
        ]
        x_TD, attention_in, experts_in, router_in = ops.norm(x_TD, partial_TD, outputs, eps)
        with self._beside():
            experts = range(self._shape.first_expert, self._shape.first_expert + len(weights.expert_fc.weight))
            routed = ops.route(router_in, weights.router, self._shape.top_k, experts)
            inner = ops.expert_gated(experts_in, routed, weights.expert_fc, weights.expert_proj)
            slots_SD = ops.expert_project(inner, routed, weights.expert_proj)
        qkv = ops.project(attention_in, weights.qkv, torch.float32)
        places = (step.position_T, pages, step.slot_T, step.rows)
        attended = ops.attend(qkv, self._rotary, *places, weights.kv_scale, weights.dense)
        attended_TD = ops.project(attended, weights.dense, reduced)
        self.comm.all_reduce(attended_TD)
        sum_TD, residual_in = ops.norm(x_TD, attended_TD, [NormOutput(weights.residual_norm, weights.residual_fc)], eps)
        residual = ops.gated(residual_in, weights.residual_fc, weights.residual_proj)
        self._meet()
        added_TD = ops.project_and_combine(residual, weights.residual_proj, slots_SD, routed, reduced)
        self.comm.all_reduce(added_TD)
        return sum_TD, added_TD

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """What is launched within runs beside what is launched after it, until they :meth:`_meet`."""
        if self._aside is None:
            yield
            return
        self._aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._aside):
            yield

    def _meet(self) -> None:
        if self._aside is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._aside)

    def _logits(self, x_TD: Tensor, partial_TD: Tensor | None, wanted_W: Tensor) -> Tensor:
        norm, lm_head = _there(self.weights.final_norm), _there(self.weights.lm_head)
        partial_WD = None if partial_TD is None else partial_TD.index_select(0, wanted_W)
        outputs = [NormOutput(norm, lm_head)]
        _, normed = self._ops.norm(x_TD.index_select(0, wanted_W), partial_WD, outputs, self.config.rms_norm_eps)
        return self.comm.all_gather(self._ops.project(normed, lm_head, torch.float32))[:, : self.config.vocab_size]


def narrowed(weight: Tensor) -> Tensor:
    """The same numbers in bf16 if it has them all, as it has a router's, which a checkpoint keeps in float32."""
    narrow = weight.bfloat16()
    return narrow if torch.equal(narrow.float(), weight) else weight


def nobodys_step(counts: Sequence[int], most_logits: int) -> Step:
    """A step of new sequences of ``counts`` tokens each, which are all token 0 and want ``most_logits`` if there are so many."""
    chunks, left = [], most_logits
    for row, count in enumerate(counts):
        wanted = min(count, left)
        left -= wanted
        chunks.append(Chunk(sequence=row, start=0, tokens=(0,) * count, blocks=(), logits_from=count - wanted))
    return Step(chunks=tuple(chunks))


def rows_without_choice(step: Step) -> list[int]:
    """Of a step's logits, those that the host wants."""
    asking = [chunk.choice is None for chunk in step.chunks for _ in range(chunk.num_logits)]
    return [row for row, asked in enumerate(asking) if asked]


def _there(part: Held | None) -> Held:
    if part is None:
        raise RuntimeError("another pipeline stage has this part")
    return part
