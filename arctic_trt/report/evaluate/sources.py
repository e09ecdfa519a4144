"""Layers in the form in which an engine multiplies them, read from a Hugging Face model or from a TensorRT-LLM checkpoint.

A checkpoint's ranks are merged: what is evaluated is the function that all of them compute together. Weights in e4m3 are held as
the bf16 numbers that they are, with their scales beside them; nothing is rounded on the way.
Legend: D hidden, F expert ffn, N heads, K KV heads, H head dim, E experts, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, cat, float32

from arctic_trt.checkpoint.contract import read_json
from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.checkpoint.shard import merge_expert, merge_plain, merge_qkv
from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.engine.config import is_engine_config
from arctic_trt.errors import UsageError
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Rank
from arctic_trt.model.names import (
    EMBEDDING,
    FINAL_NORM,
    KV_CACHE_SCALE,
    LAYER,
    LM_HEAD,
    Row,
    activation_scale,
    hf_expert,
    hf_layer,
    trt_layer,
    weight_scale,
)
from arctic_trt.runtime.kernels import CpuKernels, Projection

ROWS = {row.trt: row for row in LAYER}
KERNELS = CpuKernels(float32)
"""Sums of e4m3 products in float32, as tensor cores have them; there are no ranks here whose parts must add up alike."""


@dataclass(frozen=True, slots=True)
class Small:
    """What no engine quantizes: norms [D] and router [E, D], float32."""

    input_norm: Tensor
    post_norm: Tensor
    residual_norm: Tensor
    router: Tensor


@dataclass(frozen=True, slots=True)
class DenseProjections:
    """Everything of a layer but its experts.

    ``qkv`` [(N + 2K) * H, D], ``dense`` [D, N * H], ``residual_fc`` [2D, D] whose first half of rows is activated,
    ``residual_proj`` [D, D]; ``kv_scale`` [1], None where keys and values are not rounded.
    """

    small: Small
    qkv: Projection
    dense: Projection
    residual_fc: Projection
    residual_proj: Projection
    kv_scale: Tensor | None


@dataclass(frozen=True, slots=True)
class ExpertProjections:
    """One expert: ``fc`` [2F, D] whose first half of rows is activated, ``proj`` [D, F]."""

    fc: Projection
    proj: Projection


@dataclass(frozen=True, slots=True)
class Ends:
    """What comes before the first and after the last layer: embedding [V, D], final norm [D] in float32, output head [V, D]."""

    embedding: Tensor
    final_norm: Tensor
    lm_head: Tensor


class Source(Protocol):
    """A model that can be read a layer's part at a time; see :class:`arctic_trt.quantize.stream.LayerSource`."""

    path: Path
    config: ArcticConfig
    files: list[Path]

    @property
    def bytes_read(self) -> int: ...

    def dense(self, layer: int, memory: Tensor) -> DenseProjections: ...

    def expert(self, layer: int, expert: int, memory: Tensor) -> ExpertProjections: ...

    def buffer_bytes(self, layer: int, expert: int | None) -> int: ...

    def expect(self, layer: int, expert: int | None) -> None: ...

    def ends(self) -> Ends: ...

    def close(self) -> None: ...


def open_source(path: Path) -> Source:
    """A checkpoint or a model, by what its ``config.json`` says; raises :class:`UsageError` for an engine."""
    raw = read_json(path / "config.json", "Point it at a Hugging Face model or at the output of arctic-trt quantize.")
    if is_engine_config(raw):
        raise UsageError(f"{path} is an engine.", "Evaluate the checkpoint that it was built from; it computes the same.")
    return CheckpointSource(path) if "mapping" in raw else ModelSource(path)


