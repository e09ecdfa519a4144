"""The structure of a TensorRT-LLM checkpoint: files, headers, configuration, what ranks share, and every scale.

Reads headers, norms, routers and scales, and none of the matrices: seconds also for 480 GB.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arctic_trt.checkpoint.contract import QuantFormat, parse_pretrained_config, plan_config, plan_rank, rank_file
from arctic_trt.checkpoint.exclusion import matches
from arctic_trt.checkpoint.output_dir import MARKER
from arctic_trt.checkpoint.tensors import PARTIAL, TensorFile, flat_bytes
from arctic_trt.errors import ArcticTrtError
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Mapping, Rank
from arctic_trt.model.names import KV_CACHE_SCALE, LAYER, LM_HEAD, Cut, Kind, activation_scale, trt_layer, weight_scale
from arctic_trt.quantize.pipeline import REPORT
from arctic_trt.report.verify.findings import Verification
from arctic_trt.report.verify.headers import open_rank_file

OTHERS_MAY_DIFFER = ("logits_dtype", "exclude_modules")
"""What other producers of checkpoints choose differently, and TensorRT-LLM accepts."""
OUTLIER = 64.0
"""A scale this many times its peers' median, or that fraction of it, is worth a look."""
TWINS = (("residual_mlp.fc.weight", "residual_mlp.gate.weight"),)


class OpenCheckpoint:
    """A checkpoint whose headers have been read; ``files`` lacks the ranks that could not be."""

    def __init__(self, path: Path, config: ArcticConfig, mapping: Mapping, quant: QuantFormat) -> None:
        self.path, self.config, self.mapping, self.quant = path, config, mapping, quant
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
    _check_config(raw, plan_config(config, mapping, quant), found)
    _check_never_quantized(raw["quantization"], len(mapping.layers(0, config.num_hidden_layers)), found)
    checkpoint = OpenCheckpoint(path, config, mapping, quant)
    _check_files(checkpoint, found)
    for rank in mapping.ranks():
        file = open_rank_file(path / rank_file(rank.index), plan_rank(config, rank, quant), found)
        if file:
            checkpoint.files[rank.index] = file
    return checkpoint


def _check_config(raw: dict[str, Any], wanted: dict[str, Any], found: Verification) -> None:
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(raw.get(key), dict):
            _check_config(raw[key], value, found)
        elif key not in raw:
            found.error("config", "config.json", key, f"config.json lacks {key}, expected {value!r}.")
        elif raw[key] != value:
            report = found.warn if key in OTHERS_MAY_DIFFER else found.error
            report("config", "config.json", key, f"config.json has {key}={raw[key]!r}, expected {value!r}.")


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
    """What ranks share, and every scale; the matrices are not read."""
    for stage in range(checkpoint.mapping.pp_size):
        ranks = checkpoint.stage(stage)
        if not ranks:
            continue
        layers = checkpoint.mapping.layers(stage, checkpoint.config.num_hidden_layers)
        for local, _ in enumerate(layers):
            for name, group in _shared(checkpoint, ranks, local):
                _check_equal(checkpoint, name, group, found)
    if checkpoint.quant.fp8:
        scales = _read_scales(checkpoint)
        _check_scales(scales, found)
        _check_report(checkpoint, scales, found)


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
    _check_numbers(name, first, rank_file(holders[0].index), found)
    for rank in holders[1:]:
        if not flat_bytes(checkpoint.files[rank.index].read(name)).equal(flat_bytes(first)):
            file = rank_file(rank.index)
            sentence = f"{name} differs between {rank_file(holders[0].index)} and {file}, which must hold the same."
            found.error("replica", file, name, sentence)


def _check_numbers(name: str, values: Tensor, file: str, found: Verification) -> None:
    if not values.isfinite().all():
        found.error("not finite", file, name, f"{name} holds NaN or infinity.")
    elif not values.any():
        found.error("zero", file, name, f"{name} is zero throughout.")


