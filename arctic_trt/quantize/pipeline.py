"""The quantization of a checkpoint, carried out: one pass over its bytes, the report, and at last ``config.json``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from arctic_trt.checkpoint.contract import rank_file, read_json
from arctic_trt.checkpoint.digests import DIGESTS, file_crc
from arctic_trt.checkpoint.output_dir import OutputDir, check_space
from arctic_trt.errors import RefusedError
from arctic_trt.model import tokenizer
from arctic_trt.quantize.device import full_device_refused
from arctic_trt.quantize.job import OnLayer, QuantizeJob
from arctic_trt.quantize.meter import Meter
from arctic_trt.quantize.plan import QuantizePlan
from arctic_trt.quantize.team import Solo, Team

REPORT = "report/quantize.json"


def _nobody(*_: object) -> None:
    """The listener of a job that nobody watches."""


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
        with full_device_refused(recipe.device):
            report = job.run()
        if team.rank == 0:
            side_files = [name for name in tokenizer.FILES if (recipe.model_dir / name).is_file()]
            for name in side_files:
                out.copy(recipe.model_dir / name, name)
            files = {name: file_crc(recipe.output_dir / name) for name in side_files}
            out.write_json(DIGESTS, {"files": files, "tensors": job.digests()})
            out.write_json(REPORT, report)
            out.write_json("config.json", report["config"])
    return report
