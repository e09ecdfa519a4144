"""Quantizations as a test asks for them, and directories as a test compares them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from arctic_trt.quantize.memory import MIN_DEPTH, MemoryPlan, estimate_peak
from arctic_trt.quantize.pipeline import run_quantization
from arctic_trt.quantize.plan import plan_quantization
from arctic_trt.recipes import QuantizeRecipe
from tests.support.checkpoints import Tensors


def quantize(
    model_dir: Path, output_dir: Path, *, threads: int | None = None, memory: MemoryPlan | None = None, **recipe: Any
) -> dict[str, Any]:
    """Quantize by the library's front door, perhaps with other ``threads`` and ``memory`` than it would choose; the report."""
    plan = plan_quantization(QuantizeRecipe(model_dir=model_dir, output_dir=output_dir, **recipe))
    plan = replace(plan, workers=threads or plan.workers, memory=memory or plan.memory)
    return run_quantization(plan)


def spilling_budget(recipe: dict[str, Any], processes: int = 1) -> int:
    """A --memory_budget just large enough for this quantization with its hidden states on disk."""
    plan = plan_quantization(QuantizeRecipe(**recipe), processes)
    lengths = [len(sample) for sample in plan.samples]
    least = estimate_peak(
        plan.source.config,
        tokens=sum(lengths),
        batch_tokens=max(lengths) * plan.recipe.batch_size,
        workers=plan.workers,
        depth=MIN_DEPTH,
        spill=True,
    )
    return processes * (least + 10)


def read_ranks(directory: Path) -> list[Tensors]:
    """The tensors of every rank file, read by the safetensors library."""
    return [load_file(directory / f"rank{rank}.safetensors") for rank in range(len(list(directory.glob("rank*.safetensors"))))]


def tree(directory: Path) -> dict[str, bytes | None] | None:
    """Every path below ``directory`` with its bytes (None for a directory); None if there is no such directory."""
    if not directory.exists():
        return None
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in sorted(directory.rglob("*"))}


TIMED = ("quantize.json", "verify.json", "eval.json", "report.html")


def lasting(directory: Path) -> dict[str, bytes | None]:
    """:func:`tree` without the records and the page, which hold the time that the runs took."""
    return {name: data for name, data in (tree(directory) or {}).items() if not name.endswith(TIMED)}


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every rank file, of config.json, and of the record of the tensors' digests."""
    files = [directory / "config.json", *sorted(directory.glob("rank*")), directory / "report" / "digests.json"]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_report(directory: Path) -> dict[str, Any]:
    """The report that a quantization left."""
    report: dict[str, Any] = json.loads((directory / "report" / "quantize.json").read_text())
    return report


@dataclass
class Job:
    """A quantize command line over files that a test may spoil; ``flags`` are added to it or replace what is there.

    Nothing is drawn unless ``report``, since that takes longer than the rest.
    """

    model_dir: Path
    calib: Path
    output_dir: Path
    flags: dict[str, object] = field(default_factory=dict)
    report: bool = False

    def argv(self, *more: object) -> list[str]:
        flags = {
            "--model_dir": self.model_dir,
            "--output_dir": self.output_dir,
            "--calib_dataset": self.calib,
            "--tp_size": 2,
            **self.flags,
        }
        drawn = [] if self.report else ["--no_report"]
        return ["quantize", *(str(word) for pair in flags.items() for word in pair), *drawn, *map(str, more)]

    @property
    def index(self) -> Path:
        return self.model_dir / "model.safetensors.index.json"

    def home(self, name: str) -> Path:
        """The shard that holds a tensor."""
        return self.model_dir / json.loads(self.index.read_text())["weight_map"][name]

    def edit_config(self, change: Callable[[dict[str, Any]], object]) -> None:
        _edit_json(self.model_dir / "config.json", change)

    def edit_index(self, change: Callable[[dict[str, str]], object]) -> None:
        _edit_json(self.index, lambda raw: change(raw["weight_map"]))

    def edit_shard(self, name: str, change: Callable[[Tensors], object]) -> None:
        """Rewrite the shard that holds ``name``; the index stays as it is."""
        path = self.home(name)
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


def _edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
