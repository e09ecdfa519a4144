"""Arctic's forward pass on one rank: a packed step in, float32 logits out on rank 0.

The semantics are those of :mod:`arctic_trt.model.layer`: router and experts read the normed *input* of the layer, the residual
MLP reads the post-attention sum. Two sums over the tensor-parallel group a layer suffice, because the residual MLP's and the
experts' partial results can be added before they are reduced.

Legend: T tokens of the step, D hidden, N query heads, K KV heads, H head dim, V vocab, W positions whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.layer import rotary_tables
from arctic_trt.model.mapping import Rank
from arctic_trt.runtime.communicator import Communicator
from arctic_trt.runtime.kernels import Kernels, Tables
from arctic_trt.runtime.kv_cache import KvCache
from arctic_trt.runtime.step import Step
from arctic_trt.runtime.weights import LayerWeights, RankWeights

Rotary = tuple[Tensor, Tensor]
"""cos and sin, [positions, H] each."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A step as tensors; cos and sin [T, 1, H] broadcast over heads, ``wanted_W`` indexes the packed tokens.

    ``slot_T`` is where the cache stores each token's keys and values, ``tables`` where their sequences' are.
    """

    token_T: Tensor
    wanted_W: Tensor
    slot_T: Tensor
    tables: Tables
    cos: Tensor
    sin: Tensor


class Network:
    """One rank of an engine; :meth:`forward` is called on all ranks with the same step."""

    def __init__(
        self, config: ArcticConfig, rank: Rank, weights: RankWeights, cache: KvCache, comm: Communicator, kernels: Kernels
    ) -> None:
        self.config = config
        self.rank = rank
        self.weights = weights
        self.cache = cache
        self.comm = comm
        self.kernels = kernels
        self._q_heads = config.num_attention_heads // rank.mapping.tp_size
        self._kv_heads = len(rank.kv_heads(config.num_key_value_heads))
        self._rotary = rotary_tables(torch.arange(config.max_position_embeddings), config.head_dim, config.rope_theta)
        self._first_expert = rank.experts(config.num_local_experts).start

    def forward(self, step: Step) -> Tensor | None:
        """Logits [W, V] on rank 0, None on the others; keys and values of the step's tokens stay in the cache."""
        packed = pack(step, self.cache, self._rotary)
        x_TD = self._embed(packed.token_T) if self.rank.is_first_stage else self._receive_hidden(len(packed.token_T))
        for layer, weights in enumerate(self.weights.layers):
            x_TD = self._layer(x_TD, layer, weights, packed)
        if not self.rank.is_last_stage:
            self.comm.send(x_TD, self.rank.index + self.rank.mapping.tp_size)
        logits_WV = self._logits(x_TD[packed.wanted_W]) if self.rank.is_last_stage and step.num_logits else None
        return self._bring_to_rank_0(logits_WV, step.num_logits)

    def _embed(self, token_T: Tensor) -> Tensor:
        """Each rank looks up the tokens of its rows and leaves zeros for the others."""
        rows_VD = self.weights.embedding
        if rows_VD is None:
            raise RuntimeError("only the first stage embeds")
        local_T = token_T - self.rank.tp_rank * len(rows_VD)
        mine_T = (local_T >= 0) & (local_T < len(rows_VD))
        x_TD = self.kernels.embed(rows_VD, local_T.where(mine_T, 0)) * mine_T[:, None]
        self.comm.all_reduce(x_TD)
        return x_TD

    def _receive_hidden(self, tokens: int) -> Tensor:
        return self.comm.receive((tokens, self.config.hidden_size), self.rank.index - self.rank.mapping.tp_size)

    def _layer(self, x_TD: Tensor, layer: int, weights: LayerWeights, packed: Packed) -> Tensor:
        eps, kernels = self.config.rms_norm_eps, self.kernels
        attended_TD = self._attention(kernels.rms_norm(x_TD, weights.input_norm, eps), layer, weights, packed)
        self.comm.all_reduce(attended_TD)
        sum_TD = x_TD + attended_TD.float()
        moe_x_TD = kernels.rms_norm(x_TD, weights.post_norm, eps)
        routing = kernels.route(moe_x_TD, weights.router, self.config.num_experts_per_tok)
        partial_TD = kernels.experts(moe_x_TD, routing, weights.expert_fc, weights.expert_proj, self._first_expert)
        partial_TD += kernels.gated_mlp(
            kernels.rms_norm(sum_TD, weights.residual_norm, eps), weights.residual_fc, weights.residual_proj
        )
        self.comm.all_reduce(partial_TD)
        return sum_TD + partial_TD.float()

    def _attention(self, x_TD: Tensor, layer: int, weights: LayerWeights, packed: Packed) -> Tensor:
        """The part [T, D] of attention's output projection that comes from this rank's heads."""
        heads, kv_heads = self._q_heads, self._kv_heads
        qkv = self.kernels.linear(x_TD, weights.qkv).view(len(x_TD), heads + 2 * kv_heads, -1)
        self.kernels.rotate(qkv, heads + kv_heads, packed.cos, packed.sin)
        q_TNH, k_TKH, v_TKH = torch.split(qkv, [heads, kv_heads, kv_heads], 1)
        pages = self.cache.pages[layer]
        self.kernels.store_kv(k_TKH, v_TKH, pages, packed.slot_T, weights.kv_scale)
        attended = self.kernels.attention(q_TNH, pages, packed.tables, weights.kv_scale)
        return self.kernels.partial_sum(attended, weights.dense)

    def _logits(self, x_WD: Tensor) -> Tensor:
        norm, lm_head = self.weights.final_norm, self.weights.lm_head
        if norm is None or lm_head is None:
            raise RuntimeError("only the last stage has logits")
        local = self.kernels.linear(self.kernels.rms_norm(x_WD, norm, self.config.rms_norm_eps), lm_head)
        return self.comm.all_gather(local)[:, : self.config.vocab_size]

    def _bring_to_rank_0(self, logits_WV: Tensor | None, num_logits: int) -> Tensor | None:
        mapping = self.rank.mapping
        holder = (mapping.pp_size - 1) * mapping.tp_size
        if holder and num_logits:
            if self.rank.index == holder and logits_WV is not None:
                self.comm.send(logits_WV, 0)
            elif self.rank.index == 0:
                return self.comm.receive((num_logits, self.config.vocab_size), holder)
        return logits_WV if self.rank.index == 0 else None


