"""``arctic-trt build``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arctic_trt.cli.options import DIRECTORY, SectionedCommand, config_option, output_options, refuse_several_processes
from arctic_trt.cli.trtllm_options import trtllm_options, trtllm_sections
from arctic_trt.output import Output, duration, gigabytes

if TYPE_CHECKING:
    from arctic_trt.checkpoint.trtllm import TrtCheckpoint
    from arctic_trt.engine.config import BuildConfig
    from arctic_trt.engine.torch.build import RankBuilt, TorchBuildPlan
    from arctic_trt.recipes import BuildRecipe

EPILOG = """\b
Example, the official recipe's second step:
  arctic-trt build --checkpoint_dir arctic-fp8-tp8 --output_dir arctic-engine
                   --gpt_attention_plugin bfloat16 --gemm_plugin bfloat16 --workers 8

The same for a machine, with everything that suits it:
  arctic-trt build --config engines/h100x8-fp8.yaml --checkpoint_dir arctic-fp8-tp8 --output_dir arctic-engine

The engine directory is complete in itself: neither checkpoint nor tokenizer is needed beside it. Flags of TensorRT-LLM keep
the names that trtllm-build has for them, and have no effect on the torch backend."""


@click.command(
    "build",
    cls=SectionedCommand,
    sections=trtllm_sections(),
    epilog=EPILOG,
    short_help="Build an engine directory from a TensorRT-LLM checkpoint.",
)
@click.option("--checkpoint_dir", type=DIRECTORY, help="TensorRT-LLM checkpoint, as arctic-trt quantize writes it.  [required]")
@click.option("--output_dir", type=DIRECTORY, help="Engine directory to write.  [required]")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt_llm", "torch"]),
    help="auto: tensorrt_llm where it is installed, else torch.  [default: auto]",
)
@click.option("--workers", type=int, help="Ranks built side by side.  [default: as many as GPUs and memory, or cores, allow]")
@click.option("--ranks", metavar="LIST", help="Build only these, like 0-3; other machines build the others (TensorRT-LLM).")
@click.option("--max_batch_size", type=int, help="Sequences at a time.  [default: 256]")
@click.option("--max_input_len", type=int, help="Tokens of a prompt.  [default: max_seq_len]")
@click.option(
    "--max_seq_len",
    "--max_decoder_seq_len",
    "max_seq_len",
    type=int,
    help="Tokens of prompt and output together.  [default: the model's positions]",
)
@click.option("--max_num_tokens", type=int, help="Tokens of a step.  [default: 8192]")
@click.option("--max_beam_width", type=int, help="The torch backend has 1 alone.  [default: 1]")
@click.option("--timing_cache_dir", type=DIRECTORY, help="Where kernel timings are kept.  [default: ~/.cache/arctic-trt]")
@trtllm_options
@click.option("--overwrite", is_flag=True, default=None, help="Replace an engine that is already in --output_dir.")
@click.option("--dry_run", is_flag=True, help="Check everything, print what would be done, write nothing.")
@config_option
@output_options
def command(output: Output, config: Path | None, dry_run: bool, **flags: Any) -> None:
    """Build an engine directory from a TensorRT-LLM checkpoint, one file a rank."""
    from arctic_trt.engine.backends import choose_backend
    from arctic_trt.engine.config import TENSORRT_LLM
    from arctic_trt.recipes import BuildRecipe, resolve

    refuse_several_processes(
        "build",
        "and shares out its ranks by itself",
        "Start it without mpirun; --workers says how many ranks at a time, --ranks which on this machine.",
    )
    recipe = resolve(BuildRecipe, flags, config)
    backend = choose_backend(recipe.backend, dry_run=dry_run)
    checkpoint, limits = _inputs(recipe, beam_search=backend == TENSORRT_LLM)
    if backend == TENSORRT_LLM:
        from arctic_trt.cli.build_trtllm import build_with_tensorrt_llm

        build_with_tensorrt_llm(recipe, checkpoint, limits, output, dry_run=dry_run)
    else:
        _build_with_torch(recipe, checkpoint, limits, output, dry_run=dry_run)


def _inputs(recipe: BuildRecipe, *, beam_search: bool) -> tuple[TrtCheckpoint, BuildConfig]:
    from arctic_trt.checkpoint.trtllm import TrtCheckpoint
    from arctic_trt.engine.config import check_expectations, plan_build_config

    checkpoint = TrtCheckpoint(recipe.checkpoint_dir)
    check_expectations(recipe.expects, checkpoint.mapping, checkpoint.quant, str(recipe.checkpoint_dir))
    limits = plan_build_config(
        checkpoint.config,
        max_batch_size=recipe.max_batch_size,
        max_input_len=recipe.max_input_len,
        max_seq_len=recipe.max_seq_len,
        max_num_tokens=recipe.max_num_tokens,
        max_beam_width=recipe.max_beam_width,
        beam_search=beam_search,
    )
    return checkpoint, limits


def _build_with_torch(
    recipe: BuildRecipe, checkpoint: TrtCheckpoint, limits: BuildConfig, output: Output, *, dry_run: bool
) -> None:
    from arctic_trt.engine.torch.build import build_torch_engine, plan_torch_build
    from arctic_trt.machine import available_cores

    if recipe.trtllm_only:
        output.note(f"The torch backend has no plugins; without effect: {', '.join(f'--{name}' for name in recipe.trtllm_only)}")
    plan = plan_torch_build(checkpoint, recipe.output_dir, limits, overwrite=recipe.overwrite)
    if dry_run:
        output.result({**_facts(plan), "recipe": recipe.model_dump(mode="json", exclude_none=True)})
        output.table("Would write", [(key, str(value)) for key, value in _facts(plan).items()])
        return
    began, ranks = time.perf_counter(), len(plan.layouts)
    workers = recipe.workers or available_cores()
    built = build_torch_engine(plan, workers=workers, on_rank=lambda rank: output.note(_rank_line(rank, ranks)))
    _summarize(plan, built, time.perf_counter() - began, output)


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
