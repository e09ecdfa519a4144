"""A checkpoint against the model that it was made of: the same cast, the same cut, and then byte against byte.

Nothing here knows how a checkpoint goes wrong. Each layer's dense part and each expert is read from the original, quantized and
cut as ``quantize`` does it, and must be what the rank files hold. Activation and KV scales do not follow from weights; they are
held to the quantization's own report (:mod:`arctic_trt.report.verify.checkpoint`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from torch import Tensor

from arctic_trt.checkpoint.contract import rank_file
from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.checkpoint.shard import shard_expert_fc, shard_expert_proj, shard_plain, shard_qkv, shard_vocab
from arctic_trt.checkpoint.tensors import flat_bytes
from arctic_trt.model.layer import AttentionWeights, DenseWeights, MlpWeights
from arctic_trt.model.mapping import Rank
from arctic_trt.model.names import EMBEDDING, FINAL_NORM, LAYER_ROWS, LM_HEAD, Cut, Kind, Row, hf_layer, trt_layer, weight_scale
from arctic_trt.quantize.fp8 import dequantize
from arctic_trt.quantize.layer_pass import plain_tensors
from arctic_trt.quantize.scales import quantize_attention, quantize_mlp
from arctic_trt.report.verify.checkpoint import OpenCheckpoint
from arctic_trt.report.verify.findings import Quality, Verification
from arctic_trt.report.verify.values import NAN, Work, chosen, problem_of

BLOCK_ELEMENTS, SAMPLED_BLOCKS = 1 << 14, 16


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
        attention, scales = quantize_attention(weights.attention, hf_layer(layer, "self_attn"), fp8)
        mlp, mlp_scales = quantize_mlp(weights.residual_mlp, hf_layer(layer, "residual_mlp"), fp8)
        scales |= mlp_scales
        self._scales(layer, scales)
        for rank in ranks:
            name = trt_layer(local, "attention.qkv.weight")
            self._compare(rank, name, shard_qkv(attention.q, attention.k, attention.v, rank, self.config))
            for suffix, tensor in plain_tensors(weights, attention, mlp).items():
                row = LAYER_ROWS[suffix]
                stored = tensor.float() if row.kind is Kind.FLOAT32 else tensor
                self._compare(rank, trt_layer(local, suffix), shard_plain(stored, row.cut, rank, self.config))
        before, after = _pairs(weights, attention, mlp)
        names = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"residual_mlp.{w}" for w in ("w1", "w3", "w2")]
        rows = ["attention.qkv"] * 3 + ["attention.dense", "residual_mlp.fc", "residual_mlp.gate", "residual_mlp.proj"]
        scales_of = [scales.get(weight_scale(f"{row}.weight")) for row in rows]
        self._count([hf_layer(layer, f"{name}.weight") for name in names], before, after, scales_of)

    def expert(self, layer: int, expert: int) -> None:
        """One expert."""
        weights = self.source.expert(layer, expert)
        local, ranks = self._place(layer)
        prefix, fp8 = hf_layer(layer, f"block_sparse_moe.experts.{expert}"), self.checkpoint.quant.fp8_names(local)
        codes, scales = quantize_mlp(weights, prefix, fp8, expert=True)
        self._scales(layer, scales, expert)
        for rank in ranks:
            held = rank.experts(self.config.num_local_experts)
            if expert in held:
                at = expert - held.start
                self._compare(rank, trt_layer(local, "mlp.fc.weight"), shard_expert_fc(codes.w3, codes.w1, rank), at)
                self._compare(rank, trt_layer(local, "mlp.proj.weight"), shard_expert_proj(codes.w2, rank), at)
        names = [f"{prefix}.{w}.weight" for w in ("w1", "w3", "w2")]
        scales_of = [scales.get(weight_scale(f"mlp.{row}.weight")) for row in ("fc", "fc", "proj")]
        self._count(names, [weights.w1, weights.w3, weights.w2], [codes.w1, codes.w3, codes.w2], scales_of)

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
            count = int((flat_bytes(stored) != flat_bytes(expected)).sum())
            where = name if at is None else f"{name}[{at}]"
            sentence = f"{where} differs in {count} of {stored.nbytes} bytes from the original, quantized and cut the same way."
            self.found.error("payload", rank_file(rank.index), name, sentence)
            problem = problem_of(stored)
            if problem:
                self.found.error("not finite" if problem == NAN else "zero", rank_file(rank.index), name, f"{where} {problem}.")

    def _scales(self, layer: int, scales: dict[str, Tensor], expert: int | None = None) -> None:
        """Hold weight scales to those of the original's weights, bit for bit."""
        local, ranks = self._place(layer)
        for suffix, expected in scales.items():
            name = trt_layer(local, suffix)
            for rank in ranks:
                held = rank.experts(self.config.num_local_experts)
                if not self.checkpoint.has(rank, name) or (expert is not None and expert not in held):
                    continue
                stored = self.checkpoint.files[rank.index].read(name).view(-1)[0 if expert is None else expert - held.start]
                if float(stored) != float(expected):
                    of = "" if expert is None else f"[{expert}]"
                    sentence = f"{name}{of} is {float(stored)!r}, the original's weights give {float(expected)!r}."
                    self.found.error("scale", rank_file(rank.index), name, sentence)

    def _count(self, names: list[str], before: list[Tensor], after: list[Tensor], scales: list[Tensor | None]) -> None:
        each = zip(names, before, after, scales, strict=True)
        qualities = [quality_of(name, whole, codes, scale) for name, whole, codes, scale in each if scale is not None]
        self.found.count(len(names), sum(tensor.nbytes for tensor in before), qualities)


def _pairs(weights: DenseWeights, attention: AttentionWeights, mlp: MlpWeights) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices before and after the cast, in one order."""
    before, after = weights.attention, attention
    return (
        [before.q, before.k, before.v, before.o, weights.residual_mlp.w1, weights.residual_mlp.w3, weights.residual_mlp.w2],
        [after.q, after.k, after.v, after.o, mlp.w1, mlp.w3, mlp.w2],
    )


def quality_of(name: str, original: Tensor, codes: Tensor, scale: Tensor) -> Quality:
    """What the cast of a bf16 matrix to e4m3 with ``scale`` has cost, estimated from one block in :data:`SAMPLED_BLOCKS`."""
    signal = noise = 0.0
    wide, narrow = original.reshape(-1), codes.reshape(-1)
    for begin in range(0, wide.numel(), SAMPLED_BLOCKS * BLOCK_ELEMENTS):
        part = slice(begin, begin + BLOCK_ELEMENTS)
        x = wide[part].float()
        error = dequantize(narrow[part], scale).sub_(x)
        signal += float(x.dot(x))
        noise += float(error.dot(error))
    return Quality(name, 10 * math.log10(signal / noise) if noise and signal else math.inf)