def pack(step: Step, cache: KvCache, rotary: Rotary) -> Packed:
    """Lay a step's chunks side by side; ``cache`` has the blocks of their sequences, ``rotary`` a row for every position."""
    tokens: list[int] = []
    wanted: list[int] = []
    for chunk in step.chunks:
        wanted.extend(range(len(tokens) + chunk.logits_from, len(tokens) + len(chunk.tokens)))
        tokens.extend(chunk.tokens)
    start_C = np.array([chunk.start for chunk in step.chunks], np.int32)
    count_C = np.array([len(chunk.tokens) for chunk in step.chunks], np.int32)
    block_CM = _blocks(step, cache)
    # numpy takes a fifth of torch's time for arrays as small as these
    position_T = np.arange(len(tokens)) + np.repeat(start_C - (count_C.cumsum() - count_C), count_C)
    chunk_T, size = np.repeat(np.arange(len(count_C)), count_C), cache.room.block_tokens
    slot_T = block_CM[chunk_T, position_T // size].astype(np.int64) * size + position_T % size
    position = torch.from_numpy(position_T)
    return Packed(
        torch.tensor(tokens),
        torch.tensor(wanted, dtype=torch.int64),
        torch.from_numpy(slot_T),
        Tables(torch.from_numpy(start_C), torch.from_numpy(count_C), torch.from_numpy(block_CM)),
        *(table.index_select(0, position)[:, None] for table in rotary),
    )


def _blocks(step: Step, cache: KvCache) -> npt.NDArray[np.int32]:
    """The blocks of each chunk's sequence [C, M], padded with 0."""
    used = [cache.tables[chunk.sequence] for chunk in step.chunks]
    block_CM = np.zeros((len(used), max(map(len, used))), np.int32)
    for row, blocks in enumerate(used):
        block_CM[row, : len(blocks)] = blocks
    return block_CM
