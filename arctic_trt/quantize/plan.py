"""What a quantization will do: its inputs checked, its memory fitted, its output known to the byte. Nothing is written here."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from arctic_trt.checkpoint.contract import QuantFormat, plan_files, plan_format
from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.checkpoint.layout import FileLayout
from arctic_trt.machine import available_cores
from arctic_trt.model.mapping import Mapping, plan_mapping
from arctic_trt.quantize.data import find_dataset, read_samples
from arctic_trt.quantize.device import check_device
from arctic_trt.quantize.fingerprint import fingerprint
from arctic_trt.quantize.memory import MemoryPlan, default_budget, parse_size, plan_memory
from arctic_trt.recipes import QuantizeRecipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """A quantization whose inputs have all been checked and whose output is known to the byte."""

    recipe: QuantizeRecipe
    source: HfCheckpoint
    mapping: Mapping
    quant: QuantFormat
    samples: list[list[int]]
    layouts: list[FileLayout]
    memory: MemoryPlan
    workers: int
    fingerprint: dict[str, Any]

    @property
    def output_bytes(self) -> int:
        return sum(layout.total_bytes for layout in self.layouts)

    @property
    def num_tensors(self) -> int:
        return sum(len(layout.specs) for layout in self.layouts)


def plan_quantization(recipe: QuantizeRecipe, local_processes: int = 1) -> QuantizePlan:
    """Check checkpoint, mapping, calibration data and memory without reading weights or writing anything."""
    check_device(recipe.device)
    source = HfCheckpoint(recipe.model_dir)
    mapping = plan_mapping(
        source.config,
        tp_size=recipe.tp_size,
        pp_size=recipe.pp_size,
        moe_tp_size=recipe.moe_tp_size,
        moe_ep_size=recipe.moe_ep_size,
    )
    quant = plan_format(
        fp8=recipe.qformat == "fp8",
        kv_fp8=recipe.kv_fp8,
        exclude_modules=recipe.exclude_modules,
        config=source.config,
        mapping=mapping,
    )
    samples = _read_samples(recipe, source) if quant.fp8 else []
    cores = available_cores(local_processes)
    budget = parse_size(recipe.memory_budget) if recipe.memory_budget else default_budget()
    memory = plan_memory(
        source.config,
        tokens=sum(map(len, samples)),
        batch_tokens=max(map(len, samples), default=0) * recipe.batch_size,
        workers=cores,
        budget_bytes=budget // local_processes,
    )
    if memory.workers < cores:
        logger.warning("Working on %d of %d cores: more do not fit the memory budget.", memory.workers, cores)
    layouts = plan_files(source.config, mapping, quant)
    print_ = fingerprint(recipe, source, mapping, samples)
    return QuantizePlan(recipe, source, mapping, quant, samples, layouts, memory, memory.workers, print_)


def _read_samples(recipe: QuantizeRecipe, source: HfCheckpoint) -> list[list[int]]:
    return read_samples(
        find_dataset(recipe.calib_dataset),
        limit=recipe.calib_size,
        max_tokens=min(recipe.calib_max_seq_length, source.config.max_position_embeddings),
        vocab_size=source.config.vocab_size,
        tokenizer_dir=recipe.model_dir,
    )