class ModelSource:
    """The bf16 original; every projection is without scales."""

    def __init__(self, model_dir: Path) -> None:
        self._hf = HfCheckpoint(model_dir)
        self.path, self.config, self.files = model_dir, self._hf.config, self._hf.shard_paths

    @property
    def bytes_read(self) -> int:
        return self._hf.bytes_read

    def buffer_bytes(self, layer: int, expert: int | None) -> int:
        return self._hf.buffer_bytes(layer, expert)

    def expect(self, layer: int, expert: int | None) -> None:
        self._hf.expect(layer, expert)

    def close(self) -> None:
        self._hf.close()

    def dense(self, layer: int, memory: Tensor) -> DenseProjections:
        read, mlp = self._hf.read, [hf_layer(layer, f"residual_mlp.{w}.weight") for w in ("w1", "w3")]
        norms = ("input_layernorm", "post_attention_layernorm", "residual_layernorm", "block_sparse_moe.gate")
        qkv, memory = self._joined([hf_layer(layer, f"self_attn.{p}_proj.weight") for p in "qkv"], memory)
        fc, memory = self._joined(mlp, memory)
        dense, memory = self._joined([hf_layer(layer, "self_attn.o_proj.weight")], memory)
        proj, _ = self._joined([hf_layer(layer, "residual_mlp.w2.weight")], memory)
        small = (read(hf_layer(layer, f"{norm}.weight")).float() for norm in norms)
        return DenseProjections(
            Small(*small), Projection(qkv), Projection(dense), Projection(fc), Projection(proj), kv_scale=None
        )

    def expert(self, layer: int, expert: int, memory: Tensor) -> ExpertProjections:
        fc, memory = self._joined([hf_expert(layer, expert, w) for w in ("w1", "w3")], memory)
        proj, _ = self._joined([hf_expert(layer, expert, "w2")], memory)
        return ExpertProjections(Projection(fc), Projection(proj))

    def ends(self) -> Ends:
        embedding, norm, lm_head = (self._hf.read(row.hf[0]) for row in (EMBEDDING, FINAL_NORM, LM_HEAD))
        return Ends(embedding, norm.float(), lm_head)

    def _joined(self, names: Sequence[str], memory: Tensor) -> tuple[Tensor, Tensor]:
        """Matrices under each other, in ``memory``; returns them and the memory behind them."""
        begin, rows = 0, 0
        for name in names:
            tensor = self._hf.read(name, memory[begin:])
            if tensor.data_ptr() != memory[begin:].data_ptr():  # folded KV heads come in memory of their own
                memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            begin, rows = begin + tensor.nbytes, rows + len(tensor)
        joined = memory[:begin].view(tensor.dtype).view(rows, -1)
        return joined, memory[begin:]


