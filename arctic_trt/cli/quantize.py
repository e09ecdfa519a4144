"""``arctic-trt quantize``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arctic_trt.cli.options import DIRECTORY, config_option, format_options, join_job, output_options
from arctic_trt.cli.progress import LayerProgress
from arctic_trt.cli.reporting import report_option, write_report
from arctic_trt.output import Output, duration, gigabytes

if TYPE_CHECKING:
    from arctic_trt.quantize.plan import QuantizePlan

EPILOG = """\b
Example, the official recipe's first step:
  arctic-trt quantize --model_dir snowflake-arctic-instruct --dtype bfloat16 --qformat fp8 --kv_cache_dtype fp8
                      --output_dir arctic-fp8-tp8 --batch_size 1 --calib_size 128 --tp_size 8

Calibration data is a .jsonl file: {"text": ...}, {"messages": [...]} or {"input_ids": [...]} a line."""

SHOWN_MODULES = 8


@click.command("quantize", epilog=EPILOG, short_help="Quantize a Hugging Face Arctic checkpoint to a TensorRT-LLM checkpoint.")
@click.option("--model_dir", type=DIRECTORY, help="Hugging Face checkpoint of Arctic, bf16.  [required]")
@click.option("--output_dir", type=DIRECTORY, help="TensorRT-LLM checkpoint to write.  [required]")
@click.option("--dtype", type=click.Choice(["bfloat16", "auto"]), help="Of what is not quantized.  [default: bfloat16]")
@format_options
@click.option("--calib_dataset", metavar="FILE.jsonl|NAME", help="Calibration samples.  [default: the set that comes along]")
@click.option("--calib_size", type=int, help="Use the first N samples.  [default: 128]")
@click.option("--calib_max_seq_length", type=int, help="Cut samples at N tokens.  [default: 512]")
@click.option("--batch_size", type=int, help="Samples of equal length a forward pass.  [default: 1]")
@click.option("--seed", type=int, help="Recorded in the report; nothing here is random.  [default: 1234]")
@click.option(
    "--calibrator",
    type=click.Choice(["streaming", "modelopt"]),
    help="modelopt: NVIDIA's own, which holds the whole model in memory (extra [modelopt]).  [default: streaming]",
)
@click.option("--calib_algorithm", help="Of the modelopt calibrator: max, mse, ...  [default: max]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to calibrate and cast.  [default: cpu]")
@click.option("--workers", type=int, help="Processes on this machine that share the work, under mpirun.  [default: 1]")
@click.option("--memory_budget", metavar="SIZE", help="Most memory to take, like 8GiB.  [default: 70% of what is free]")
@click.option("--overwrite", is_flag=True, default=None, help="Replace a checkpoint that is already in --output_dir.")
@click.option("--no_verify", is_flag=True, help="Do not check the structure of what was written.")
@report_option
@click.option("--dry_run", is_flag=True, help="Check everything, print what would be done, write nothing.")
@config_option
@output_options
def command(output: Output, config: Path | None, dry_run: bool, no_verify: bool, no_report: bool, **flags: Any) -> None:
    """Quantize a Hugging Face Arctic checkpoint to a TensorRT-LLM checkpoint, layer by layer in one pass.

    Started under mpirun or srun, or with --workers, several processes share the work; the result is the same bytes.
    """
    launch = join_job(output)
    from arctic_trt.launch import become_mpirun
    from arctic_trt.recipes import QuantizeRecipe, resolve

    recipe = resolve(QuantizeRecipe, flags, config)
    from arctic_trt.quantize.mpi import join_team
    from arctic_trt.quantize.pipeline import check_output, finished_report, run_quantization, settle_output
    from arctic_trt.quantize.plan import plan_quantization

    if recipe.workers > 1 and launch is None and not dry_run:
        become_mpirun(recipe.workers, sys.argv[1:])
    plan = plan_quantization(recipe, (launch.local_size or launch.world_size or 1) if launch else 1)
    _announce(plan, output)
    team = join_team(launch, plan.source.config.num_experts_per_tok)
    report = finished_report(plan) if team.rank == 0 else None
    if team.rank == 0 and not report:
        check_output(plan)
    if dry_run:
        output.result({**_forecast(plan), "recipe": recipe.model_dump(mode="json")})
        output.table("Would write", [(key, str(value)) for key, value in _forecast(plan).items()])
        return
    if report:
        settle_output(plan)
    finished = report = team.broadcast(report)
    if report:
        output.note(f"{recipe.output_dir} already holds exactly this checkpoint; nothing to do (--overwrite makes it again).")
    else:
        with LayerProgress(output, plan.source.config.num_local_experts) as progress:
            report = run_quantization(plan, progress.layer_done, team, progress.begin)
    if team.rank == 0:
        _summarize(report, output)
        _conclude(recipe.output_dir, output, check=not no_verify, draw=not no_report, finished=bool(finished))


def _conclude(output_dir: Path, output: Output, *, check: bool, draw: bool, finished: bool) -> None:
    """Look at the structure of what was written, without reading the matrices again, and draw the report.

    What was ``finished`` before keeps its report, which may tell of deeper verifications, if it has one.
    """
    from arctic_trt.cli.verify import fail_if_wrong, record_of, show_findings
    from arctic_trt.report.page.write import PAGE
    from arctic_trt.report.verify.run import verify_structure

    began = time.perf_counter()
    found = verify_structure(output_dir) if check else None
    if draw and not (finished and (output_dir / PAGE).exists()):
        seconds = time.perf_counter() - began
        write_report(output_dir, output, **({"verify": record_of(found, output_dir, seconds, None, 0.0)} if found else {}))
    if found:
        if not output.json_mode:
            show_findings(found, output)
        fail_if_wrong(found, output_dir)


def _announce(plan: QuantizePlan, output: Output) -> None:
    config, mapping, fold = plan.source.config, plan.mapping, plan.source.kv_fold
    output.note(
        f"{plan.recipe.model_dir}: {config.num_hidden_layers} layers, {config.num_local_experts} experts, "
        f"{gigabytes(plan.source.total_bytes)} -> {gigabytes(plan.output_bytes)} in {mapping.world_size} rank files "
        f"(tp {mapping.tp_size}, pp {mapping.pp_size}, moe_tp {mapping.moe_tp_size}, moe_ep {mapping.moe_ep_size})"
    )
    if fold:
        output.note(
            f"The checkpoint stores each KV head {fold.repeats} times: {fold.heads_in_file} heads are folded to "
            f"{config.num_key_value_heads}, which loses nothing."
        )
    kept = plan.quant.modules_in_bf16(config.num_hidden_layers)
    if kept:
        listed = ", ".join(f"layer {layer} {module}" for layer, module in kept[:SHOWN_MODULES])
        more = f" and {len(kept) - SHOWN_MODULES} more" if len(kept) > SHOWN_MODULES else ""
        output.note(f"kept in bf16: {listed}{more}")
    if plan.samples:
        output.note(f"calibrating with {len(plan.samples)} samples, {sum(map(len, plan.samples))} tokens")


def _forecast(plan: QuantizePlan) -> dict[str, Any]:
    return {
        "output_dir": str(plan.recipe.output_dir),
        "tensors": plan.num_tensors,
        "checkpoint_bytes": plan.source.total_bytes,
        "output_bytes": plan.output_bytes,
        "rank_bytes": [layout.total_bytes for layout in plan.layouts],
    }


def _summarize(report: dict[str, Any], output: Output) -> None:
    unseen = report["experts_without_tokens"]
    if unseen:
        listed = ", ".join(f"layer {layer} expert {expert}" for layer, expert in unseen[:8])
        more = f" and {len(unseen) - 8} more" if len(unseen) > 8 else ""
        output.note(
            f"warning: {len(unseen)} experts saw no calibration token ({listed}{more}); their activation scales are the "
            "maximum over the layer's other experts, of the same projection. A larger --calib_size reaches more."
        )
    output.result(report)
    output.table(
        "Quantized",
        [
            ("checkpoint", report["output_dir"]),
            ("tensors", str(report["tensors"])),
            ("read", gigabytes(report["bytes_read"])),
            ("written", gigabytes(report["bytes_written"])),
            ("time", duration(report["seconds"])),
            ("peak memory", gigabytes(report["peak_rss_bytes"])),
            ("experts without tokens", str(len(unseen))),
        ],
    )
