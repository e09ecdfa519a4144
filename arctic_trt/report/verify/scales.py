"""Every scale of a checkpoint: finite, positive, near its peers, equal where two share a product, and what the report says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from arctic_trt.checkpoint.contract import QuantFormat, rank_file
from arctic_trt.model.names import KV_CACHE_SCALE, LAYER, Kind, activation_scale, trt_layer, weight_scale
from arctic_trt.quantize.pipeline import REPORT
from arctic_trt.report.verify.checkpoint import OpenCheckpoint
from arctic_trt.report.verify.findings import Verification
from arctic_trt.report.verify.records import EXPERT_WEIGHT_SCALES

OUTLIER = 64.0
"""A scale this many times its peers' median, or that fraction of it, is worth a look."""
TWINS = (("residual_mlp.fc.weight", "residual_mlp.gate.weight"),)


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale with one suffix in one layer of the model: ``values`` float32 [1], or [E] in as many equal parts as ``files``."""

    suffix: str
    layer: int
    files: tuple[str, ...]
    values: Tensor

    @property
    def name(self) -> str:
        return f"layer {self.layer} {self.suffix}"

    def file(self, index: int) -> str:
        """The first file that holds the value ``index``."""
        return self.files[index * len(self.files) // len(self.values)]


Scales = dict[str, dict[int, Scale]]
"""By suffix, then by layer."""


def check_scales(checkpoint: OpenCheckpoint, found: Verification) -> None:
    """Look at every scale of a checkpoint in FP8."""
    scales = _read_scales(checkpoint)
    for by_layer in scales.values():
        everything = torch.cat([scale.values for scale in by_layer.values()])
        usable = everything[everything.isfinite() & (everything > 0)]  # what is not is an error of its own, not a peer
        median = float(usable.median()) if len(usable) else 1.0
        for scale in by_layer.values():
            _check_scale(scale, median, found)
            if checkpoint.records.report:
                _check_recorded(scale, checkpoint.records.report.scale(scale.layer, scale.suffix), found)
    _check_twins(scales, found)


def _read_scales(checkpoint: OpenCheckpoint) -> Scales:
    """Every scale of which no file is missing."""
    scales: Scales = {}
    for stage in range(checkpoint.mapping.pp_size):
        blocks = [rank for rank in checkpoint.stage(stage) if rank.moe_tp_rank == 0]
        for local, layer in enumerate(checkpoint.mapping.layers(stage, checkpoint.config.num_hidden_layers)):
            for suffix in _suffixes(checkpoint.quant):
                name = trt_layer(local, suffix)
                holders = [rank.index for rank in blocks if checkpoint.has(rank, name)]
                needed = checkpoint.mapping.moe_ep_size if suffix in EXPERT_WEIGHT_SCALES else 1
                if len(holders) >= needed:
                    parts = [checkpoint.files[index].read(name).view(-1) for index in holders[:needed]]
                    files = tuple(map(rank_file, holders[:needed]))
                    scales.setdefault(suffix, {})[layer] = Scale(suffix, layer, files, torch.cat(parts))
    return scales


def _suffixes(quant: QuantFormat) -> Iterator[str]:
    """The scales of a layer."""
    for row in LAYER:
        if row.kind is Kind.QUANTIZED:
            yield weight_scale(row.trt)
            yield activation_scale(row.trt)
    if quant.kv_fp8:
        yield KV_CACHE_SCALE


def _check_scale(scale: Scale, median: float, found: Verification) -> None:
    values, name = scale.values, scale.name
    if not (values.isfinite().all() and (values > 0).all()):
        found.error("scale", scale.files[0], name, f"{name} holds {float(values.min())}, expected finite positive numbers.")
        return
    if scale.suffix == KV_CACHE_SCALE:
        return  # 1.0 and above by definition
    if (values == 1.0).any():
        sentence = f"{name} is exactly 1.0, which is what a scale that nobody computed looks like."
        found.warn("sentinel", scale.files[0], name, sentence)
    ratio = max(float(values.max()) / median, median / float(values.min()))
    if ratio > OUTLIER:
        sentence = f"{name} is {ratio:.0f} times away from the median of its kind, {median:.3g}."
        found.warn("outlier", scale.files[0], name, sentence)


def _check_recorded(scale: Scale, recorded: list[float] | None, found: Verification) -> None:
    """Against what the quantization wrote down when it computed them, bit for bit."""
    if recorded is None:
        return
    if len(recorded) != len(scale.values):
        sentence = f"{REPORT} has {len(recorded)} numbers for {scale.name}, which has {len(scale.values)}."
        found.error("scale", scale.files[0], scale.name, sentence)
        return
    for index, (stored, value) in enumerate(zip(scale.values.tolist(), recorded, strict=True)):
        if stored != value:
            of = f" of expert {index}" if len(recorded) > 1 else ""
            found.error("scale", scale.file(index), scale.name, f"{scale.name}{of} is {stored!r}, {REPORT} says {value!r}.")


def _check_twins(scales: Scales, found: Verification) -> None:
    for first, second in TWINS:
        for kind in (weight_scale, activation_scale):
            for layer, scale in scales.get(kind(second), {}).items():
                twin = scales.get(kind(first), {}).get(layer)
                if twin is not None and not twin.values.equal(scale.values):
                    mine, other = scale.values.tolist(), twin.values.tolist()
                    sentence = f"{scale.name} is {mine}, {kind(first)} is {other}: they share one product."
                    found.error("twins", scale.files[0], scale.name, sentence)
