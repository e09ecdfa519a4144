"""The structure of a TensorRT-LLM checkpoint: files, headers, configuration, what ranks share, digests of what is small.

Reads headers, norms, routers and scales, and none of the matrices: seconds also for 480 GB.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arctic_trt.checkpoint.contract import QuantFormat, parse_pretrained_config, plan_config, plan_rank, rank_file
from arctic_trt.checkpoint.exclusion import matches
from arctic_trt.checkpoint.output_dir import MARKER
from arctic_trt.checkpoint.tensors import PARTIAL, TensorFile, bytes_of, flat_bytes
from arctic_trt.errors import ArcticTrtError
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Mapping, Rank
from arctic_trt.model.names import (
    FINAL_NORM,
    KV_CACHE_SCALE,
    LAYER,
    LM_HEAD,
    Cut,
    Kind,
    activation_scale,
    trt_layer,
    weight_scale,
)
from arctic_trt.report.verify.findings import Verification
from arctic_trt.report.verify.headers import open_rank_file
from arctic_trt.report.verify.numbers import check_numbers
from arctic_trt.report.verify.records import Records, check_crc, read_records

OTHERS_MAY_DIFFER = ("logits_dtype",)
"""What other producers of checkpoints choose differently, and TensorRT-LLM accepts."""
HAS_OTHER_WORDS = ("quantization.exclude_modules",)
"""What can be said in several ways; one that means something else does not fit the tensors."""
ABSENT = object()
SHARED_WEIGHTS = tuple(row.trt for row in (*LAYER, FINAL_NORM) if row.cut is Cut.REPLICATED)


class OpenCheckpoint:
    """A checkpoint whose headers have been read; ``files`` lacks the ranks that could not be."""

    def __init__(self, path: Path, config: ArcticConfig, mapping: Mapping, quant: QuantFormat, records: Records) -> None:
        self.path, self.config, self.mapping, self.quant, self.records = path, config, mapping, quant, records
        self.files: dict[int, TensorFile] = {}

    def stage(self, pp_rank: int) -> list[Rank]:
        """The ranks of a pipeline stage whose files can be read."""
        return [rank for rank in self.mapping.ranks() if rank.pp_rank == pp_rank and rank.index in self.files]

    def has(self, rank: Rank, name: str) -> bool:
        """Whether the rank's file holds the tensor, in the planned shape."""
        return rank.index in self.files and name in self.files[rank.index].tensors

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def open_checkpoint(path: Path, found: Verification) -> OpenCheckpoint | None:
    """Check configuration, files and headers; None where nothing further can be said."""
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config, mapping, quant = parse_pretrained_config(raw, "config.json")
    except FileNotFoundError:
        found.error("file", "config.json", "", "config.json does not exist.")
        return None
    except (ValueError, TypeError, AttributeError, ArcticTrtError) as error:
        found.error("config", "config.json", "", f"config.json cannot be used: {' '.join(str(error).split())}")
        return None
    records = read_records(path, found)
    _check_config(raw, plan_config(config, mapping, quant), records.report.config if records.report else None, found)
    _check_never_quantized(raw["quantization"], len(mapping.layers(0, config.num_hidden_layers)), found)
    checkpoint = OpenCheckpoint(path, config, mapping, quant, records)
    _check_files(checkpoint, found)
    for rank in mapping.ranks():
        file = open_rank_file(path / rank_file(rank.index), plan_rank(config, rank, quant), found)
        if file:
            checkpoint.files[rank.index] = file
    return checkpoint


def _check_config(raw: dict[str, Any], plan: dict[str, Any], recorded: dict[str, Any] | None, found: Verification) -> None:
    """Hold ``config.json`` to what follows from its own sizes, and to what was written."""
    planned = {name: values for name, values in _differences(raw, plan) if values[1] is not ABSENT}
    written = dict(_differences(raw, recorded)) if recorded is not None else {}
    for name, (is_, wanted) in (planned | written).items():
        tolerated = name in HAS_OTHER_WORDS or (name in OTHERS_MAY_DIFFER and name not in written)
        if is_ is ABSENT:
            sentence = f"config.json lacks {name}, expected {wanted!r}."
        elif wanted is ABSENT:
            sentence = f"config.json has {name}={is_!r}, which was not written there."
        else:
            sentence = f"config.json has {name}={is_!r}, expected {wanted!r}."
        (found.warn if tolerated else found.error)("config", "config.json", name, sentence)


