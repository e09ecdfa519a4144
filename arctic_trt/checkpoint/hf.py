"""A Hugging Face Arctic checkpoint: checked by its headers first, then read one layer or one expert at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from arctic_trt.checkpoint.header import StoredTensor
from arctic_trt.checkpoint.tensors import TensorFile, describe
from arctic_trt.errors import CheckpointError, UsageError
from arctic_trt.model.config import ArcticConfig, read_config
from arctic_trt.model.layer import AttentionWeights, DenseWeights, MlpWeights
from arctic_trt.model.names import hf_expert, hf_layer, hf_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
KV = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")


DENSE_SUFFIXES = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "residual_layernorm.weight",
    *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
    *(f"residual_mlp.{w}.weight" for w in ("w1", "w2", "w3")),
    "block_sparse_moe.gate.weight",
)
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class KvFold:
    """The file repeats every KV head ``repeats`` times; ``config`` counts the distinct ones."""

    heads_in_file: int
    repeats: int


class HfCheckpoint:
    """Every tensor accounted for when constructed; bytes are read only when asked for.

    ``config`` describes the *folded* model: see :func:`distinct_kv_heads`. ``bytes_read`` counts payload bytes.
    """

    def __init__(self, model_dir: Path) -> None:
        stated = read_config(model_dir)
        self.model_dir = model_dir
        self._files = _open_files(model_dir)
        self._home = {name: file for file in self._files for name in file.tensors}
        self.bytes_read = 0
        heads = self._kv_heads_in_file(stated)
        self._check_tensors(stated.with_kv_heads(heads))
        self.config, self.kv_fold = self._fold_kv_heads(stated, heads)

    @property
    def names(self) -> list[str]:
        return list(self._home)

    @property
    def total_bytes(self) -> int:
        return sum(file.tensors[name].spec.num_bytes for name, file in self._home.items())

    @property
    def shard_paths(self) -> list[Path]:
        return [file.path for file in self._files]

    def read(self, name: str, memory: Tensor | None = None) -> Tensor:
        """One bf16 tensor, KV heads folded, in ``memory`` (uint8) if given, else in memory of its own."""
        tensor = self._home[name].read(name, memory)
        self.bytes_read += tensor.nbytes
        if self.kv_fold and name.endswith(KV):
            return fold_kv(tensor, name, self.kv_fold, self.config.head_dim)
        return tensor

    def dense(self, layer: int, memory: Tensor | None = None) -> DenseWeights:
        """All weights of a layer except its experts: about 0.55 GB at Arctic's full width."""
        first, post, residual, q, k, v, o, w1, w2, w3, gate = self._read_all(dense_names(layer), memory)
        return DenseWeights(first, post, residual, AttentionWeights(q, k, v, o), MlpWeights(w1, w2, w3), gate)

    def expert(self, layer: int, expert: int, memory: Tensor | None = None) -> MlpWeights:
        """One expert's three matrices: 209 MB at Arctic's full width."""
        return MlpWeights(*self._read_all(expert_names(layer, expert), memory))

    def expect(self, layer: int, expert: int | None) -> None:
        """Have the disk start on an expert, or on the dense part, of ``layer`` before it is read."""
        for name in part_names(layer, expert):
            self._home[name].expect(name)

    def buffer_bytes(self, layer: int, expert: int | None) -> int:
        """Bytes of a part in the files, each tensor rounded up as :meth:`dense` and :meth:`expert` place it in memory."""
        return sum(aligned(self._stored(name).spec.num_bytes) for name in part_names(layer, expert))

    def _read_all(self, names: Sequence[str], memory: Tensor | None) -> list[Tensor]:
        if memory is None:
            return [self.read(name) for name in names]
        tensors, begin = [], 0
        for name in names:
            tensors.append(self.read(name, memory[begin:]))
            begin += aligned(self._stored(name).spec.num_bytes)
        return tensors

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _stored(self, name: str) -> StoredTensor:
        return self._home[name].tensors[name]

    def _kv_heads_in_file(self, stated: ArcticConfig) -> int:
        name = hf_layer(0, KV[0])
        if name not in self._home:
            return stated.num_key_value_heads  # reported as missing with everything else that is
        rows = self._stored(name).spec.shape[0]
        heads, rest = divmod(rows, stated.head_dim)
        if rest or heads % stated.num_key_value_heads or stated.num_attention_heads % heads:
            raise CheckpointError(
                f"{name} in {self._home[name].path} has {rows} rows, but config.json's num_key_value_heads="
                f"{stated.num_key_value_heads} of {stated.head_dim} need {stated.kv_size}.",
                "config.json and weights are from different uploads: take both from the same revision.",
            )
        return heads

    def _check_tensors(self, config: ArcticConfig) -> None:
        expected = hf_shapes(config)
        _refuse(expected.keys() - self._home.keys(), "lacks", self.model_dir)
        _refuse(self._home.keys() - expected.keys(), "holds the unexpected", self.model_dir)
        for name, shape in expected.items():
            stored = self._stored(name)
            if stored.spec.shape != shape:
                raise CheckpointError(
                    f"{name} in {stored.path} has shape {describe(stored.spec.shape)}, config.json asks for {describe(shape)}.",
                    "config.json and weights are from different models.",
                )
            if stored.spec.dtype != "BF16":
                raise CheckpointError(
                    f"{name} in {stored.path} is {stored.spec.dtype}, expected BF16.", "Use the original bf16 checkpoint."
                )

    def _fold_kv_heads(self, stated: ArcticConfig, heads: int) -> tuple[ArcticConfig, KvFold | None]:
        """Ask the first and the last layer how many heads are distinct; every layer is verified when it is read."""
        ends = {hf_layer(layer, suffix) for layer in (0, stated.num_hidden_layers - 1) for suffix in KV}
        distinct = max(distinct_kv_heads(self._home[name].read(name), stated.head_dim) for name in sorted(ends))
        if heads > stated.num_key_value_heads and distinct > stated.num_key_value_heads:
            raise CheckpointError(
                f"{self.model_dir} holds {heads} KV heads of which {distinct} differ, config.json says "
                f"num_key_value_heads={stated.num_key_value_heads}.",
                "config.json and weights are from different uploads: take both from the same revision.",
            )
        kept = max(distinct, stated.num_key_value_heads) if heads > stated.num_key_value_heads else distinct
        constant = kept == 1 < stated.num_key_value_heads  # all rows alike, as in a mock-up: nothing was repeated
        if kept == heads or constant:
            return stated, None
        return stated.with_kv_heads(kept), KvFold(heads, heads // kept)


def dense_names(layer: int) -> list[str]:
    """The tensors of a layer that every token passes, in the order of :class:`DenseWeights`' fields."""
    return [hf_layer(layer, suffix) for suffix in DENSE_SUFFIXES]


def expert_names(layer: int, expert: int) -> list[str]:
    """The three matrices of an expert, in the order of :class:`MlpWeights`' fields."""
    return [hf_expert(layer, expert, matrix) for matrix in ("w1", "w2", "w3")]


def part_names(layer: int, expert: int | None) -> list[str]:
    """The tensors of ``expert``, or, when that is None, those that every token passes."""
    return dense_names(layer) if expert is None else expert_names(layer, expert)


def aligned(num_bytes: int) -> int:
    """Round up so that the next tensor in a buffer begins where vector loads like it."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def distinct_kv_heads(weight: Tensor, head_dim: int) -> int:
    """Smallest count h such that ``weight`` [heads * H, D] is h heads, each repeated heads/h times in a row, bit for bit.

    The first upload of Arctic (and the base model) stores 8 KV heads as 56, each repeated seven times.
    """
    heads_NHD = weight.view(-1, head_dim, weight.shape[-1])
    count = len(heads_NHD)
    changes = [n for n in range(1, count) if not heads_NHD[n].equal(heads_NHD[n - 1])]
    for repeats in range(count, 1, -1):
        if count % repeats == 0 and all(n % repeats == 0 for n in changes):
            return count // repeats
    return count


def fold_kv(weight: Tensor, name: str, fold: KvFold, head_dim: int) -> Tensor:
    """Keep one of each group of repeated heads; raises :class:`CheckpointError` where a group is not repeated exactly."""
    heads_NHD = weight.view(-1, fold.repeats, head_dim, weight.shape[-1])
    kept = heads_NHD[:, :1]
    if not heads_NHD.equal(kept.expand_as(heads_NHD)):
        raise CheckpointError(
            f"{name} does not repeat its KV heads {fold.repeats} times as the other layers' do.", "Download its shard again."
        )
    return kept.reshape(-1, weight.shape[-1])


def _refuse(names: Iterable[str], verb: str, model_dir: Path) -> None:
    ordered = sorted(names)
    if ordered:
        more = f" and {len(ordered) - 1} more tensors" if len(ordered) > 1 else ""
        raise CheckpointError(
            f"{model_dir} {verb} tensor {ordered[0]}{more}.", "Compare its files and config.json with the original checkpoint."
        )


def _open_files(model_dir: Path) -> list[TensorFile]:
    """Open every shard that the index names; a tensor must be in the shard that the index says, and nowhere else."""
    index_path = model_dir / INDEX
    if not index_path.exists():
        if not (model_dir / SINGLE).exists():
            raise CheckpointError(f"{model_dir} has neither {INDEX} nor {SINGLE}.", "Download the weights next to config.json.")
        return [TensorFile(model_dir / SINGLE)]
    weight_map = _read_index(index_path)
    files = [TensorFile(model_dir / shard) for shard in sorted(set(weight_map.values()))]
    found = Counter(name for file in files for name in file.tensors)
    twice = next((name for name, times in found.items() if times > 1), None)
    if twice:
        raise CheckpointError(f"{model_dir} holds {twice} in more than one shard.", "Remove the stray shard.")
    for file in files:
        for name in file.tensors:
            if weight_map.get(name) != file.path.name:
                raise CheckpointError(
                    f"{file.path} holds {name}, which {INDEX} places in {weight_map.get(name, 'no shard')}.",
                    "Index and shards are from different uploads: download both again.",
                )
    for name, shard in weight_map.items():
        if name not in found:
            raise CheckpointError(f"{model_dir / shard} lacks {name}, which {INDEX} places there.", "Download the shard again.")
    return files


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(item, str) for pair in weight_map.items() for item in pair):
            raise ValueError("weight_map must map names to files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a safetensors index ({type(error).__name__}: {error}).", "Download it again.") from None
    return dict(weight_map)
