"""Arctic's forward pass on one rank: a packed step in, float32 logits out on rank 0.

The semantics are those of :mod:`arctic_trt.model.layer`: router and experts read the normed *input* of the layer, the residual
MLP reads the post-attention sum. Two sums over the tensor-parallel group a layer suffice, because the residual MLP's and the
experts' partial results can be added before they are reduced.

Legend: T tokens of the step, D hidden, N query heads, K KV heads, H head dim, V vocab, W positions whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.layer import rotary_tables
from arctic_trt.model.mapping import Rank
from arctic_trt.runtime.communicator import Communicator
from arctic_trt.runtime.kernels import Kernels
from arctic_trt.runtime.kv_cache import KvCache
from arctic_trt.runtime.layer import Layer
from arctic_trt.runtime.packing import Packed, pack
from arctic_trt.runtime.step import Step
from arctic_trt.runtime.weights import RankWeights


class Network:
    """One rank of an engine; :meth:`forward` is called on all ranks with the same step."""

    def __init__(
        self,
        config: ArcticConfig,
        rank: Rank,
        weights: RankWeights,
        layers: Sequence[Layer],
        cache: KvCache,
        comm: Communicator,
        kernels: Kernels,
    ) -> None:
        self.config = config
        self.rank = rank
        self.weights = weights
        self.layers = layers
        self.cache = cache
        self.comm = comm
        self.kernels = kernels
        self._rotary = rotary_tables(torch.arange(config.max_position_embeddings), config.head_dim, config.rope_theta)

    def forward(self, step: Step) -> Tensor | None:
        """Logits [W, V] on rank 0, None on the others; keys and values of the step's tokens stay in the cache."""
        packed = pack(step, self.cache, self._rotary)
        x_TD = self._embed(packed.token_T) if self.rank.is_first_stage else self._receive_hidden(len(packed.token_T))
        for layer, pages in zip(self.layers, self.cache.pages, strict=True):
            x_TD = self._layer(x_TD, layer, pages, packed)
        if not self.rank.is_last_stage:
            self.comm.send(x_TD, self.rank.index + self.rank.mapping.tp_size)
        logits_WV = self._logits(x_TD[packed.wanted_W]) if self.rank.is_last_stage and step.num_logits else None
        return bring_to_rank_0(logits_WV, step.num_logits, self.rank, self.config.vocab_size, self.comm)

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

    def _layer(self, x_TD: Tensor, layer: Layer, pages: Tensor, packed: Packed) -> Tensor:
        attended_TD = layer.attention(x_TD, packed, pages)
        self.comm.all_reduce(attended_TD)
        sum_TD = x_TD + attended_TD.float()
        partial_TD = layer.mlp(x_TD, sum_TD)
        self.comm.all_reduce(partial_TD)
        return sum_TD + partial_TD.float()

    def _logits(self, x_WD: Tensor) -> Tensor:
        norm, lm_head = self.weights.final_norm, self.weights.lm_head
        if norm is None or lm_head is None:
            raise RuntimeError("only the last stage has logits")
        local = self.kernels.linear(self.kernels.rms_norm(x_WD, norm, self.config.rms_norm_eps), lm_head)
        return self.comm.all_gather(local)[:, : self.config.vocab_size]


def bring_to_rank_0(logits_WV: Tensor | None, num_logits: int, rank: Rank, vocab_size: int, comm: Communicator) -> Tensor | None:
    """The last stage's logits [W, V] on rank 0, None on the others; all ranks call it."""
    mapping = rank.mapping
    holder = (mapping.pp_size - 1) * mapping.tp_size
    if holder and num_logits:
        if rank.index == holder and logits_WV is not None:
            comm.send(logits_WV, 0)
        elif rank.index == 0:
            return comm.receive((num_logits, vocab_size), holder)
    return logits_WV if rank.index == 0 else None
