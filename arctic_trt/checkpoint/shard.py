"""How a full tensor is cut for a rank, and how ranks' parts make the full tensor again.

Pure functions of values. ``shard_*`` take the full Hugging Face tensors (already quantized or not, the cut is the same) and
return one rank's TensorRT-LLM tensor; ``merge_*`` take the parts of one tensor-parallel group in rank order.
Legend: D hidden, F expert ffn, E experts, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Mapping, Rank, padded_vocab
from arctic_trt.model.names import Cut


def part(x: Tensor, dim: int, index: int, parts: int) -> Tensor:
    """The ``index``-th of ``parts`` equal slices along ``dim``, a view."""
    size = x.shape[dim] // parts
    return x.narrow(dim, index * size, size)


def shard_qkv(q: Tensor, k: Tensor, v: Tensor, rank: Rank, config: ArcticConfig) -> Tensor:
    """Rows of this rank's q heads, then its k heads, then its v heads."""
    heads = rank.kv_heads(config.num_key_value_heads)
    rows = slice(heads.start * config.head_dim, heads.stop * config.head_dim)
    return torch.cat([part(q, 0, rank.tp_rank, rank.mapping.tp_size), k[rows], v[rows]])


def merge_qkv(parts: Sequence[Tensor], mapping: Mapping, config: ArcticConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Full q, k and v from the fused tensors of one tensor-parallel group; repeated KV heads are taken once."""
    q_rows = config.hidden_size // mapping.tp_size
    kv_rows = len(mapping.rank(0).kv_heads(config.num_key_value_heads)) * config.head_dim
    every = max(1, mapping.tp_size // config.num_key_value_heads)
    q = torch.cat([p[:q_rows] for p in parts])
    k = torch.cat([p[q_rows : q_rows + kv_rows] for p in parts[::every]])
    v = torch.cat([p[q_rows + kv_rows :] for p in parts[::every]])
    return q, k, v


def shard_vocab(x_VD: Tensor, rank: Rank) -> Tensor:
    """Rows of this rank, the vocabulary padded with zero rows at its end."""
    tp_size = rank.mapping.tp_size
    rows = padded_vocab(len(x_VD), tp_size) // tp_size
    kept = x_VD[rank.tp_rank * rows : (rank.tp_rank + 1) * rows]
    if len(kept) == rows:
        return kept
    return torch.cat([kept, kept.new_zeros(rows - len(kept), x_VD.shape[1])])


def shard_plain(x: Tensor, cut: Cut, rank: Rank, config: ArcticConfig) -> Tensor:
    """One rank's part of a tensor that is a single Hugging Face tensor and no expert's."""
    if cut is Cut.REPLICATED:
        return x
    if cut is Cut.ROWS:
        return part(x, 0, rank.tp_rank, rank.mapping.tp_size)
    if cut is Cut.COLUMNS:
        return part(x, 1, rank.tp_rank, rank.mapping.tp_size)
    if cut is Cut.VOCAB:
        return shard_vocab(x, rank)
    raise ValueError(f"{cut} is not the cut of a single tensor")


def merge_plain(parts: Sequence[Tensor], cut: Cut, config: ArcticConfig) -> Tensor:
    """Inverse of :func:`shard_plain`."""
    if cut is Cut.REPLICATED:
        return parts[0]
    if cut is Cut.ROWS:
        return torch.cat(list(parts), 0)
    if cut is Cut.COLUMNS:
        return torch.cat(list(parts), 1)
    if cut is Cut.VOCAB:
        return torch.cat(list(parts), 0)[: config.vocab_size]
    raise ValueError(f"{cut} is not the cut of a single tensor")


def shard_expert_fc(w3_FD: Tensor, w1_FD: Tensor, rank: Rank) -> Tensor:
    """One expert's [2F/moe_tp, D]: this rank's rows of w3, then its rows of w1.

    Cutting an already joined [w3; w1] would give one rank w3 alone and another w1 alone.
    """
    size, index = rank.mapping.moe_tp_size, rank.moe_tp_rank
    return torch.cat([part(w3_FD, 0, index, size), part(w1_FD, 0, index, size)])


def shard_expert_proj(w2_DF: Tensor, rank: Rank) -> Tensor:
    """One expert's [D, F/moe_tp]: this rank's columns of w2."""
    return part(w2_DF, 1, rank.moe_tp_rank, rank.mapping.moe_tp_size)


def merge_expert(fc_parts: Sequence[Tensor], proj_parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Full (w1, w2, w3) of one expert from its parts in ``moe_tp_rank`` order."""
    w3 = torch.cat([fc[: len(fc) // 2] for fc in fc_parts])
    w1 = torch.cat([fc[len(fc) // 2 :] for fc in fc_parts])
    return w1, torch.cat(list(proj_parts), 1), w3
