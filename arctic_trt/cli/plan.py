"""``arctic-trt plan``."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arctic_trt.cli.options import DIRECTORY, FILE, config_option, format_options, output_options
from arctic_trt.output import Output, duration, gigabytes

if TYPE_CHECKING:
    from arctic_trt.errors import RefusedError
    from arctic_trt.model.mapping import Mapping
    from arctic_trt.recipes import PlanRecipe
    from arctic_trt.report.gpus import Load
    from arctic_trt.report.measure import Rates
    from arctic_trt.report.plan import Forecast, Job, Source

EPILOG = """\b
Example, before anything is downloaded:
  arctic-trt plan config.json --no_measure --max_batch_size 64

Sizes on disk are exact; memory, time and GPU memory are estimates. A GPU counts as large enough when weights, KV cache
and activations take at most 92 % of its memory; the torch backend's engines on CUDA need as much."""


@click.command("plan", epilog=EPILOG, short_help="Forecast sizes, memory, disk, time and GPUs, from config.json alone.")
@click.argument("model", metavar="MODEL_DIR_OR_CONFIG", type=click.Path(path_type=Path))
@click.option("--output_dir", type=DIRECTORY, help="Refuse unless its disk has room.  [default: look at .]")
@format_options
@click.option("--calib_dataset", metavar="NAME", help="Not read; so that a recipe of quantize serves here too.")
@click.option("--calib_size", type=int, help="Calibration samples.  [default: 128]")
@click.option("--calib_max_seq_length", type=int, help="Tokens of each, at most.  [default: 512]")
@click.option("--batch_size", type=int, help="Samples a forward pass.  [default: 1]")
@click.option("--memory_budget", metavar="SIZE", help="Refuse unless this suffices.  [default: 70% of what is free]")
@click.option("--max_batch_size", type=int, help="Sequences at a time, when the engine runs.  [default: 8]")
@click.option("--max_seq_len", type=int, help="Tokens of prompt and output together.  [default: the model's positions]")
@click.option("--max_num_tokens", type=int, help="Tokens of a step.  [default: 8192]")
@click.option("--seconds", type=float, help="Measure this machine for so long, at most 60.  [default: 10]")
@click.option("--no_measure", is_flag=True, default=None, help="Do not measure this machine, and give no time.")
@click.option("--engine_config", type=FILE, help="Plan for a recipe of build: its limits, ranks and number formats.")
@config_option
@output_options
def command(output: Output, config: Path | None, engine_config: Path | None, **flags: Any) -> None:
    """Forecast what quantizing a checkpoint takes and which GPUs its engines fit, before anything is downloaded."""
    from arctic_trt.recipes import PlanRecipe, resolve

    given = {name: value for name, value in flags.items() if value is not None}
    recipe = resolve(PlanRecipe, {**_of_engine(engine_config), **given}, config)
    from arctic_trt.report.plan import forecast, read_source

    source = read_source(recipe.model)
    for notice in source.notices:
        output.note(notice)
    load = _load(recipe, source)
    plan = forecast(source, _job(recipe, source), load)
    disk_dir = _existing(recipe.output_dir or Path())
    free_bytes = shutil.disk_usage(disk_dir).free
    fatal, doubts = _judge(plan, recipe, free_bytes)
    measured = None if recipe.no_measure or fatal else _measure(disk_dir, recipe.seconds, output)
    refusals = [str(refusal) for refusal in fatal + doubts]
    output.result({**plan.as_dict(), "disk_free_bytes": free_bytes, **_time(plan, measured), "refusals": refusals})
    _show(plan, load, free_bytes, measured, output)
    for sentence in refusals[1:] if fatal else refusals:
        output.note(f"warning: {sentence}")
    if fatal:
        raise fatal[0]


def _of_engine(path: Path | None) -> dict[str, Any]:
    """What a recipe of ``arctic-trt build`` says about memory; nothing without one."""
    from arctic_trt.recipes import BuildRecipe, resolve

    if path is None:
        return {}
    build = resolve(BuildRecipe, {"checkpoint_dir": Path(), "output_dir": Path()}, path)
    sizes = {name: getattr(build, name) for name in ("max_batch_size", "max_seq_len", "max_num_tokens")}
    return {**sizes, **(build.expects.model_dump(exclude={"machine"}) if build.expects else {})}


def _load(recipe: PlanRecipe, source: Source) -> Load:
    from arctic_trt.errors import UsageError
    from arctic_trt.report.gpus import Load

    positions = source.config.max_position_embeddings
    seq_len = recipe.max_seq_len or positions
    if seq_len > positions:
        raise UsageError(f"--max_seq_len {seq_len} exceeds max_position_embeddings={positions}.", "It has no more positions.")
    return Load(max_batch_size=recipe.max_batch_size, max_seq_len=seq_len, max_num_tokens=recipe.max_num_tokens)


def _job(recipe: PlanRecipe, source: Source) -> Job:
    from arctic_trt.checkpoint.contract import plan_format
    from arctic_trt.machine import available_cores
    from arctic_trt.model.mapping import plan_mapping
    from arctic_trt.quantize.memory import default_budget, parse_size
    from arctic_trt.report.plan import Job

    mapping = plan_mapping(
        source.config,
        tp_size=recipe.tp_size,
        pp_size=recipe.pp_size,
        moe_tp_size=recipe.moe_tp_size,
        moe_ep_size=recipe.moe_ep_size,
    )
    return Job(
        mapping=mapping,
        quant=plan_format(
            fp8=recipe.qformat == "fp8",
            kv_fp8=recipe.kv_fp8,
            exclude_modules=recipe.exclude_modules,
            config=source.config,
            mapping=mapping,
        ),
        samples=recipe.calib_size,
        sample_tokens=min(recipe.calib_max_seq_length, source.config.max_position_embeddings),
        batch_size=recipe.batch_size,
        workers=available_cores(),
        budget_bytes=parse_size(recipe.memory_budget) if recipe.memory_budget else default_budget(),
    )


