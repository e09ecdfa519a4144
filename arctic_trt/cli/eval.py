"""``arctic-trt eval``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arctic_trt.cli.options import DIRECTORY, FILE, config_option, output_options
from arctic_trt.cli.reporting import report_option, write_report
from arctic_trt.output import Output, duration, gigabytes

if TYPE_CHECKING:
    from arctic_trt.report.evaluate.job import LayerErrors
    from arctic_trt.report.evaluate.plan import EvaluationPlan

EPILOG = """\b
Examples:
  arctic-trt eval snowflake-arctic-instruct --data heldout.jsonl
  arctic-trt eval arctic-fp8-tp8 --against snowflake-arctic-instruct --data heldout.jsonl
  arctic-trt eval arctic-fp8-tp8 --against snowflake-arctic-instruct --data heldout.jsonl --sensitivity --size_budget 3%

Data is a .jsonl file: {"text": ...}, {"messages": [...]} or {"input_ids": [...]} a line. An interrupted evaluation goes on where
it was when the same command is given again."""

SHOWN_UNITS = 12


@click.command("eval", epilog=EPILOG, short_help="Measure perplexity, and how far a checkpoint is from its original.")
@click.argument("path", metavar="MODEL_OR_CKPT", type=DIRECTORY)
@click.option("--against", type=DIRECTORY, help="The original: adds KL divergence, top-1 agreement, error of hidden states.")
@click.option("--data", metavar="FILE.jsonl|NAME", help="Text to predict.  [default: heldout, which comes along]")
@click.option("--num_samples", type=int, help="Use the first N samples.  [default: all]")
@click.option("--max_seq_length", type=int, help="Cut samples at N tokens.  [default: the model's longest]")
@click.option("--batch_size", type=int, help="Samples of equal length a forward pass.  [default: 1]")
@click.option("--tokenizer_dir", type=DIRECTORY, help="Where tokenizer.json lies.  [default: MODEL_OR_CKPT]")
@click.option(
    "--sensitivity",
    is_flag=True,
    default=None,
    help="Say which sites and layers cost most; write a recipe that keeps them in bf16.",
)
@click.option("--size_budget", metavar="SHARE|SIZE", help="What the checkpoint may grow by, like 10% or 40GB.  [default: 10%]")
@click.option(
    "--sites",
    type=click.Choice(["attention", "residual_mlp", "experts", "kv_cache"]),
    multiple=True,
    help="What may be kept in bf16; repeatable.  [default: all of them]",
)
@click.option("--recipe_file", type=FILE, help="Where the recipe goes.  [default: CKPT/report/sensitivity.yaml]")
@click.option("--work_dir", type=DIRECTORY, help="Where unfinished work is kept.  [default: the user's cache]")
@click.option("--memory_budget", metavar="SIZE", help="Most memory to take, like 8GiB.  [default: 70% of what is free]")
@report_option
@config_option
@output_options
def command(output: Output, path: Path, config: Path | None, sites: tuple[str, ...], no_report: bool, **flags: Any) -> None:
    """Measure a model or a checkpoint on text: perplexity, and with --against its distance from the original.

    Weights are streamed layer by layer, as quantize does: no GPU, and memory for a few experts. FP8 is computed as the engine
    computes it, with rounded weights, activations, keys and values.
    """
    from arctic_trt.recipes import EvaluateRecipe, resolve

    recipe = resolve(EvaluateRecipe, {**flags, "path": path, "sites": sites or None}, config)
    from arctic_trt.report.evaluate.plan import plan_evaluation
    from arctic_trt.report.evaluate.run import evaluate
    from arctic_trt.report.verify.run import is_checkpoint

    plan = plan_evaluation(recipe)
    try:
        _announce(plan, output)
        result = evaluate(plan, _Progress(output, plan))
    finally:
        plan.close()
    output.result(result)
    _show(result, output)
    if is_checkpoint(path) and not no_report:
        write_report(path, output)


def _announce(plan: EvaluationPlan, output: Output) -> None:
    against = f" against {plan.recipe.against}" if plan.recipe.against else ""
    output.note(
        f"{plan.subject.path}{against}: {plan.config.num_hidden_layers} layers, {len(plan.samples)} samples, "
        f"{plan.num_tokens} tokens, hidden states {'on disk' if plan.memory.spill else 'in memory'}"
    )


class _Progress:
    """A line a layer, with the time that is left by the mean of this run's layers."""

    def __init__(self, output: Output, plan: EvaluationPlan) -> None:
        self._output, self._plan, self._began, self._first = output, plan, time.perf_counter(), -1

    def __call__(self, done: LayerErrors) -> None:
        layers, seconds = self._plan.config.num_hidden_layers, time.perf_counter() - self._began
        self._first = done.layer if self._first < 0 else self._first
        left = seconds / (done.layer - self._first + 1) * (layers - done.layer - 1)
        read = sum(source.bytes_read for source in self._plan.sources)
        error = f"  error {done.errors['candidate']:.2%}" if done.errors else ""
        rate = f"{gigabytes(read)} at {gigabytes(read / seconds)}/s"
        self._output.note(f"layer {done.layer + 1}/{layers}  read {rate}{error}  eta {duration(left)}")


def _show(result: dict[str, Any], output: Output) -> None:
    data, reference = result["data"], result["reference"]
    rows = [
        ("path", result["path"]),
        ("data", f"{data['path']}: {data['samples']} samples, {data['predicted_tokens']} predicted tokens"),
        ("perplexity", f"{result['perplexity']:.4f}"),
    ]
    if reference:
        rows += [
            ("original's perplexity", f"{reference['perplexity']:.4f}"),
            ("KL divergence", f"{result['kl_mean']:.3g} nats a token (99 % below {result['kl_p99']:.3g})"),
            ("top-1 agreement", f"{result['top1_agreement']:.2%}"),
            ("error of hidden states", f"{result['hidden_error'][-1]:.2%} after the last layer"),
        ]
    rows += [("time", duration(result["seconds"])), ("peak memory", gigabytes(result["peak_rss_bytes"]))]
    output.table("Evaluated", rows)
    if result["sensitivity"]:
        _show_sensitivity(result["sensitivity"], output)


def _show_sensitivity(found: dict[str, Any], output: Output) -> None:
    output.table("What costs most", [(item["site"], f"{item['kl_mean']:.3g}") for item in found["sites"]], ("site", "KL alone"))
    units = found["units"][:SHOWN_UNITS]
    rows = [
        (
            "all" if unit["layer"] is None else str(unit["layer"]),
            unit["site"],
            f"{unit['kl']:.3g}",
            gigabytes(unit["bytes"]),
            "bf16" if unit["kept"] else "fp8",
        )
        for unit in units
    ]
    output.table(f"Layer by layer ({len(units)} of {len(found['units'])})", rows, ("layer", "site", "KL", "grows by", "keep in"))
    output.table(
        "Recipe",
        [
            ("file", found["recipe"]),
            ("grows by", f"{gigabytes(found['spent_bytes'])} of {gigabytes(found['budget_bytes'])}"),
            ("expected KL", f"{found['predicted_kl']:.3g}"),
            ("next", f"arctic-trt quantize --config {found['recipe']} --output_dir NEW"),
        ],
    )
