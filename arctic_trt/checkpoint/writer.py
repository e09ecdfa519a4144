"""Writing a TensorRT-LLM checkpoint: full tensors in, every rank's part in its place, as they become ready."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from arctic_trt.checkpoint.contract import QuantFormat, plan_files, rank_file
from arctic_trt.checkpoint.digests import Parts, tensor_crcs
from arctic_trt.checkpoint.shard import shard_expert_fc, shard_expert_proj, shard_plain, shard_qkv
from arctic_trt.checkpoint.tensors import TensorFileWriter
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.layer import AttentionWeights, MlpWeights
from arctic_trt.model.mapping import Mapping, Rank
from arctic_trt.model.names import EMBEDDING, Kind, Row, trt_layer


class RankFiles:
    """The rank files of one checkpoint, open for writing; a tensor goes to each rank that holds a part of it.

    With ``resume`` the partial files of an earlier or another process are continued.
    """

    def __init__(
        self, output_dir: Path, config: ArcticConfig, mapping: Mapping, quant: QuantFormat, *, resume: bool = False
    ) -> None:
        self.config = config
        self.mapping = mapping
        self._ranks = mapping.ranks()
        layouts = plan_files(config, mapping, quant)
        self._files = [
            TensorFileWriter(output_dir / rank_file(rank.index), layout, resume=resume)
            for rank, layout in zip(self._ranks, layouts, strict=True)
        ]

    @property
    def bytes_written(self) -> int:
        return sum(file.bytes_written for file in self._files)

    def local_layer(self, layer: int) -> int:
        """Number of ``layer`` within its pipeline stage."""
        return self.mapping.local_layer(layer, self.config.num_hidden_layers)

    def write_global(self, row: Row, tensor: Tensor, stage: int) -> None:
        """Embedding, final norm or head, on the ranks of pipeline ``stage``."""
        for rank in self._ranks:
            if rank.pp_rank == stage:
                self._files[rank.index].write(row.trt, shard_plain(tensor, row.cut, rank, self.config))

    def write_plain(self, layer: int, row: Row, tensor: Tensor) -> None:
        """A layer's tensor that comes from one Hugging Face tensor; the router is widened here."""
        tensor = tensor.float() if row.kind is Kind.FLOAT32 else tensor
        for rank, name in self._holders(layer, row.trt):
            self._files[rank.index].write(name, shard_plain(tensor, row.cut, rank, self.config))

    def write_qkv(self, layer: int, row: Row, weights: AttentionWeights) -> None:
        """The fused q, k and v of a layer."""
        for rank, name in self._holders(layer, row.trt):
            self._files[rank.index].write(name, shard_qkv(weights.q, weights.k, weights.v, rank, self.config))

    def write_expert(self, layer: int, expert: int, fc: Row, proj: Row, weights: MlpWeights) -> None:
        """One expert's fused fc and its proj, on the ranks whose experts include it."""
        for rank, fc_name in self._holders(layer, fc.trt):
            mine = rank.experts(self.config.num_local_experts)
            if expert in mine:
                file = self._files[rank.index]
                file.write(fc_name, shard_expert_fc(weights.w3, weights.w1, rank), expert - mine.start)
                proj_name = trt_layer(self.local_layer(layer), proj.trt)
                file.write(proj_name, shard_expert_proj(weights.w2, rank), expert - mine.start)

    def write_scale(self, layer: int, suffix: str, scale: Tensor) -> None:
        """A float32 scale [1], or [E, 1] of which each rank keeps its experts'."""
        for rank, name in self._holders(layer, suffix):
            mine = rank.experts(self.config.num_local_experts)
            self._files[rank.index].write(name, scale.float() if len(scale) == 1 else scale[mine.start : mine.stop].float())

    def assume_layers(self, count: int) -> None:
        """Take the embedding and the first ``count`` layers as written by an earlier run."""
        for rank, file in zip(self._ranks, self._files, strict=True):
            mine = rank.layers(self.config.num_hidden_layers)
            done = [trt_layer(layer - mine.start, "") for layer in mine if layer < count]
            for name in file.layout.specs:
                if name == EMBEDDING.trt or name.startswith(tuple(done)):
                    file.assume(name)

    def sync(self, layer: int | None = None) -> None:
        """Make durable what has been written, to all files or to those that hold ``layer``."""
        stage = None if layer is None else self.mapping.stage_of(layer, self.config.num_hidden_layers)
        for rank, file in zip(self._ranks, self._files, strict=True):
            if stage in (None, rank.pp_rank):
                file.sync()

    def written(self) -> list[dict[str, int]]:
        """Bytes of every tensor that this process has written or assumed, file by file."""
        return [dict(file.written) for file in self._files]

    def take_crcs(self) -> list[Parts]:
        """CRC-32 of every part that this process has written since this was last asked, file by file."""
        return [file.take_crcs() for file in self._files]

    def tensor_crcs(self, taken: list[list[Parts]]) -> dict[str, dict[str, str]]:
        """CRC-32 of the tensors of each file from what all processes have :meth:`take_crcs`-en, which wrote all of them."""
        crcs = {}
        for index, file in enumerate(self._files):
            num_bytes = {name: spec.num_bytes for name, spec in file.layout.specs.items()}
            crcs[file.path.name] = tensor_crcs([parts[index] for parts in taken], num_bytes)
        return {name: of_file for name, of_file in crcs.items() if of_file}

    def finish(self, written: list[list[dict[str, int]]]) -> None:
        """Give the files their names; ``written`` are :meth:`written` of all processes that took part."""
        for index, file in enumerate(self._files):
            file.finish([parts[index] for parts in written])

    def close(self) -> None:
        """Leave partial files as they are."""
        for file in self._files:
            file.close()

    def _holders(self, layer: int, suffix: str) -> list[tuple[Rank, str]]:
        stage = self.mapping.stage_of(layer, self.config.num_hidden_layers)
        name = trt_layer(self.local_layer(layer), suffix)
        return [(rank, name) for rank in self._ranks if rank.pp_rank == stage]
