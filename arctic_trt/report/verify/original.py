"""A checkpoint against the model that it was made of: the same cast, the same cut, and then byte against byte.

Nothing here knows how a checkpoint goes wrong. Each layer's dense part and each expert is read from the original, quantized and
cut as ``quantize`` does it, and must be what the rank files hold. Activation and KV scales do not follow from weights; they are
held to the quantization's own report (:mod:`arctic_trt.report.verify.scales`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from arctic_trt.checkpoint.contract import rank_file
from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.checkpoint.shard import shard_expert_fc, shard_expert_proj, shard_plain, shard_qkv, shard_vocab
from arctic_trt.checkpoint.tensors import flat_bytes
from arctic_trt.model.mapping import Rank
from arctic_trt.model.names import (
    EMBEDDING,
    FINAL_NORM,
    LAYER_ROWS,
    LM_HEAD,
    Cut,
    Kind,
    Row,
    hf_layer,
    trt_layer,
    weight_scale,
)
from arctic_trt.quantize.layer_pass import plain_tensors
from arctic_trt.quantize.scales import quantize_attention, quantize_mlp
from arctic_trt.report.verify.checkpoint import OpenCheckpoint
from arctic_trt.report.verify.findings import Verification
from arctic_trt.report.verify.numbers import check_numbers, describe_difference, steps_from_zero
from arctic_trt.report.verify.quality import Cast, dense_casts, expert_casts, qualities_of
from arctic_trt.report.verify.values import PADDED, Work, chosen


def original_works(checkpoint: OpenCheckpoint, source: HfCheckpoint, found: Verification, share: float) -> Iterator[Work]:
    """One work for each end of the model, for a layer's dense part and for an expert, in the order of the original's layers."""
    compare = Comparison(checkpoint, source, found)
    for row in (EMBEDDING, LM_HEAD, FINAL_NORM):
        if chosen(row.trt, share):
            yield partial(compare.end, row)
    for layer in range(checkpoint.config.num_hidden_layers):
        if chosen(f"layer {layer}", share):
            yield partial(compare.dense, layer)
        for expert in range(checkpoint.config.num_local_experts):
            if chosen(f"layer {layer} expert {expert}", share):
                yield partial(compare.expert, layer, expert)


class Comparison:
    """Compares parts of a checkpoint with the same parts of the original; its methods may run side by side."""

    def __init__(self, checkpoint: OpenCheckpoint, source: HfCheckpoint, found: Verification) -> None:
        self.checkpoint, self.source, self.found = checkpoint, source, found
        self.config = checkpoint.config
        self._rounded = False

    def end(self, row: Row) -> None:
        """Embedding, final norm or output head."""
        whole = self.source.read(row.hf[0])
        last = row is not EMBEDDING
        for rank in self.checkpoint.stage(self.checkpoint.mapping.pp_size - 1 if last else 0):
            expected = shard_vocab(whole, rank) if row.cut is Cut.VOCAB else whole
            self._compare(rank, row.trt, expected)
        self.found.count(1, whole.nbytes)

    def dense(self, layer: int) -> None:
        """Everything of a layer but its experts."""
        weights = self.source.dense(layer)
        local, ranks = self._place(layer)
        fp8 = self.checkpoint.quant.fp8_names(local)
        settle = partial(self._settle, layer, None)
        attention, scales = quantize_attention(weights.attention, hf_layer(layer, "self_attn"), fp8, settle=settle)
        mlp, mlp_scales = quantize_mlp(weights.residual_mlp, hf_layer(layer, "residual_mlp"), fp8, settle=settle)
        scales |= mlp_scales
        self._scales(layer, scales)
        for rank in ranks:
            name = trt_layer(local, "attention.qkv.weight")
            self._compare(rank, name, shard_qkv(attention.q, attention.k, attention.v, rank, self.config))
            for suffix, tensor in plain_tensors(weights, attention, mlp).items():
                row = LAYER_ROWS[suffix]
                stored = tensor.float() if row.kind is Kind.FLOAT32 else tensor
                self._compare(rank, trt_layer(local, suffix), shard_plain(stored, row.cut, rank, self.config))
        self._count(dense_casts(layer, weights, attention, mlp), scales)

    def expert(self, layer: int, expert: int) -> None:
        """One expert."""
        weights = self.source.expert(layer, expert)
        local, ranks = self._place(layer)
        prefix, fp8 = hf_layer(layer, f"block_sparse_moe.experts.{expert}"), self.checkpoint.quant.fp8_names(local)
        codes, scales = quantize_mlp(weights, prefix, fp8, settle=partial(self._settle, layer, expert), expert=True)
        self._scales(layer, scales, expert)
        for rank in ranks:
            held = rank.experts(self.config.num_local_experts)
            if expert in held:
                at = expert - held.start
                self._compare(rank, trt_layer(local, "mlp.fc.weight"), shard_expert_fc(codes.w3, codes.w1, rank), at)
                self._compare(rank, trt_layer(local, "mlp.proj.weight"), shard_expert_proj(codes.w2, rank), at)
        self._count(expert_casts(layer, expert, weights, codes), scales)

    def _place(self, layer: int) -> tuple[int, list[Rank]]:
        """The layer's number within its stage, and the stage's ranks."""
        mapping, layers = self.checkpoint.mapping, self.config.num_hidden_layers
        stage = mapping.stage_of(layer, layers)
        return layer - mapping.layers(stage, layers).start, self.checkpoint.stage(stage)

    def _compare(self, rank: Rank, name: str, expected: Tensor, at: int | None = None) -> None:
        """Hold what ``rank`` stores as ``name``, or its entry ``at``, to the expected bytes."""
        if not self.checkpoint.has(rank, name):
            return  # reported with the structure
        file = self.checkpoint.files[rank.index]
        stored = file.read(name) if at is None else file.read_rows(name, at, at + 1)[0]
        self.found.count(0, stored.nbytes)
        if not flat_bytes(stored).equal(flat_bytes(expected)):
            where = name if at is None else f"{name}[{at}]"
            difference = describe_difference(stored, expected)
            sentence = f"{where} differs from the original, quantized and cut the same way, {difference}."
            self.found.error("payload", rank_file(rank.index), name, sentence)
            check_numbers(stored, rank_file(rank.index), name, self.found, where=where, may_be_zero=name in PADDED)

    def _settle(self, layer: int, expert: int | None, name: str, own: Tensor) -> Tensor:
        """The scale to cast with: what follows from the weights, unless there is a reason for another.

        ModelOpt's algorithms other than ``max`` choose a scale that only the report can tell. And a GPU multiplies by 1/448 where
        a CPU divides by 448, which differs in the last bit: where no report says otherwise, such a scale is as good.
        """
        report, at, suffix = self.checkpoint.records.report, expert or 0, weight_scale(f"{name}.weight")
        if report is not None:
            recorded = [] if report.scales_are_maxima else report.scale(layer, suffix) or []
            return torch.tensor(recorded[at : at + 1]) if at < len(recorded) else own
        local, ranks = self._place(layer)
        held = (self._stored(rank, trt_layer(local, suffix), expert) for rank in ranks)
        stored = next((scale for scale in held if scale is not None), own)
        if abs(int(steps_from_zero(stored) - steps_from_zero(own))) != 1:
            return own
        if not self._rounded:
            self._rounded = True
            sentence = (
                f"layer {layer} {suffix} and perhaps others differ in the last bit from the largest weight over 448, as on a GPU."
            )
            self.found.warn("rounding", "", f"layer {layer} {suffix}", sentence)
        return stored

    def _stored(self, rank: Rank, name: str, expert: int | None) -> Tensor | None:
        """A weight scale [1] as ``rank`` has it; None where it has none, or not this expert."""
        held = rank.experts(self.config.num_local_experts)
        if not self.checkpoint.has(rank, name) or (expert is not None and expert not in held):
            return None
        at = 0 if expert is None else expert - held.start
        return self.checkpoint.files[rank.index].read(name).view(-1)[at : at + 1]

    def _scales(self, layer: int, scales: dict[str, Tensor], expert: int | None = None) -> None:
        """Hold weight scales to those of the original's weights, bit for bit."""
        local, ranks = self._place(layer)
        for suffix, expected in scales.items():
            name = trt_layer(local, suffix)
            for rank in ranks:
                stored = self._stored(rank, name, expert)
                if stored is not None and not stored.equal(expected):
                    of = "" if expert is None else f"[{expert}]"
                    sentence = f"{name}{of} is {float(stored)!r}, expected {float(expected)!r}."
                    self.found.error("scale", rank_file(rank.index), name, sentence)

    def _count(self, casts: list[Cast], scales: dict[str, Tensor]) -> None:
        self.found.count(len(casts), sum(cast.before.nbytes for cast in casts), qualities_of(casts, scales))