def _read_scales(checkpoint: OpenCheckpoint) -> dict[str, dict[int, tuple[str, Tensor]]]:
    """Every scale by its suffix, then by layer of the model: the file that it was read from, and its values, EP blocks joined."""
    scales: dict[str, dict[int, tuple[str, Tensor]]] = {}
    for stage in range(checkpoint.mapping.pp_size):
        blocks = [rank for rank in checkpoint.stage(stage) if rank.moe_tp_rank == 0]
        for local, layer in enumerate(checkpoint.mapping.layers(stage, checkpoint.config.num_hidden_layers)):
            for suffix in _scale_suffixes(checkpoint.quant):
                name = trt_layer(local, suffix)
                holders = [rank for rank in blocks if checkpoint.has(rank, name)]
                parts = [checkpoint.files[rank.index].read(name).view(-1) for rank in holders]
                if parts:
                    whole = torch.cat(parts) if _is_experts_weight_scale(suffix) else parts[0]
                    scales.setdefault(suffix, {})[layer] = rank_file(holders[0].index), whole
    return scales


def _scale_suffixes(quant: QuantFormat) -> list[str]:
    names = [row.trt for row in LAYER if row.kind is Kind.QUANTIZED]
    suffixes = [scale(name) for name in names for scale in (weight_scale, activation_scale)]
    return [*suffixes, KV_CACHE_SCALE] if quant.kv_fp8 else suffixes


def _is_experts_weight_scale(suffix: str) -> bool:
    return suffix.startswith(("mlp.fc.", "mlp.proj.")) and suffix.endswith("weights_scaling_factor")


def _check_scales(scales: dict[str, dict[int, tuple[str, Tensor]]], found: Verification) -> None:
    for suffix, by_layer in scales.items():
        everything = torch.cat([values for _, values in by_layer.values()])
        usable = everything[everything.isfinite() & (everything > 0)]  # what is not is an error of its own, not a peer
        median = usable.median() if len(usable) else torch.tensor(1.0)
        for layer, (file, values) in by_layer.items():
            _check_scale(suffix, layer, file, values, float(median), found)
    for first, second in TWINS:
        for scale in (weight_scale, activation_scale):
            for layer, (file, values) in scales.get(scale(second), {}).items():
                twin = scales.get(scale(first), {}).get(layer)
                if twin is not None and not twin[1].equal(values):
                    name = f"layer {layer} {scale(second)}"
                    sentence = f"{name} is {values.tolist()}, {scale(first)} is {twin[1].tolist()}: they share one product."
                    found.error("twins", file, name, sentence)


def _check_scale(suffix: str, layer: int, file: str, values: Tensor, median: float, found: Verification) -> None:
    name = f"layer {layer} {suffix}"
    if not (values.isfinite().all() and (values > 0).all()):
        found.error("scale", file, name, f"{name} holds {float(values.min())}, expected finite positive numbers.")
        return
    if suffix == KV_CACHE_SCALE:
        return  # 1.0 and above by definition
    if (values == 1.0).any():
        found.warn("sentinel", file, name, f"{name} is exactly 1.0, which is what a scale that nobody computed looks like.")
    ratio = max(float(values.max()) / median, median / float(values.min()))
    if ratio > OUTLIER:
        found.warn("outlier", file, name, f"{name} is {ratio:.0f} times away from the median of its kind, {median:.3g}.")


def _check_report(checkpoint: OpenCheckpoint, scales: dict[str, dict[int, tuple[str, Tensor]]], found: Verification) -> None:
    """Single scales against what the quantization wrote down when it computed them."""
    try:
        report = json.loads((checkpoint.path / REPORT).read_text(encoding="utf-8"))
        recorded: list[dict[str, float]] = report["scales"]
    except FileNotFoundError:
        found.warn("report", REPORT, "", f"{REPORT} is not there: activation scales cannot be held to what was calibrated.")
        return
    except (ValueError, KeyError, TypeError):
        found.error("report", REPORT, "", f"{REPORT} cannot be read.")
        return
    for suffix, by_layer in scales.items():
        for layer, (file, stored) in by_layer.items():
            value = recorded[layer].get(suffix) if layer < len(recorded) else None
            if stored.numel() == 1 and float(stored) != value:
                name = f"layer {layer} {suffix}"
                found.error("scale", file, name, f"{name} is {float(stored)!r}, {REPORT} says {value!r}.")
