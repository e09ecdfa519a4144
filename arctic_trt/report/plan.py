"""What a quantization takes, and what its engines will need, worked out from dimensions before anything is downloaded or bought.

Everything here is arithmetic except :func:`read_source`. Sizes on disk are exact, the quantizer's own; the time of a pass is that
of its slower half, since disk and cores work at the same time::

    seconds     = max(read + write, cast + calibrate)
    read, write = checkpoint bytes / read rate, output bytes / write rate      (both on the measured disk)
    cast        = checkpoint bytes / cast rate                                 (FP8 only)
    calibrate   = calibration tokens * operations per token / GEMM rate        (FP8 only)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arctic_trt.checkpoint.contract import QuantFormat, plan_files, read_json
from arctic_trt.errors import CheckpointError, RefusedError
from arctic_trt.model.config import ArcticConfig, parse_config
from arctic_trt.model.mapping import Mapping
from arctic_trt.model.names import hf_shapes
from arctic_trt.quantize.memory import MIN_DEPTH, MemoryPlan, estimate_peak, plan_memory
from arctic_trt.report.gpus import MACHINES, Fit, Load, StageNeed, estimate_stages, judge_machine
from arctic_trt.report.measure import Rates

STATES_KEPT = 2
"""Hidden states in the journal: those after the last committed layer, and those of the layer being committed."""
SPILLED_MATRICES = 3
"""Matrices of the size of the hidden states that calibration keeps on disk when they do not fit in memory."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """The model and its checkpoint; ``config`` counts the KV heads that a quantized checkpoint would have."""

    config: ArcticConfig
    checkpoint_bytes: int
    num_tensors: int
    from_headers: bool
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The quantization: ``samples`` of at most ``sample_tokens`` tokens in batches of ``batch_size``; none without FP8."""

    mapping: Mapping
    quant: QuantFormat
    samples: int
    sample_tokens: int
    batch_size: int
    workers: int
    budget_bytes: int

    @property
    def tokens(self) -> int:
        return self.samples * self.sample_tokens if self.quant.fp8 else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Seconds that each part of a pass would take alone; disk and cores work at the same time."""

    read: float
    write: float
    cast: float
    calibrate: float

    @property
    def total(self) -> float:
        return max(self.read + self.write, self.cast + self.calibrate)


@dataclass(frozen=True, slots=True)
class Forecast:
    """The answer, except for the time: that needs :func:`estimate_time`."""

    source: Source
    job: Job
    rank_bytes: tuple[int, ...]
    num_tensors: int
    memory: MemoryPlan
    disk_bytes: int
    stages: tuple[StageNeed, ...]
    machines: tuple[Fit, ...]

    @property
    def output_bytes(self) -> int:
        return sum(self.rank_bytes)

    @property
    def modules_in_bf16(self) -> list[tuple[int, str]]:
        return self.job.quant.modules_in_bf16(self.source.config.num_hidden_layers)

    def as_dict(self) -> dict[str, Any]:
        """The figures, for ``--json``."""
        return {
            "checkpoint_bytes": self.source.checkpoint_bytes,
            "checkpoint_tensors": self.source.num_tensors,
            "checkpoint_on_disk": self.source.from_headers,
            "output_bytes": self.output_bytes,
            "output_tensors": self.num_tensors,
            "rank_bytes": list(self.rank_bytes),
            "modules_in_bf16": [list(each) for each in self.modules_in_bf16],
            "mapping": self.job.mapping.as_dict(),
            "calibration_tokens": self.job.tokens,
            "memory_budget_bytes": self.job.budget_bytes,
            "peak_memory_bytes": self.memory.peak_bytes,
            "disk_bytes": self.disk_bytes,
            "stages": [need.as_dict() for need in self.stages],
            "gpus": [fit.as_dict() for fit in self.machines],
        }


def forecast(source: Source, job: Job, load: Load) -> Forecast:
    """Work out everything that follows from dimensions. A memory budget that is too small gives the narrowest plan there is."""
    config = source.config
    layouts = plan_files(config, job.mapping, job.quant)
    rank_bytes = tuple(layout.total_bytes for layout in layouts)
    memory = forecast_memory(config, job)
    state_bytes = 2 * job.tokens * config.hidden_size
    kept = STATES_KEPT + (SPILLED_MATRICES if memory.spill else 0)
    return Forecast(
        source,
        job,
        rank_bytes,
        sum(len(layout.specs) for layout in layouts),
        memory,
        sum(rank_bytes) + kept * state_bytes,
        tuple(estimate_stages(config, job.mapping, job.quant, load)),
        tuple(judge_machine(machine, config, job.mapping, job.quant, load) for machine in MACHINES),
    )


def memory_refusal(plan: Forecast) -> RefusedError | None:
    """What ``quantize`` would refuse to do within the memory budget, with the budget that would do."""
    peak_bytes, budget_bytes = plan.memory.peak_bytes, plan.job.budget_bytes
    if peak_bytes <= budget_bytes:
        return None
    return RefusedError(
        f"The quantization needs {peak_bytes / 2**30:.2f} GiB of memory, but may take only {budget_bytes / 2**30:.2f} GiB.",
        f"Raise --memory_budget to {-(-peak_bytes // MIB)}MiB, or lower --batch_size or --calib_max_seq_length.",
    )


def disk_refusal(plan: Forecast, output_dir: Path, free_bytes: int) -> RefusedError | None:
    """What ``quantize`` would refuse to start for want of disk space, with how much is missing."""
    missing_bytes = plan.disk_bytes - free_bytes
    if missing_bytes <= 0:
        return None
    return RefusedError(
        f"{output_dir} needs {plan.disk_bytes / 1e9:.2f} GB, but its disk has {free_bytes / 1e9:.2f} GB free.",
        f"Free {missing_bytes / 1e9:.2f} GB more, or choose another --output_dir.",
    )


def source_from_config(config: ArcticConfig, *notices: str) -> Source:
    """The checkpoint that ``config`` describes, every tensor in bf16."""
    shapes = hf_shapes(config)
    heads = config.num_key_value_heads
    if 1 < heads == config.num_attention_heads:
        notices += (
            f"config.json states {heads} KV heads, one for each attention head. The base model and the first upload of Arctic "
            "store 8 heads repeated: quantize recognises that in the weights and folds them, and then output and KV cache "
            "are smaller than shown.",
        )
    return Source(config, 2 * sum(math.prod(shape) for shape in shapes.values()), len(shapes), False, notices)


def forecast_memory(config: ArcticConfig, job: Job) -> MemoryPlan:
    """The quantizer's plan for the budget; when there is none, the least that it could do with."""
    batch_tokens = job.batch_size * job.sample_tokens if job.quant.fp8 else 0
    try:
        return plan_memory(
            config, tokens=job.tokens, batch_tokens=batch_tokens, workers=job.workers, budget_bytes=job.budget_bytes
        )
    except RefusedError:
        least = estimate_peak(
            config,
            tokens=job.tokens,
            batch_tokens=batch_tokens,
            workers=1,
            depth=MIN_DEPTH,
            spill=job.tokens > 0,
        )
        return MemoryPlan(MIN_DEPTH, job.tokens > 0, least, 1)


