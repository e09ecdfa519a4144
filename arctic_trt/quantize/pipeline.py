"""The quantization of a checkpoint: everything checked first, then one pass over its bytes, then ``config.json``."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from arctic_trt import __version__
from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.checkpoint.layout import FileLayout
from arctic_trt.checkpoint.output_dir import OutputDir, check_occupied, check_space
from arctic_trt.checkpoint.trtllm import QuantFormat, plan_config
from arctic_trt.checkpoint.writer import RankFiles, plan_files
from arctic_trt.model import tokenizer
from arctic_trt.model.mapping import Mapping, plan_mapping
from arctic_trt.model.names import EMBEDDING, FINAL_NORM, LM_HEAD
from arctic_trt.quantize.calibrate import Calibration
from arctic_trt.quantize.data import find_dataset, plan_batches, read_samples
from arctic_trt.quantize.layer_pass import LayerPass, LayerSummary
from arctic_trt.quantize.scales import weight_amax
from arctic_trt.recipes import QuantizeRecipe

REPORT = "report/quantize.json"


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """A quantization whose inputs have all been checked and whose output is known to the byte."""

    recipe: QuantizeRecipe
    source: HfCheckpoint
    mapping: Mapping
    quant: QuantFormat
    samples: list[list[int]]
    layouts: list[FileLayout]

    @property
    def output_bytes(self) -> int:
        return sum(layout.total_bytes for layout in self.layouts)

    @property
    def num_tensors(self) -> int:
        return sum(len(layout.specs) for layout in self.layouts)


@dataclass(frozen=True, slots=True)
class Progress:
    """State of the pass after a layer, for whoever shows it."""

    summary: LayerSummary
    num_layers: int
    bytes_read: int
    bytes_written: int
    output_bytes: int
    seconds: float
    rss_bytes: int


def plan_quantization(recipe: QuantizeRecipe) -> QuantizePlan:
    """Check checkpoint, mapping, calibration data, output directory and disk without reading weights or writing anything."""
    source = HfCheckpoint(recipe.model_dir)
    mapping = plan_mapping(
        source.config,
        tp_size=recipe.tp_size,
        pp_size=recipe.pp_size,
        moe_tp_size=recipe.moe_tp_size,
        moe_ep_size=recipe.moe_ep_size,
    )
    quant = QuantFormat(fp8=recipe.qformat == "fp8", kv_fp8=recipe.kv_fp8)
    samples: list[list[int]] = []
    if quant.fp8:
        samples = read_samples(
            find_dataset(recipe.calib_dataset),
            limit=recipe.calib_size,
            max_tokens=min(recipe.calib_max_seq_length, source.config.max_position_embeddings),
            vocab_size=source.config.vocab_size,
            tokenizer_dir=recipe.model_dir,
        )
    plan = QuantizePlan(recipe, source, mapping, quant, samples, plan_files(source.config, mapping, quant))
    check_occupied(recipe.output_dir, overwrite=recipe.overwrite)
    check_space(recipe.output_dir, plan.output_bytes)
    return plan


def run_quantization(plan: QuantizePlan, on_layer: Callable[[Progress], None]) -> dict[str, Any]:
    """Carry out ``plan`` and return the figures of the report; the output directory appears whole or not at all."""
    began = time.perf_counter()
    output_dir = plan.recipe.output_dir
    with OutputDir(output_dir, kind="checkpoint", overwrite=plan.recipe.overwrite) as out:
        files = RankFiles(output_dir, plan.source.config, plan.mapping, plan.quant)
        try:
            summaries = _pass_over(plan, files, on_layer, began)
            files.finish()
        except BaseException:
            files.abandon()
            raise
        copied = [name for name in tokenizer.FILES if (plan.recipe.model_dir / name).is_file()]
        for name in copied:
            out.copy(plan.recipe.model_dir / name, name)
        report = _report(plan, files, summaries, time.perf_counter() - began)
        out.write_json(REPORT, report)
        out.write_json("config.json", plan_config(plan.source.config, plan.mapping, plan.quant))
    return report


def _pass_over(plan: QuantizePlan, files: RankFiles, on_layer: Callable[[Progress], None], began: float) -> list[LayerSummary]:
    source, config = plan.source, plan.source.config
    embedding_VD = source.read(EMBEDDING.hf[0])
    weight_amax({EMBEDDING.hf[0]: embedding_VD})
    files.write_global(EMBEDDING, embedding_VD, stage=0)
    batches = plan_batches(plan.samples, plan.recipe.batch_size)
    calibration = Calibration(batches, embedding_VD, config) if batches else None
    del embedding_VD
    layers = LayerPass(source, files, plan.quant, calibration)
    summaries = []
    for layer in range(config.num_hidden_layers):
        summaries.append(layers.run(layer))
        seconds = time.perf_counter() - began
        on_layer(
            Progress(
                summaries[-1],
                config.num_hidden_layers,
                source.bytes_read,
                files.bytes_written,
                plan.output_bytes,
                seconds,
                peak_rss_bytes(),
            )
        )
    for row in (FINAL_NORM, LM_HEAD):
        tensor = source.read(row.hf[0])
        weight_amax({row.hf[0]: tensor})
        files.write_global(row, tensor, stage=plan.mapping.pp_size - 1)
    return summaries


def _report(plan: QuantizePlan, files: RankFiles, summaries: list[LayerSummary], seconds: float) -> dict[str, Any]:
    unseen = [[s.layer, expert] for s in summaries for expert in s.experts_without_tokens]
    return {
        "output_dir": str(plan.recipe.output_dir),
        "tensors": plan.num_tensors,
        "bytes_read": plan.source.bytes_read,
        "bytes_written": files.bytes_written,
        "seconds": round(seconds, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "resumed_layers": 0,
        "experts_without_tokens": unseen,
        "calibration_samples": len(plan.samples),
        "calibration_tokens": sum(map(len, plan.samples)),
        "kv_heads_folded_from": plan.source.kv_fold.heads_in_file if plan.source.kv_fold else None,
        "tokens_per_expert": [list(s.tokens_per_expert) for s in summaries],
        "scales": [s.scales for s in summaries],
        "recipe": plan.recipe.model_dump(mode="json"),
        "version": __version__,
    }


def peak_rss_bytes() -> int:
    """Highest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