def _differences(is_: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Dotted names of the keys that differ, with both values."""
    for key in sorted(is_.keys() | wanted.keys()):
        a, b = is_.get(key, ABSENT), wanted.get(key, ABSENT)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", (a, b)


def _check_never_quantized(quantization: dict[str, Any], layers: int, found: Verification) -> None:
    """Routers and output head, which TensorRT-LLM takes for FP8 where a list leaves them out; null stands for its defaults."""
    listed = quantization.get("exclude_modules")
    if quantization["quant_algo"] is None or listed is None:
        return
    routers = [trt_layer(layer, row.module) for row in LAYER if row.kind is Kind.FLOAT32 for layer in range(layers)]
    for name in (LM_HEAD.module, *routers):
        if not matches(tuple(listed), name):
            sentence = f"config.json's exclude_modules leave out {name}, which TensorRT-LLM then expects in FP8."
            found.error("config", "config.json", name, sentence)


def _check_files(checkpoint: OpenCheckpoint, found: Verification) -> None:
    wanted = {rank_file(rank.index) for rank in checkpoint.mapping.ranks()}
    for item in sorted(checkpoint.path.iterdir()):
        if re.fullmatch(r"rank\d+\.(safetensors|engine)", item.name) and item.name not in wanted:
            found.error("file", item.name, "", f"{item.name} belongs to no rank of this checkpoint ({len(wanted)} ranks).")
        if item.name.endswith(PARTIAL):
            found.error("file", item.name, "", f"{item.name} is a file that was never finished.")
        if item.name == MARKER:
            found.error("file", item.name, "", f"{item.name} marks unfinished work: the checkpoint is not complete.")


def check_structure(checkpoint: OpenCheckpoint, found: Verification) -> None:
    """What ranks share, and the digests of all that is small; the matrices are not read."""
    for stage in range(checkpoint.mapping.pp_size):
        ranks = checkpoint.stage(stage)
        if not ranks:
            continue
        layers = checkpoint.mapping.layers(stage, checkpoint.config.num_hidden_layers)
        for local, _ in enumerate(layers):
            for name, group in _shared(checkpoint, ranks, local):
                _check_equal(checkpoint, name, group, found)
        if stage == checkpoint.mapping.pp_size - 1:
            _check_equal(checkpoint, FINAL_NORM.trt, ranks, found)
        for rank in ranks:
            _check_crcs(checkpoint, rank, found)


def is_matrix(name: str) -> bool:
    """Whether a tensor is read only by those who look at every byte: neither a scale nor what all ranks hold alike."""
    return name.endswith(".weight") and not name.endswith(SHARED_WEIGHTS)


def _check_crcs(checkpoint: OpenCheckpoint, rank: Rank, found: Verification) -> None:
    file = checkpoint.files[rank.index]
    for name in file.tensors:
        if not is_matrix(name):
            check_crc(checkpoint.records.digests, file.path.name, name, zlib.crc32(bytes_of(file.read(name))), found)


def _shared(checkpoint: OpenCheckpoint, ranks: list[Rank], local: int) -> Iterator[tuple[str, list[Rank]]]:
    """Tensors that several ranks of a stage must have alike, with these ranks."""
    for row in LAYER:
        name = trt_layer(local, row.trt)
        if row.cut is Cut.REPLICATED:
            yield name, ranks
        if checkpoint.quant.is_fp8(local, row):
            yield activation_scale(name), ranks
            experts = row.cut in (Cut.EXPERT_FC, Cut.EXPERT_PROJ)
            for block in range(checkpoint.mapping.moe_ep_size) if experts else (None,):
                yield weight_scale(name), [rank for rank in ranks if block in (None, rank.moe_ep_rank)]
    if checkpoint.quant.kv_fp8:
        yield trt_layer(local, KV_CACHE_SCALE), ranks


def _check_equal(checkpoint: OpenCheckpoint, name: str, ranks: list[Rank], found: Verification) -> None:
    holders = [rank for rank in ranks if checkpoint.has(rank, name)]
    if not holders:
        return
    first = checkpoint.files[holders[0].index].read(name)
    check_numbers(first, rank_file(holders[0].index), name, found)
    for rank in holders[1:]:
        if not flat_bytes(checkpoint.files[rank.index].read(name)).equal(flat_bytes(first)):
            file = rank_file(rank.index)
            sentence = f"{name} differs between {rank_file(holders[0].index)} and {file}, which must hold the same."
            found.error("replica", file, name, sentence)