class CheckpointSource:
    """A TensorRT-LLM checkpoint of any mapping, quantized or not."""

    def __init__(self, checkpoint_dir: Path) -> None:
        self.checkpoint = checkpoint = TrtCheckpoint(checkpoint_dir)
        self.path, self.config = checkpoint_dir, checkpoint.config
        self.files = [checkpoint.file(rank.index).path for rank in checkpoint.mapping.ranks()]
        self._bytes_read = 0
        self._lock = threading.Lock()

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def buffer_bytes(self, layer: int, expert: int | None) -> int:
        """None: ranks' parts are merged into memory of their own."""
        return 0

    def close(self) -> None:
        self.checkpoint.close()

    def expect(self, layer: int, expert: int | None) -> None:
        """Nothing: an expert is a slice of a large tensor, and the kernel reads ahead along it by itself."""

    def dense(self, layer: int, memory: Tensor) -> DenseProjections:
        local, ranks = self._place(layer)
        q, k, v = merge_qkv(self._parts(ranks, local, "attention.qkv.weight"), self.checkpoint.mapping, self.config)
        fc, gate = (self._plain(ranks, local, f"residual_mlp.{name}.weight") for name in ("fc", "gate"))
        norms = ("input_layernorm.weight", "post_layernorm.weight", "residual_layernorm.weight", "mlp.router.weight")
        o, proj = (self._plain(ranks, local, f"{name}.weight") for name in ("attention.dense", "residual_mlp.proj"))
        return DenseProjections(
            Small(*(self._plain(ranks, local, norm).float() for norm in norms)),
            qkv=self._projection(cat([q, k, v]), ranks[0], local, "attention.qkv.weight"),
            dense=self._projection(o, ranks[0], local, "attention.dense.weight"),
            residual_fc=self._projection(cat([fc, gate]), ranks[0], local, "residual_mlp.fc.weight"),
            residual_proj=self._projection(proj, ranks[0], local, "residual_mlp.proj.weight"),
            kv_scale=self._scale(ranks[0], trt_layer(local, KV_CACHE_SCALE)),
        )

    def expert(self, layer: int, expert: int, memory: Tensor) -> ExpertProjections:
        local, ranks = self._place(layer)
        holders = [rank for rank in ranks if expert in rank.experts(self.config.num_local_experts)]
        holders.sort(key=lambda rank: rank.moe_tp_rank)
        at = expert - holders[0].experts(self.config.num_local_experts).start
        fc, proj = (
            [self._read(rank, trt_layer(local, name), at) for rank in holders] for name in ("mlp.fc.weight", "mlp.proj.weight")
        )
        w1, w2, w3 = merge_expert(fc, proj)
        return ExpertProjections(
            self._projection(cat([w1, w3]), holders[0], local, "mlp.fc.weight", at),
            self._projection(w2, holders[0], local, "mlp.proj.weight", at),
        )

    def ends(self) -> Ends:
        mapping = self.checkpoint.mapping
        stages = [[rank for rank in mapping.ranks() if rank.pp_rank == stage] for stage in (0, mapping.pp_size - 1)]
        embedding, norm, lm_head = (
            self._merged([self._read(rank, row.trt) for rank in ranks], row)
            for row, ranks in ((EMBEDDING, stages[0]), (FINAL_NORM, stages[1]), (LM_HEAD, stages[1]))
        )
        return Ends(embedding, norm.float(), lm_head)

    def _place(self, layer: int) -> tuple[int, list[Rank]]:
        """The layer's number within its stage, and the stage's ranks in order."""
        mapping, layers = self.checkpoint.mapping, self.config.num_hidden_layers
        stage = mapping.stage_of(layer, layers)
        return layer - mapping.layers(stage, layers).start, [rank for rank in mapping.ranks() if rank.pp_rank == stage]

    def _read(self, rank: Rank, name: str, at: int | None = None) -> Tensor:
        file = self.checkpoint.file(rank.index)
        tensor = file.read(name) if at is None else file.read_rows(name, at, at + 1)[0]
        with self._lock:
            self._bytes_read += tensor.nbytes
        return tensor

    def _parts(self, ranks: list[Rank], local: int, suffix: str) -> list[Tensor]:
        return [self._read(rank, trt_layer(local, suffix)) for rank in ranks]

    def _plain(self, ranks: list[Rank], local: int, suffix: str) -> Tensor:
        return self._merged(self._parts(ranks, local, suffix), ROWS[suffix])

    def _merged(self, parts: list[Tensor], row: Row) -> Tensor:
        return merge_plain(parts, row.cut, self.config)

    def _scale(self, rank: Rank, name: str) -> Tensor | None:
        return self._read(rank, name) if name in self.checkpoint.file(rank.index).tensors else None

    def _projection(self, weight: Tensor, rank: Rank, local: int, suffix: str, at: int | None = None) -> Projection:
        """``weight`` with the scales that ``rank`` stores for it, an expert's being entry ``at`` of theirs."""
        name = trt_layer(local, suffix)
        scale, activation = self._scale(rank, weight_scale(name)), self._scale(rank, activation_scale(name))
        if scale is None or activation is None:
            return Projection(weight)
        return Projection(KERNELS.hold(weight), activation, (scale if at is None else scale[at]) * activation)