def estimate_time(plan: Forecast, rates: Rates) -> Seconds:
    """Seconds of the pass at the measured ``rates``."""
    fp8 = plan.job.quant.fp8
    return Seconds(
        read=plan.source.checkpoint_bytes / rates.read_bytes,
        write=plan.output_bytes / rates.write_bytes,
        cast=plan.source.checkpoint_bytes / rates.cast_bytes if fp8 else 0.0,
        calibrate=plan.job.tokens * flops_per_token(plan.source.config, plan.job.sample_tokens) / rates.gemm_flops,
    )


def flops_per_token(config: ArcticConfig, sample_tokens: int) -> int:
    """Floating-point operations with which one token passes all layers, in samples of ``sample_tokens``."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    attention = 2 * hidden * hidden + 2 * config.kv_size * hidden + 2 * sample_tokens * hidden
    experts = config.num_experts_per_tok * 3 * ffn * hidden + config.num_local_experts * hidden
    return 2 * config.num_hidden_layers * (attention + 3 * hidden * hidden + experts)


def read_source(path: Path) -> Source:
    """What ``path`` holds: a checkpoint's directory, weights there or not, or a ``config.json``.

    Raises :class:`UsageError` when the configuration is absent or not Arctic's. Weights that are missing or broken are no
    failure: the figures then follow from the configuration, with a notice.
    """
    config_path = path / "config.json" if path.is_dir() else path
    raw = read_json(config_path, "Give the directory of a Hugging Face Arctic checkpoint, or its config.json.")
    config = parse_config(raw, str(config_path))
    if not path.is_dir() or not any(path.glob("*.safetensors*")):
        return source_from_config(config)
    from arctic_trt.checkpoint.hf import HfCheckpoint

    try:
        checkpoint = HfCheckpoint(path)
    except CheckpointError as error:
        return source_from_config(config, f"The figures follow from config.json alone, since the weights are incomplete: {error}")
    checkpoint.close()
    notices: tuple[str, ...] = ()
    if fold := checkpoint.kv_fold:
        kept = checkpoint.config.num_key_value_heads
        notices = (f"Each KV head is stored {fold.repeats} times: quantize folds {fold.heads_in_file} heads to {kept}.",)
    shapes = hf_shapes(checkpoint.config)
    return Source(checkpoint.config, checkpoint.total_bytes, len(shapes), True, notices)
