"""The quantization of a checkpoint: everything checked first, then one pass over its bytes, then ``config.json``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from arctic_trt.checkpoint.contract import QuantFormat, plan_config, plan_files, rank_file, read_json
from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.checkpoint.layout import FileLayout
from arctic_trt.checkpoint.output_dir import OutputDir, check_space
from arctic_trt.errors import RefusedError
from arctic_trt.machine import available_cores
from arctic_trt.model import tokenizer
from arctic_trt.model.mapping import Mapping, plan_mapping
from arctic_trt.quantize.data import find_dataset, read_samples
from arctic_trt.quantize.fingerprint import fingerprint
from arctic_trt.quantize.job import OnLayer, QuantizeJob
from arctic_trt.quantize.memory import MemoryPlan, default_budget, parse_size, plan_memory
from arctic_trt.quantize.meter import Meter
from arctic_trt.quantize.team import Solo, Team
from arctic_trt.recipes import QuantizeRecipe

REPORT = "report/quantize.json"
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


def _nobody(*_: object) -> None:
    """The listener of a job that nobody watches."""


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
    quant = QuantFormat(fp8=recipe.qformat == "fp8", kv_fp8=recipe.kv_fp8)
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


def check_device(device: str) -> None:
    """Refuse ``cuda`` where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RefusedError("--device cuda: this machine has no CUDA device that torch can use.", "Leave --device out.")


def _read_samples(recipe: QuantizeRecipe, source: HfCheckpoint) -> list[list[int]]:
    return read_samples(
        find_dataset(recipe.calib_dataset),
        limit=recipe.calib_size,
        max_tokens=min(recipe.calib_max_seq_length, source.config.max_position_embeddings),
        vocab_size=source.config.vocab_size,
        tokenizer_dir=recipe.model_dir,
    )


def finished_report(plan: QuantizePlan) -> dict[str, Any] | None:
    """The report of an earlier run that has already written exactly what ``plan`` would."""
    directory = plan.recipe.output_dir
    sizes = {rank_file(rank): layout.total_bytes for rank, layout in enumerate(plan.layouts)}
    whole = all((directory / name).is_file() and (directory / name).stat().st_size == size for name, size in sizes.items())
    if plan.recipe.overwrite or not whole or not (directory / REPORT).is_file() or not (directory / "config.json").is_file():
        return None
    report = read_json(directory / REPORT, "Choose another --output_dir, or pass --overwrite.")
    return report if report.get("fingerprint") == plan.fingerprint and output_of(plan).is_ours() else None


def settle_output(plan: QuantizePlan) -> None:
    """Remove what an earlier run that wrote everything had no time to remove: its journal and its marker."""
    output_of(plan).settle()


def output_of(plan: QuantizePlan) -> OutputDir:
    """The directory that ``plan`` writes."""
    return OutputDir(plan.recipe.output_dir, kind="checkpoint", fingerprint=plan.fingerprint, overwrite=plan.recipe.overwrite)


def check_output(plan: QuantizePlan) -> None:
    """Refuse an output directory or a disk that ``plan`` cannot be carried out with, without touching either."""
    output_of(plan).check()
    config = plan.recipe.output_dir / "config.json"
    if config.is_file() and "build_config" in read_json(config, "Choose another --output_dir."):
        raise RefusedError(f"{plan.recipe.output_dir} holds an engine, which is not overwritten.", "Choose another --output_dir.")
    check_space(plan.recipe.output_dir, plan.output_bytes)


def run_quantization(
    plan: QuantizePlan, on_layer: OnLayer = _nobody, team: Team | None = None, on_start: Callable[[Meter], None] = _nobody
) -> dict[str, Any]:
    """Carry out ``plan`` and return the figures of the report; the output directory appears whole or not at all.

    With a ``team`` of several processes each does its share; process 0 owns the directory and writes the report. ``on_start``
    receives the meter that shows where the job is.
    """
    team = team or Solo()
    recipe = plan.recipe
    with ExitStack() as stack:
        out = output_of(plan)
        if team.rank == 0:
            stack.enter_context(out)
        job = QuantizeJob(plan, out, team, on_layer, resuming=team.broadcast(out.resuming))
        stack.callback(job.close)
        on_start(job.meter)
        report = job.run()
        if team.rank == 0:
            for name in tokenizer.FILES:
                if (recipe.model_dir / name).is_file():
                    out.copy(recipe.model_dir / name, name)
            out.write_json(REPORT, report)
            out.write_json("config.json", plan_config(plan.source.config, plan.mapping, plan.quant))
    return report