def _existing(path: Path) -> Path:
    """The nearest directory that is already there: what is made in ``path`` will lie on the same disk."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())


def _judge(plan: Forecast, recipe: PlanRecipe, free_bytes: int) -> tuple[list[RefusedError], list[RefusedError]]:
    """What does not suffice: of what was asked for, and of what this machine happens to have."""
    from arctic_trt.report.plan import disk_refusal, memory_refusal

    found = (
        (disk_refusal(plan, recipe.output_dir or Path(), free_bytes), recipe.output_dir),
        (memory_refusal(plan), recipe.memory_budget),
    )
    fatal = [refusal for refusal, asked in found if refusal and asked]
    return fatal, [refusal for refusal, asked in found if refusal and not asked]


def _measure(directory: Path, seconds: float, output: Output) -> Rates:
    from arctic_trt.report.measure import measure_machine

    output.note(f"measuring this machine's disk and cores for {duration(seconds)} (--no_measure leaves it out)")
    return measure_machine(directory, seconds=seconds)


def _time(plan: Forecast, rates: Rates | None) -> dict[str, Any]:
    from arctic_trt.report.plan import estimate_time

    if rates is None:
        return {"seconds": None, "seconds_alone": None, "rates": None}
    time = estimate_time(plan, rates)
    return {"seconds": time.total, "seconds_alone": asdict(time), "rates": asdict(rates)}


def _show(plan: Forecast, load: Load, free_bytes: int, rates: Rates | None, output: Output) -> None:
    output.table("Quantization", [*_sizes(plan, free_bytes), *_times(plan, rates)], always=True)
    output.table(
        f"GPU memory of a rank, running {load.max_batch_size} sequences of {load.max_seq_len} tokens",
        [
            (
                f"{need.stage + 1} of {len(plan.stages)}",
                str(need.layers),
                gigabytes(need.weights_bytes),
                f"{gigabytes(need.kv_cache_bytes)} ({need.kv_bytes_per_token} B a token)",
                gigabytes(need.activation_bytes),
                gigabytes(need.needed_bytes),
            )
            for need in plan.stages
        ],
        ("stage", "layers", "weights", "KV cache", "activations", "needed"),
        always=True,
    )
    output.table(
        "Machines, by memory",
        [
            (
                f"{fit.machine.count} x {fit.machine.name}",
                _sizes_of(fit.mapping) if fit.mapping else "-",
                gigabytes(fit.needed_bytes) if fit.needed_bytes else "-",
                gigabytes(fit.machine.gpu_memory_bytes),
                f"no: {fit.why_not}" if fit.why_not else "yes",
            )
            for fit in plan.machines
        ],
        ("GPUs", "mapping", "needed by each", "it has", "fits"),
        always=True,
    )


def _sizes(plan: Forecast, free_bytes: int) -> list[tuple[str, str]]:
    config, mapping, form = plan.source.config, plan.job.mapping, "FP8" if plan.job.quant.fp8 else "bf16"
    form += f", modules in bf16: {len(plan.modules_in_bf16)}" if plan.modules_in_bf16 else ""
    heads = f"{config.num_key_value_heads} KV heads"
    least, most = gigabytes(min(plan.rank_bytes)), gigabytes(max(plan.rank_bytes))
    each = most if least == most else f"{least} to {most}"
    origin = "the files' headers" if plan.source.from_headers else "config.json"
    return [
        ("model", f"{config.num_hidden_layers} layers, {config.num_local_experts} experts, {heads}"),
        ("checkpoint", f"{gigabytes(plan.source.checkpoint_bytes)} in {plan.source.num_tensors} tensors, by {origin}"),
        ("output", f"{gigabytes(plan.output_bytes)} in {plan.num_tensors} tensors, {form}"),
        ("rank files", f"{mapping.world_size} of {each} ({_sizes_of(mapping)}, moe_ep {mapping.moe_ep_size})"),
        ("peak memory", f"{gigabytes(plan.memory.peak_bytes)} of the {gigabytes(plan.job.budget_bytes)} that it may take"),
        ("disk", f"{gigabytes(plan.disk_bytes)} ({gigabytes(free_bytes)} are free)"),
    ]


def _sizes_of(mapping: Mapping) -> str:
    return f"tp {mapping.tp_size}, pp {mapping.pp_size}"


def _times(plan: Forecast, rates: Rates | None) -> list[tuple[str, str]]:
    from arctic_trt.report.plan import estimate_time

    if rates is None:
        return [("time", "not measured")]
    time = estimate_time(plan, rates)
    return [
        ("time", duration(time.total)),
        ("  disk", f"read {duration(time.read)} + write {duration(time.write)}"),
        ("  cores", f"cast {duration(time.cast)} + calibrate {duration(time.calibrate)}, meanwhile"),
        ("  measured", f"read {gigabytes(rates.read_bytes)}/s, write {gigabytes(rates.write_bytes)}/s"),
        ("", f"cast {gigabytes(rates.cast_bytes)}/s, bf16 GEMM {rates.gemm_flops / 1e9:.0f} GFLOP/s on {rates.cores} cores"),
    ]
