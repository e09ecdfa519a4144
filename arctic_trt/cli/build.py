"""``arctic-trt build``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arctic_trt.cli.options import DIRECTORY, config_option, output_options
from arctic_trt.output import Output, duration, gigabytes

if TYPE_CHECKING:
    from arctic_trt.engine.torch.build import RankBuilt, TorchBuildPlan
    from arctic_trt.recipes import BuildRecipe

EPILOG = """\b
Example, the official recipe's second step:
  arctic-trt build --checkpoint_dir arctic-fp8-tp8 --output_dir arctic-engine
                   --gpt_attention_plugin bfloat16 --gemm_plugin bfloat16 --workers 8

The engine directory is complete in itself: neither checkpoint nor tokenizer is needed beside it."""


@click.command("build", epilog=EPILOG, short_help="Build an engine directory from a TensorRT-LLM checkpoint.")
@click.option("--checkpoint_dir", type=DIRECTORY, help="TensorRT-LLM checkpoint, as arctic-trt quantize writes it.  [required]")
@click.option("--output_dir", type=DIRECTORY, help="Engine directory to write.  [required]")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt_llm", "torch"]),
    help="auto: tensorrt_llm where it is installed, else torch.  [default: auto]",
)
@click.option("--workers", type=int, help="Ranks built side by side.  [default: as many as cores]")
@click.option("--gpt_attention_plugin", metavar="DTYPE", help="TensorRT-LLM's attention plugin: auto, bfloat16, ..., disable.")
@click.option("--gemm_plugin", metavar="DTYPE", help="TensorRT-LLM's GEMM plugin: auto, bfloat16, fp8, ..., disable.")
@click.option("--moe_plugin", metavar="DTYPE", help="TensorRT-LLM's MoE plugin: auto, bfloat16, ..., disable.")
@click.option(
    "--use_fp8_context_fmha", type=click.Choice(["enable", "disable"]), help="FP8 attention over prompts (TensorRT-LLM)."
)
@click.option("--max_batch_size", type=int, help="Sequences at a time.  [default: 256]")
@click.option("--max_input_len", type=int, help="Tokens of a prompt.  [default: max_seq_len]")
@click.option("--max_seq_len", type=int, help="Tokens of prompt and output together.  [default: the model's positions]")
@click.option("--max_num_tokens", type=int, help="Tokens of a step.  [default: 8192]")
@click.option("--max_beam_width", type=int, help="Only 1 is supported.  [default: 1]")
@click.option("--overwrite", is_flag=True, default=None, help="Replace an engine that is already in --output_dir.")
@click.option("--dry_run", is_flag=True, help="Check everything, print what would be done, write nothing.")
@config_option
@output_options
def command(output: Output, config: Path | None, dry_run: bool, **flags: Any) -> None:
    """Build an engine directory from a TensorRT-LLM checkpoint, one file a rank."""
    from arctic_trt.recipes import BuildRecipe, resolve

    recipe = resolve(BuildRecipe, flags, config)
    plan = _plan(recipe, output)
    workers = recipe.workers or os.cpu_count() or 1
    if dry_run:
        output.result({**_facts(plan), "recipe": recipe.model_dump(mode="json")})
        output.table("Would write", [(key, str(value)) for key, value in _facts(plan).items()])
        return
    from arctic_trt.engine.torch.build import build_torch_engine

    began, ranks = time.perf_counter(), len(plan.layouts)
    built = build_torch_engine(plan, workers=workers, on_rank=lambda rank: output.note(_rank_line(rank, ranks)))
    _summarize(plan, built, time.perf_counter() - began, output)


def _plan(recipe: BuildRecipe, output: Output) -> TorchBuildPlan:
    from arctic_trt.checkpoint.trtllm import TrtCheckpoint
    from arctic_trt.engine.backends import resolve_backend, tensorrt_llm_installed
    from arctic_trt.engine.config import TORCH, plan_build_config
    from arctic_trt.engine.torch.build import plan_torch_build
    from arctic_trt.errors import RefusedError

    if resolve_backend(recipe.backend, tensorrt_llm_installed()) != TORCH:
        raise RefusedError("This version cannot build with TensorRT-LLM.", "Give --backend torch.")
    if recipe.plugins:
        output.note(f"The torch backend has no plugins; without effect: {', '.join(f'--{name}' for name in recipe.plugins)}")
    checkpoint = TrtCheckpoint(recipe.checkpoint_dir)
    limits = plan_build_config(
        checkpoint.config,
        max_batch_size=recipe.max_batch_size,
        max_input_len=recipe.max_input_len,
        max_seq_len=recipe.max_seq_len,
        max_num_tokens=recipe.max_num_tokens,
        max_beam_width=recipe.max_beam_width,
    )
    return plan_torch_build(checkpoint, recipe.output_dir, limits, overwrite=recipe.overwrite)


def _facts(plan: TorchBuildPlan) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "output_dir": str(plan.output_dir),
        "backend": "torch",
        "ranks": len(plan.layouts),
        "tensors": sum(len(layout.specs) for layout in plan.layouts),
        "output_bytes": plan.output_bytes,
        "build_config": asdict(plan.build_config),
    }


def _rank_line(built: RankBuilt, ranks: int) -> str:
    return f"rank {built.rank} of {ranks}  written {gigabytes(built.num_bytes)} in {duration(built.seconds)}"


def _summarize(plan: TorchBuildPlan, built: list[RankBuilt], seconds: float, output: Output) -> None:
    output.result({**_facts(plan), "bytes_written": sum(rank.num_bytes for rank in built), "seconds": round(seconds, 3)})
    output.table(
        "Built",
        [
            ("engine", str(plan.output_dir)),
            ("backend", "torch"),
            ("ranks", str(len(built))),
            ("written", gigabytes(plan.output_bytes)),
            ("time", duration(seconds)),
        ],
    )
