"""An evaluation from beginning to end: what it found as one object, in the checkpoint's report too, and the recipe."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml

from arctic_trt import __version__
from arctic_trt.checkpoint.contract import read_json
from arctic_trt.checkpoint.output_dir import named_errors, write_bytes
from arctic_trt.errors import RefusedError
from arctic_trt.quantize.meter import Meter
from arctic_trt.quantize.pipeline import REPORT
from arctic_trt.report.evaluate.job import Evaluation, OnLayer, run_evaluation
from arctic_trt.report.evaluate.lanes import CANDIDATE, REFERENCE, SITES
from arctic_trt.report.evaluate.plan import EvaluationPlan
from arctic_trt.report.evaluate.scores import summarize
from arctic_trt.report.evaluate.sensitivity import choose_units, extra_bytes, find_units, plan_recipe
from arctic_trt.report.evaluate.sources import CheckpointSource
from arctic_trt.report.page.write import save_record

SENSITIVITY_RECIPE = "report/sensitivity.yaml"
logger = logging.getLogger(__name__)


def evaluate(plan: EvaluationPlan, on_layer: OnLayer = lambda done: None) -> dict[str, Any]:
    """Carry out ``plan`` and return what ``--json`` prints; a checkpoint gets it as ``report/eval.json``."""
    result: dict[str, Any] = {}

    def keep(found: Evaluation) -> None:
        result.update(describe(plan, found))
        if isinstance(plan.subject, CheckpointSource):
            _save(plan.subject.path, result)

    run_evaluation(plan, on_layer, keep)
    return result


def describe(plan: EvaluationPlan, found: Evaluation) -> dict[str, Any]:
    """Everything that was measured; None for what this evaluation does not measure."""
    subject = summarize(found.scores[CANDIDATE if plan.candidate else REFERENCE])
    compared = plan.candidate is not None and plan.reference is not None
    reference = summarize(found.scores[REFERENCE]) if compared else None
    return {
        "path": str(plan.subject.path),
        "against": str(plan.recipe.against) if plan.recipe.against else None,
        "data": {
            "path": plan.recipe.data,
            "samples": len(plan.samples),
            "tokens": plan.num_tokens,
            "predicted_tokens": plan.num_tokens - len(plan.samples),
            "digest": plan.fingerprint["data"],
        },
        **subject,
        "reference": {key: reference[key] for key in ("perplexity", "nll")} if reference else None,
        "hidden_error": [layer.errors[CANDIDATE] for layer in found.layers] if compared else None,
        "sensitivity": _sensitivity(plan, found, subject["kl_mean"]) if plan.recipe.sensitivity else None,
        "seconds": round(found.seconds, 3),
        "peak_rss_bytes": Meter.peak_rss_bytes(),
        "bytes_read": found.bytes_read,
        "resumed_layers": found.resumed_layers,
        "hidden_states_on_disk": plan.memory.spill,
        "version": __version__,
    }


def _sensitivity(plan: EvaluationPlan, found: Evaluation, total_kl: float) -> dict[str, Any]:
    """The ranking, the choice, and where the recipe that follows from it was written."""
    assert isinstance(plan.subject, CheckpointSource), "checked with the plan"
    checkpoint, recipe = plan.subject.checkpoint, plan.recipe
    site_kl = {site: summarize(found.scores[site])["kl_mean"] for site in SITES}
    units = find_units(site_kl, [layer.errors for layer in found.layers], extra_bytes(checkpoint))
    candidates = [unit for unit in units if unit.site in (recipe.sites or SITES)]
    choice = choose_units(units, candidates, plan.budget_bytes, total_kl)
    path = recipe.recipe_file or checkpoint.checkpoint_dir / SENSITIVITY_RECIPE
    content = plan_recipe(choice, checkpoint, recipe.against or Path(), _recorded(checkpoint.checkpoint_dir))
    head = f"# Keeps in bf16 what costs most. Expected KL {choice.predicted_kl:.3g} instead of {total_kl:.3g} nats a token.\n"
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, (head + yaml.safe_dump(content, sort_keys=False)).encode())
    sites = [{"site": site, "kl_mean": kl} for site, kl in sorted(site_kl.items(), key=lambda item: -item[1])]
    return {"sites": sites, **choice.as_dict(), "recipe": str(path)}


def _recorded(checkpoint_dir: Path) -> dict[str, Any]:
    """The recipe that the checkpoint was made by, if its report tells."""
    path = checkpoint_dir / REPORT
    if not path.is_file():
        logger.warning("%s does not exist: the new recipe calibrates with the default data.", path)
        return {}
    recipe = read_json(path, "Quantize again, or remove the file.").get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def _save(checkpoint_dir: Path, result: dict[str, Any]) -> None:
    """Write ``result`` beside the checkpoint; where that cannot be written to, say so and go on: the numbers are on stdout."""
    try:
        save_record(checkpoint_dir, "eval", result)
    except (OSError, RefusedError) as error:
        reason = error.message if isinstance(error, RefusedError) else f"{error.strerror}."
        logger.warning("%s is not written: %s", checkpoint_dir / "report" / "eval.json", reason)
